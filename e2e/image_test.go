package e2e

import (
	"bytes"
	"errors"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/shale-image/shale/bench/netmodel"
	"github.com/shale-image/shale/bench/treecmp"
)

func TestMountedTreeEqualsTar(t *testing.T) { eachForm(t, testMountedTree) }

func testMountedTree(t *testing.T, f form, face string) {
	w := setup(t)
	n := w.node(t)
	n.mount(f, face, w.registry.Host())
	compare(t, w.truth, n.mnt)
	st := n.status()
	if len(st.Mounts) != 1 || st.Mounts[0].Fill.Errors != 0 {
		t.Fatalf("status: %+v", st.Mounts)
	}
	if m := st.Mounts[0]; (f.lazy && face != "direct") != (m.Source.Bytes > 0) {
		t.Errorf("the mount has fetched %d bytes", m.Source.Bytes)
	}
	n.shale(0, "umount", n.mnt)
	for deadline := time.Now().Add(20 * time.Second); len(n.status().Mounts) != 0; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) { // the kernel drops what was mounted a little later
			t.Fatalf("still mounted: %+v", n.status().Mounts)
		}
	}
}

func TestExportedTreeEqualsTar(t *testing.T) {
	for _, f := range forms {
		if !f.lazy {
			continue // export goes by an index
		}
		t.Run(f.what, func(t *testing.T) {
			w := setup(t)
			n, p := w.node(t), w.proxy(t)
			dir := filepath.Join(t.TempDir(), "out")
			n.shale(0, "export", p.Host()+"/"+f.name, dir)
			t.Log(p.Totals())
			compare(t, w.truth, dir)
		})
	}
}

func compare(t *testing.T, want, got string) {
	t.Helper()
	diffs, err := treecmp.Compare(want, got, treecmp.Options{})
	if err != nil {
		t.Error(err)
	}
	for _, d := range diffs {
		// No entry of the layers is the root directory: extracting into it
		// leaves the time of the last change.
		if d.Path == "." && d.Field == treecmp.Mtime {
			continue
		}
		t.Error(d)
	}
}

func TestRun(t *testing.T) { eachForm(t, testRun) }

func testRun(t *testing.T, f form, face string) {
	w := setup(t)
	n := w.node(t)
	p := w.proxy(t)
	ref := p.Host() + "/" + f.name
	n.complete(f, face, p.Host())
	run := func(args ...string) []string {
		return append(append([]string{"run", "--rm", "--face", face}, f.args...), append([]string{ref}, args...)...)
	}
	out := n.shale(0, run("python3", "-c", "print(6*7)")...)
	if out != "42\n" {
		t.Errorf("printed %q", out)
	}
	var full int64
	for _, l := range w.manifest.Layers {
		full += l.Size
	}
	n.stop()
	first := p.Totals()
	for last := first; ; last = first { // a request counts when its answer has ended
		time.Sleep(50 * time.Millisecond)
		if first = p.Totals(); first == last {
			break
		}
	}
	t.Logf("%v of %d bytes", first, full)
	if f.lazy && face != "direct" && first.Down*100 > full*f.percent {
		t.Errorf("fetched %d bytes of %d, more than %d%%", first.Down, full, f.percent)
	}
	// Again, also by another service: nothing is fetched twice.
	if out := n.shale(0, run("python3", "-c", "print(6*7)")...); out != "42\n" {
		t.Errorf("printed %q", out)
	}
	if again := p.Totals(); again != first {
		t.Errorf("the second start went to the registry: %v, before %v", again, first)
	}
	n.shale(3, run("sh", "-c", "echo x > /usr/new && test -s /usr/new && exit 3")...)
	n.shale(127, run("no-such-command")...)
	if left, _ := os.ReadDir(filepath.Join(n.root, "containers")); len(left) != 0 {
		t.Errorf("containers left behind: %v", left)
	}
}

// TestKill kills the service with no warning, keeper and worker: what is not in
// memory is EIO from then on, and never zeros. What the kernel reads by itself is right,
// but for the face fanotify: there what was not here is zeros.
func TestKill(t *testing.T) { eachForm(t, testKill) }

func testKill(t *testing.T, f form, face string) {
	w := setup(t)
	n := w.node(t)
	n.mount(f, face, w.registry.Host())
	files := someFiles(t, w.truth, 400)
	for _, f := range files[:40] {
		if right, err := readLike(n.mnt, w.truth, f); err != nil || !right {
			t.Fatalf("%s before the kill: right %v, %v", f, right, err)
		}
	}
	n.killAll()
	failed, zeros := 0, 0
	for _, f := range files {
		done := make(chan error, 1)
		go func() {
			right, err := readLike(n.mnt, w.truth, f)
			if err == nil && !right {
				err = errWrong
				if face == "fanotify" && zerosOrRight(n.mnt, w.truth, f) {
					err = errZeros
				}
			}
			done <- err
		}()
		select {
		case err := <-done:
			if errors.Is(err, errWrong) {
				t.Errorf("%s: wrong bytes", f)
			} else if errors.Is(err, errZeros) {
				zeros++
			} else if err != nil {
				failed++
			}
		case <-time.After(20 * time.Second):
			t.Fatalf("%s: the reader hangs", f)
		}
	}
	here := face == "direct" || face == "fanotify" && !f.lazy // all of it, and nobody stands in between
	if failed+zeros == 0 && !here {
		t.Error("no read failed: was everything in memory?")
	}
	if failed > 0 && (face == "direct" || face == "fanotify") {
		t.Errorf("%d of %d reads failed", failed, len(files))
	}
	t.Logf("%d of %d reads failed, %d had zeros", failed, len(files), zeros)
	n.shale(0, "umount", n.mnt)

	// What was fetched is there for the next service.
	p := w.proxy(t)
	n.mount(f, face, p.Host())
	for _, f := range files[:40] {
		if right, err := readLike(n.mnt, w.truth, f); err != nil || !right {
			t.Errorf("%s after a restart: right %v, %v", f, right, err)
		}
	}
	for _, r := range p.Log() {
		if strings.Contains(r.Path, "/blobs/") && r.Range != "" {
			t.Errorf("fetched again after a restart: %s of %s", r.Range, r.Path)
		}
	}
}

var (
	errWrong = errors.New("wrong bytes")
	errZeros = errors.New("zeros")
)

// zerosOrRight tells whether all bytes in which a file differs are zero.
func zerosOrRight(mnt, truth, f string) bool {
	got, err := os.ReadFile(filepath.Join(mnt, f))
	want, err2 := os.ReadFile(filepath.Join(truth, f))
	if err != nil || err2 != nil || len(got) != len(want) {
		return false
	}
	for i := range got {
		if got[i] != want[i] && got[i] != 0 {
			return false
		}
	}
	return true
}

// readLike reads a file below two directories and tells whether they agree.
func readLike(got, want, name string) (bool, error) {
	g, err := os.ReadFile(filepath.Join(got, name))
	if err != nil {
		return false, err
	}
	b, err := os.ReadFile(filepath.Join(want, name))
	return bytes.Equal(g, b), err
}

// someFiles picks regular files of some size.
func someFiles(t *testing.T, root string, n int) []string {
	t.Helper()
	var all []string
	err := filepath.WalkDir(root, func(path string, de fs.DirEntry, err error) error {
		if err != nil || !de.Type().IsRegular() {
			return err
		}
		if info, err := de.Info(); err == nil && info.Size() > 1000 {
			all = append(all, strings.TrimPrefix(path, root+"/"))
		}
		return nil
	})
	if err != nil || len(all) < n {
		t.Fatalf("%d files: %v", len(all), err)
	}
	r := rand.New(rand.NewPCG(1, 2))
	r.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	return all[:n]
}

// TestFlippedByte has the registry lie about one bit of each object.
func TestFlippedByte(t *testing.T) {
	w := setup(t)
	p := w.proxy(t)
	ref := p.Host() + "/" + name
	flip := func(part string, at ...int64) {
		p.SetFaults(func(r *http.Request) *netmodel.Fault {
			if strings.HasSuffix(r.URL.Path, part) {
				return &netmodel.Fault{Flip: at}
			}
			return nil
		})
	}
	for _, c := range []struct{ what, part, named string }{
		{"manifest", "/manifests/shale", "e2e/debian:shale"},
		{"config", w.manifest.Config.Digest, w.manifest.Config.Digest},
		{"bootstrap", w.bootstrap(), w.bootstrap()},
	} {
		t.Run(c.what, func(t *testing.T) {
			n := w.node(t)
			flip(c.part, 200)
			_, errout, code := n.try("mount", ref, n.mnt)
			if code != 7 || !strings.Contains(errout, c.named) {
				t.Errorf("exit code %d, want 7 and a word of %s:\n%s", code, c.named, errout)
			}
		})
	}
	for _, l := range w.manifest.Layers {
		if l.Digest == w.bootstrap() {
			continue
		}
		t.Run("blob "+l.Digest[7:19], func(t *testing.T) {
			n := w.node(t)
			// A bit in the middle of each 256 KiB of the first MiB.
			at := []int64{100_000, 350_000, 620_000, 900_000}
			at = slices.DeleteFunc(at, func(k int64) bool { return k >= l.Size*9/10 })
			flip(l.Digest, at...)
			n.shale(0, "mount", ref, n.mnt)
			bad := readAll(t, n.mnt, w.truth)
			if len(bad) == 0 {
				t.Error("nobody noticed")
			}
			st := n.status()
			if f := st.Mounts[0].Fill; f.Errors == 0 || !strings.Contains(f.LastErrors[0].Error, l.Digest) {
				t.Errorf("status does not name the blob: %+v", f)
			}
			p.SetFaults(nil)
			for _, f := range bad {
				if right, err := readLike(n.mnt, w.truth, f); err != nil || !right {
					t.Errorf("%s, with the fault gone: right %v, %v", f, right, err)
				}
			}
		})
	}
}

func (w *world) bootstrap() string { return w.manifest.Layers[len(w.manifest.Layers)-1].Digest }

// readAll reads every regular file and returns those that failed; wrong bytes
// fail the test.
func readAll(t *testing.T, got, want string) (failed []string) {
	t.Helper()
	err := filepath.WalkDir(want, func(path string, de fs.DirEntry, err error) error {
		if err != nil || !de.Type().IsRegular() {
			return err
		}
		f := strings.TrimPrefix(path, want+"/")
		switch right, err := readLike(got, want, f); {
		case errors.Is(err, syscall.EIO):
			failed = append(failed, f)
		case err != nil:
			t.Error(err)
		case !right:
			t.Errorf("%s: wrong bytes", f)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return failed
}
