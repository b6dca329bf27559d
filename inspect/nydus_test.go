package inspect

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/reader"
	"github.com/shale-image/shale/reader/nydustest"
)

// TestCheckZran checks an image over gzip layers, and finds what is changed in any
// of its objects.
func TestCheckZran(t *testing.T) {
	ref, err := image.ParseRef("oci:" + t.TempDir() + ":" + nydustest.Tag)
	if err != nil {
		t.Fatal(err)
	}
	objects := nydustest.Zran(t)
	check := func() *Result {
		repo, err := image.Open(t.Context(), ref, image.Options{})
		if err != nil {
			t.Fatal(err)
		}
		img, err := repo.Resolve(t.Context(), image.Platform{})
		if err != nil {
			t.Fatal(err)
		}
		im, err := Open(t.Context(), repo, img, reader.Options{TempDir: t.TempDir()})
		if err != nil {
			t.Fatal(err)
		}
		defer im.Close()
		res, err := Check(t.Context(), im, nil)
		if err != nil {
			t.Fatal(err)
		}
		if im.Damage == nil {
			if r := Inspect(im); len(r.Blobs) != 2 || r.Blobs[0].UsedChunks < 15 || !slices.ContainsFunc(r.Layers, func(l Layer) bool { return l.Role == roleBlob }) {
				t.Errorf("report %+v", r)
			}
		}
		return res
	}
	repo, err := image.Open(t.Context(), ref, image.Options{})
	if err != nil {
		t.Fatal(err)
	}
	nydustest.Push(t, repo, objects)
	repo.Close()
	// The layers, what tells of them, bootstrap and config.
	if res := check(); len(res.Defects) != 0 || res.Objects != 6 || res.Chunks != 23 {
		t.Fatalf("%+v", res)
	}
	for i, o := range objects {
		file := filepath.Join(ref.Dir(), "blobs/sha256", strings.TrimPrefix(o.Name(), "sha256:"))
		if err := os.Chmod(file, 0o600); err != nil {
			t.Fatal(err)
		}
		p := bytes.Clone(o.Data)
		p[len(p)/3] ^= 1
		if err := os.WriteFile(file, p, 0o600); err != nil {
			t.Fatal(err)
		}
		res := check()
		if !slices.ContainsFunc(res.Defects, func(d Defect) bool { return strings.Contains(d.Object+d.Problem, o.Name()) }) {
			t.Errorf("object %d %s: %+v", i, o.Name(), res.Defects)
		}
		if i == 0 && !slices.ContainsFunc(res.Defects, func(d Defect) bool { return slices.Contains(d.Files, "/big") }) {
			t.Errorf("no file is named: %+v", res.Defects)
		}
		if err := os.WriteFile(file, o.Data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// TestCheckZranFile checks bare bootstraps: one whose chunk info is a file beside it,
// and one that lies in the same file.
func TestCheckZranFile(t *testing.T) {
	objects := nydustest.Zran(t)
	dir := t.TempDir()
	for _, o := range objects {
		if err := os.WriteFile(filepath.Join(dir, strings.TrimPrefix(o.Name(), "sha256:")), o.Data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	boot := filepath.Join(dir, "boot")
	if err := os.WriteFile(boot, nydustest.Bootstrap(t, objects), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{boot, filepath.Join(dir, strings.TrimPrefix(objects[2].Name(), "sha256:"))} {
		im, err := OpenFile(file, "")
		if err != nil {
			t.Fatal(err)
		}
		res, err := Check(t.Context(), im, nil)
		if err != nil || len(res.Defects) != 0 || res.Chunks < 22 {
			t.Errorf("%s: %+v, %v", file, res, err)
		}
		im.Close()
	}
	// Without the chunk info there is no image.
	if err := os.Remove(filepath.Join(dir, strings.TrimPrefix(objects[3].Name(), "sha256:"))); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenFile(boot, ""); !os.IsNotExist(err) {
		t.Errorf("without the chunk info: %v", err)
	}
}
