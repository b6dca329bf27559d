package e2e

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/shale-image/shale/bench/netmodel"
)

// What the note says when an image is read as a whole.
const noteRead = "is read, once"

// damages are what may be wrong with an object on its way. Each gives the exit
// codes of a pull that must have it.
var damages = []struct {
	what  string
	fault func(size int64) netmodel.Fault
	code  int
	// passing: it is not the object that is wrong, so there may be no way
	// around it.
	passing bool
}{
	{"flipped", func(size int64) (f netmodel.Fault) {
		for off := size / 40; off < size; off += max(1, min(size/40, 10_000)) {
			f.Flip = append(f.Flip, off)
		}
		return f
	}, 7, false},
	{"cut off", func(size int64) netmodel.Fault { return netmodel.Fault{Truncate: true, After: min(1000, size/10)} }, 10, true},
	{"gone", func(int64) netmodel.Fault { return netmodel.Fault{Status: http.StatusNotFound} }, 3, false},
	{"refused", func(int64) netmodel.Fault { return netmodel.Fault{Status: http.StatusInternalServerError} }, 10, true},
}

// damage has the proxy damage one object.
func damage(p *netmodel.Proxy, part string, f netmodel.Fault) {
	p.SetFaults(func(r *http.Request) *netmodel.Fault {
		if r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, part) {
			return &f
		}
		return nil
	})
}

// TestIndexDamage damages all that an image with an index consists of.
func TestIndexDamage(t *testing.T) {
	w := setup(t)
	p := w.proxy(t)
	s := w.newSmall(t, "e2e/damage", 2)
	ref := p.Host() + "/" + s.name
	t.Run("index", func(t *testing.T) {
		for what, o := range map[string]struct {
			part string
			size int64
		}{
			"list":     {"/manifests/" + s.list(), 300},
			"manifest": {"/manifests/" + s.artifact, 700},
			"index":    {"/blobs/" + digest(s.made.Encoded), int64(len(s.made.Encoded))},
		} {
			for _, d := range damages {
				t.Run(what+" "+d.what, func(t *testing.T) {
					damage(p, o.part, d.fault(o.size))
					defer p.SetFaults(nil)
					testNoIndex(t, w, s, ref, d.passing)
				})
			}
			if what == "index" {
				continue
			}
			// A bit anywhere makes it something else, or nothing.
			t.Run(what+" bits", func(t *testing.T) {
				defer p.SetFaults(nil)
				for off := int64(0); off < o.size; off += o.size / 12 {
					damage(p, o.part, netmodel.Fault{Flip: []int64{off}})
					testNoIndex(t, w, s, ref, false)
				}
			})
		}
	})
	t.Run("mounted", func(t *testing.T) {
		objects := map[string]int64{s.made.Side.Digest: s.made.Side.Size}
		for _, l := range s.img.Layers {
			objects[l.Digest] = l.Size
		}
		for digest, size := range objects {
			side := digest == s.made.Side.Digest
			what := digest[7:19]
			if side {
				what = "side"
			}
			for _, d := range damages {
				t.Run(what+" "+d.what, func(t *testing.T) {
					t.Parallel() // it mostly waits to try again
					testMounted(t, w, s, digest, d.fault(size), side, d.passing)
				})
			}
		}
	})
	t.Run("read", func(t *testing.T) {
		for _, l := range s.img.Layers {
			for _, d := range damages {
				t.Run(l.Digest[7:19]+" "+d.what, func(t *testing.T) {
					t.Parallel()
					n, p := w.node(t), w.proxy(t)
					ref := p.Host() + "/" + s.name
					damage(p, l.Digest, d.fault(l.Size))
					_, errout, code := n.try("pull", "-q", "--index-trust", "local", ref)
					if code != d.code || !strings.Contains(errout, l.Digest) {
						t.Errorf("exit code %d, want %d and a word of %s:\n%s", code, d.code, l.Digest, errout)
					}
					n.hasImages(0)
					p.SetFaults(nil)
					n.shale(0, "mount", "--index-trust", "local", ref, n.mnt)
					s.right(t, n.mnt)
				})
			}
		}
	})
}

// TestPassingFaults fails the first request for each object.
func TestPassingFaults(t *testing.T) {
	w := setup(t)
	p := w.proxy(t)
	s := w.newSmall(t, "e2e/passing", 1)
	for _, trust := range []string{"repository", "local"} {
		t.Run(trust, func(t *testing.T) {
			n := w.node(t)
			seen := map[string]*atomic.Bool{}
			for _, part := range []string{s.list(), s.artifact, digest(s.made.Encoded), s.made.Side.Digest, s.img.ConfigBlob.Digest,
				s.img.Layers[0].Digest, s.img.Layers[1].Digest, s.img.Layers[2].Digest} {
				seen[part] = new(atomic.Bool)
			}
			p.SetFaults(func(r *http.Request) *netmodel.Fault {
				if first := seen[filepath.Base(r.URL.Path)]; first != nil && first.CompareAndSwap(false, true) {
					return &netmodel.Fault{Status: http.StatusServiceUnavailable}
				}
				return nil
			})
			defer p.SetFaults(nil)
			_, errout, code := n.try("mount", "--index-trust", trust, p.Host()+"/"+s.name, n.mnt)
			if code != 0 || strings.Contains(errout, noteRead) != (trust == "local") {
				t.Fatalf("exit code %d: %s", code, errout)
			}
			s.right(t, n.mnt)
			for part, yes := range seen {
				if wanted := trust == "repository" || part == s.img.ConfigBlob.Digest || strings.Contains(string(s.img.ManifestBytes), part); wanted && !yes.Load() {
					t.Errorf("nobody asked for %s", part)
				}
			}
			if f := n.status().Mounts[0].Fill; f.Errors != 0 {
				t.Errorf("readers saw it: %+v", f)
			}
		})
	}
}

// testNoIndex mounts an image whose index cannot be had.
func testNoIndex(t *testing.T, w *world, s *small, ref string, passing bool) {
	t.Helper()
	n := w.node(t)
	_, errout, code := n.try("mount", ref, n.mnt)
	if passing && code == 10 {
		n.hasImages(0)
		return
	}
	if code != 0 {
		t.Errorf("exit code %d, want 0: %s", code, errout)
		return
	}
	if !strings.Contains(errout, noteRead) {
		t.Errorf("no note says that the image %s: %s", noteRead, errout)
	}
	s.right(t, n.mnt)
	n.shale(0, "umount", n.mnt)
}

// testMounted damages an object of a mounted image.
func testMounted(t *testing.T, w *world, s *small, object string, fault netmodel.Fault, side, passing bool) {
	n, p := w.node(t), w.proxy(t)
	_, errout, code := n.try("mount", p.Host()+"/"+s.name, n.mnt)
	if code != 0 || strings.Contains(errout, noteRead) {
		t.Fatalf("exit code %d: %s", code, errout)
	}
	damage(p, object, fault)
	failed := s.read(t, n.mnt)
	st := n.status()
	if len(failed) > 0 {
		var told []string
		for _, f := range st.Mounts[0].Fill.LastErrors {
			told = append(told, f.Error)
		}
		if !strings.Contains(strings.Join(told, "\n"), object) {
			t.Errorf("status does not name %s: %q", object, told)
		}
	}
	switch {
	case !side && len(failed) == 0:
		t.Error("nobody noticed")
	case side && !passing && len(failed) > 0:
		t.Errorf("cannot be read, although the layers are right: %q", failed)
	}
	t.Logf("%d of %d files failed", len(failed), len(s.files))
	p.SetFaults(nil)
	// A failure stands for a moment (fill/failed.go), and requests that are being made
	// again may be about to end with one.
	for end := time.Now().Add(5 * time.Second); len(s.read(t, n.mnt)) > 0 && time.Now().Before(end); {
		time.Sleep(100 * time.Millisecond)
	}
	s.right(t, n.mnt)
	n.shale(0, "umount", n.mnt)
}

// hasImages fails the test unless as many images are kept, and nothing else.
func (n *node) hasImages(want int) {
	n.t.Helper()
	left, err := os.ReadDir(filepath.Join(n.root, "images"))
	if err != nil || len(left) != want {
		n.t.Errorf("%d images are kept, want %d: %v, %v", len(left), want, left, err)
	}
}
