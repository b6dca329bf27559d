package daemon

import (
	"context"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/registry"

	"github.com/shale-image/shale/bench/treecmp"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/reader/nydustest"
)

// nydusImage pushes an image made by Nydus to a registry of the test.
func nydusImage(t *testing.T, objects []*nydustest.Object) (ref string) {
	t.Helper()
	srv := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
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
	c, ref := service(t), nydusImage(t, nydustest.Zran(t))
	want := nydustest.Extract(t)
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
