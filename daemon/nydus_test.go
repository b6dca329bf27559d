package daemon

import (
	"bytes"
	"context"
	"io"
	"log"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/registry"

	"github.com/shale-image/shale/bench/treecmp"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/reader"
	"github.com/shale-image/shale/reader/nydustest"
)

// nydusImage pushes an image made by Nydus to a registry of the test.
func nydusImage(t *testing.T, objects []*nydustest.Object) (ref string) {
	return nydusImageAt(t, objects, func(h http.Handler) http.Handler { return h })
}

func nydusImageAt(t *testing.T, objects []*nydustest.Object, wrap func(http.Handler) http.Handler) (ref string) {
	t.Helper()
	srv := httptest.NewServer(wrap(registry.New(registry.Logger(log.New(io.Discard, "", 0)))))
	t.Cleanup(srv.Close)
	ref = strings.TrimPrefix(srv.URL, "http://") + "/golden:" + nydustest.Tag
	r, err := image.ParseRef(ref)
	if err != nil {
		t.Fatal(err)
	}
	repo, err := image.Open(background, r, image.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer repo.Close()
	nydustest.Push(t, repo, objects)
	return ref
}

// TestMountZran mounts an image over gzip layers from a registry, and compares it
// with what tar makes of these. What lies beside its layers is kept: a service that
// is started later reads on.
func TestMountZran(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	t.Run("two layers", func(t *testing.T) { testMountZran(t, nydustest.Zran(t), nydustest.Extract(t)) })
	t.Run("awkward", func(t *testing.T) { testMountZran(t, nydustest.Awkward(t), nydustest.ExtractAwkward(t)) })
}

func testMountZran(t *testing.T, objects []*nydustest.Object, want string) {
	c, ref := service(t), nydusImage(t, objects)
	if _, err := c.Pull(background, Source{Ref: ref}, false, nil); err != nil {
		t.Fatal(err)
	}
	if err := c.Stop(background); err != nil {
		t.Fatal(err)
	}
	sides, err := filepath.Glob(filepath.Join(c.Root, "images/*/side/*"))
	if err != nil || len(sides) != 1 {
		t.Fatalf("beside the layers lie %v, %v", sides, err)
	}
	dir, m := attach(t, c, ref)
	diffs, err := treecmp.Compare(want, dir, treecmp.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range diffs {
		if d.Path != "." { // which no layer has
			t.Error(d)
		}
	}
	st, err := c.Status(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if len(st.Mounts) != 1 || st.Mounts[0].ID != m.ID || st.Mounts[0].Fill.Errors != 0 || st.Mounts[0].Source.Requests == 0 {
		t.Errorf("mounts %+v", st.Mounts)
	}
}

// fromStart makes a registry serve objects from their start only.
func fromStart(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch wanted := r.Header.Get("Range"); {
		case wanted == "", strings.HasPrefix(wanted, "bytes=0-"):
			r.Header.Del("Range")
			next.ServeHTTP(w, r)
		default:
			w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
		}
	})
}

// TestNydusWithoutRanges: an image that only its index tells how to read is read from
// the start of its blobs where a registry serves no parts of them.
func TestNydusWithoutRanges(t *testing.T) {
	for name, objects := range map[string][]*nydustest.Object{"zran": nydustest.Zran(t), "batch": nydustest.Batch(t)} {
		t.Run(name, func(t *testing.T) {
			want, _ := attach(t, service(t), nydusImage(t, objects))
			c := service(t)
			dir, m := attach(t, c, nydusImageAt(t, objects, fromStart))
			diffs, err := treecmp.Compare(want, dir, treecmp.Options{})
			must(t, err)
			for _, d := range diffs {
				t.Error(d)
			}
			if s := statusOf(t, c, m.ID); s.Fill.Errors != 0 || s.MissingChunks != 0 {
				t.Errorf("%+v", s)
			}
		})
	}
}

// TestWithoutRanges: where it is known before the mount, people are told, and
// nobody waits while he reads.
func TestWithoutRanges(t *testing.T) {
	for _, tag := range []string{"shale", "plain"} {
		t.Run(tag, func(t *testing.T) { testWithoutRanges(t, tag) })
	}
}

func testWithoutRanges(t *testing.T, tag string) {
	large := make([]byte, 9<<20)
	rand.NewChaCha8([32]byte{1}).Read(large)
	p := newPacks(t, strings.TrimSuffix(layoutOf(t, tarOf(t, "large", large)), "shale")+tag, false)
	p.mu.Lock()
	p.spoil = func(_ http.ResponseWriter, r *http.Request) bool {
		r.Header.Del("Range")
		return false
	}
	p.mu.Unlock()
	c := service(t)
	plan, err := c.Plan(background, Source{Ref: p.ref, Platform: "linux/amd64"})
	must(t, err)
	if plan.Lazy || plan.Reason != reader.ErrNoRanges.Error() || plan.StartBytes != plan.LayerBytes {
		t.Errorf("the plan is %+v", plan)
	}
	dir, notes := mountNoting(t, c, p.ref)
	if !strings.Contains(notes, "all of the image is read, once") || !strings.Contains(notes, reader.ErrNoRanges.Error()) {
		t.Errorf("it notes %q", notes)
	}
	p.requests()
	if got, err := os.ReadFile(filepath.Join(dir, "large")); err != nil || !bytes.Equal(got, large) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if asked := p.requests(); len(asked) > 0 {
		t.Errorf("reading makes requests %v", asked)
	}
	// A pull has no less.
	c = service(t)
	_, err = c.Pull(background, Source{Ref: p.ref, Platform: "linux/amd64"}, false, nil)
	must(t, err)
	p.mu.Lock()
	p.spoil = func(w http.ResponseWriter, r *http.Request) bool {
		http.NotFound(w, r)
		return true
	}
	p.mu.Unlock()
	dir, _ = attach(t, c, p.ref)
	if got, err := os.ReadFile(filepath.Join(dir, "large")); err != nil || !bytes.Equal(got, large) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

// TestMountBatch mounts an image whose blob alone tells what is in its batches.
func TestMountBatch(t *testing.T) {
	c, ref := service(t), nydusImage(t, nydustest.Batch(t))
	dir, _ := attach(t, c, ref)
	n := 0
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		n++
		_, err = os.ReadFile(path)
		return err
	})
	if err != nil || n == 0 {
		t.Errorf("%d files, %v", n, err)
	}
}
