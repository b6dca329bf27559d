package reader

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/content"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
)

// sociLayout unpacks the image that index/soci/testdata/README.md tells of: v1 has
// a SOCI index beside it, v2 names one.
func sociLayout(t testing.TB) string {
	t.Helper()
	f, err := os.Open("../index/soci/testdata/soci.tar.gz")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if err == io.EOF {
			return dir
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		p, err := io.ReadAll(r)
		name := filepath.Join(dir, h.Name)
		if err = errors.Join(err, os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, p, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
}

// sociImage opens an image of the layout.
func sociImage(t testing.TB, dir, tag string) (*image.Repository, *image.Image) {
	t.Helper()
	ref, err := image.ParseRef("oci:" + dir + ":" + tag)
	if err != nil {
		t.Fatal(err)
	}
	repo, err := image.Open(t.Context(), ref, image.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { repo.Close() })
	platform, err := image.ParsePlatform("linux/amd64")
	if err != nil {
		t.Fatal(err)
	}
	img, err := repo.Resolve(t.Context(), platform)
	if err != nil {
		t.Fatal(err)
	}
	return repo, img
}

// file is where a layout has an object.
func object(dir, digest string) string {
	return filepath.Join(dir, "blobs/sha256", strings.TrimPrefix(digest, "sha256:"))
}

// TestSOCI: the tree and every byte are what the layers have, by the indexes that
// the real tools have made, and only small layers are read for it.
func TestSOCI(t *testing.T) {
	dir := sociLayout(t)
	for tag, trust := range map[string]Trust{"v1": Repository, "v2": Bound} {
		repo, img := sociImage(t, dir, tag)
		for _, at := range order {
			raw, err := Fetch(t.Context(), repo, img, Options{TempDir: t.TempDir(), Trust: at})
			if !at.Allows(trust) {
				// Who trusts none but its own does not look for others.
				if !errors.Is(err, ErrNoIndex) || useless(err) || errors.As(err, new(needsTrust)) != (at != Local) {
					t.Errorf("%s at %s: %v", tag, at, err)
				}
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			if raw.Kind != SOCI || raw.Trust != trust || raw.Stored < img.Layers[1].Size || raw.Stored != raw.Size {
				t.Errorf("%s: %s, %s, %d bytes", tag, raw.Kind, raw.Trust, raw.Stored)
			}
			raw.Close()
		}
		raw, err := Fetch(t.Context(), repo, img, Options{TempDir: t.TempDir()})
		if err != nil {
			t.Fatal(err)
		}
		defer raw.Close()
		var kept atomic.Int64
		raw.Keep = func(d chunk.Digest, p []byte) error { kept.Add(int64(len(p))); return d.Verify(p) }
		got, err := raw.Tree()
		if err != nil {
			t.Fatal(err)
		}
		if kept.Load() < 30000 || !raw.Fetched(1) || raw.Fetched(0) || raw.Fetched(len(img.Layers)) {
			t.Errorf("%d bytes of content came along", kept.Load())
		}
		m, err := Make(t.Context(), Job{Manifest: img.ManifestDigest, Layers: img.Layers, DiffIDs: img.Config.DiffIDs, Places: true,
			Open: func(ctx context.Context, n int) (io.ReadCloser, error) { return repo.Blob(ctx, img.Layers[n]) }})
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		// By their places the two are the same.
		identified := *got
		identified.Chunks = slices.Clone(got.Chunks)
		for i := range identified.Chunks {
			if c := &identified.Chunks[i]; c.Digest.Algorithm == chunk.Origin {
				var ok bool
				if c.Digest, ok = m.Identify(c); !ok {
					t.Errorf("%d bytes at %d of blob %d are nowhere", c.Size, c.Offset, c.Blob)
				}
			}
		}
		if err := index.Equal(m.Tree, &identified); err != nil {
			t.Error(err)
		}
		for _, c := range []index.Chunk{{Size: 1, Offset: 512}, {Size: 5, Blob: 9}, {Size: 1, Offset: 1 << 40}} {
			if d, ok := m.Identify(&c); ok {
				t.Errorf("%+v is %s", c, d)
			}
		}
		sameContent(t, m, got, repo.Blobs())
	}
}

// sameContent compares two trees of the same layers, with the bytes of all files.
func sameContent(t testing.TB, m *Made, got *index.Tree, src blob.Source) {
	t.Helper()
	files := 0
	err := m.Tree.Walk(func(path string, ino *index.Inode) error {
		other, err := got.Lookup(path)
		if err != nil || !ino.IsRegular() {
			return err
		}
		var a, b bytes.Buffer
		if err := errors.Join(content.Copy(t.Context(), &a, m.Tree, withSide{src, m}, ino), content.Copy(t.Context(), &b, got, src, other)); err != nil {
			return fmt.Errorf("/%s: %w", path, err)
		}
		if files++; !bytes.Equal(a.Bytes(), b.Bytes()) {
			t.Errorf("/%s: other content", path)
		}
		return nil
	})
	if err != nil || files < 10 {
		t.Errorf("%d files, %v", files, err)
	}
	// With the same content, all else is to be the same.
	m.Tree.Walk(func(path string, ino *index.Inode) error {
		if other, err := got.Lookup(path); err == nil {
			ino.Extents = other.Extents
		}
		return nil
	})
	m.Tree.Chunks = got.Chunks
	if err := index.Equal(m.Tree, got); err != nil {
		t.Error(err)
	}
}

// An index of this program's beside the image is used in place of a SOCI index.
func TestSOCIAndOurs(t *testing.T) {
	dir := sociLayout(t)
	for _, tag := range []string{"v1", "v2"} {
		repo, img := sociImage(t, dir, tag)
		m, err := Make(t.Context(), Job{Manifest: img.ManifestDigest, Layers: img.Layers, DiffIDs: img.Config.DiffIDs,
			Open: func(ctx context.Context, n int) (io.ReadCloser, error) { return repo.Blob(ctx, img.Layers[n]) }})
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		if _, err := Push(t.Context(), repo, img, m); err != nil {
			t.Fatal(err)
		}
		raw, err := Fetch(t.Context(), repo, img, Options{TempDir: t.TempDir()})
		if err != nil || raw.Kind != Index {
			t.Fatalf("%s: %v, %v", tag, raw, err)
		}
		raw.Close()
	}
}

// TestSOCIDamaged: whatever is wrong with an index is told as no index, and no file
// is ever read wrongly.
func TestSOCIDamaged(t *testing.T) {
	for _, tag := range []string{"v1", "v2"} {
		dir := sociLayout(t)
		repo, img := sociImage(t, dir, tag)
		raw, err := Fetch(t.Context(), repo, img, Options{TempDir: t.TempDir()})
		if err != nil {
			t.Fatal(err)
		}
		name, ztoc := raw.Name, raw.Parts[0].Ztoc
		// A ztoc that was taken for right, and is wrong.
		at := raw.Parts[0].At
		if _, err := raw.File.WriteAt([]byte{0xff, 0xff, 0xff, 0x7f}, at); err != nil {
			t.Fatal(err)
		}
		if _, err := raw.Tree(); !errors.Is(err, ErrNoIndex) || !errors.Is(err, index.ErrCorrupt) {
			t.Errorf("%s: a wrong ztoc: %v", tag, err)
		}
		raw.Close()
		for what, path := range map[string]string{"index": object(dir, name), "ztoc": object(dir, ztoc)} {
			p, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			for how, change := range map[string]func() error{
				"gone":    func() error { return os.Remove(path) },
				"changed": func() error { return os.WriteFile(path, append([]byte(" "), p[1:]...), 0o644) },
				"cut":     func() error { return os.WriteFile(path, p[:len(p)-1], 0o644) },
			} {
				if err := change(); err != nil {
					t.Fatal(err)
				}
				raw, err := Fetch(t.Context(), repo, img, Options{TempDir: t.TempDir()})
				if !errors.Is(err, ErrNoIndex) {
					t.Errorf("%s: %s %s: %v", tag, what, how, err)
				}
				if raw != nil {
					raw.Close()
				}
				if err := os.WriteFile(path, p, 0o644); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
}

// Each stored byte of a layer that is changed is found out by who reads a file that
// is decoded from it, and so is a window.
func TestSOCITampered(t *testing.T) {
	dir := sociLayout(t)
	repo, img := sociImage(t, dir, "v2")
	raw, err := Fetch(t.Context(), repo, img, Options{TempDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	tree, err := raw.Tree()
	if err != nil {
		t.Fatal(err)
	}
	right := map[string][]byte{}
	read := func(path string) ([]byte, error) {
		ino, err := tree.Lookup(path)
		if err != nil {
			t.Fatal(err)
		}
		var b bytes.Buffer
		err = content.Copy(t.Context(), &b, tree, repo.Blobs(), ino)
		return b.Bytes(), err
	}
	paths := []string{"dir/big", "dir/chunk", "dir/plain", "multi", "more"}
	for _, path := range paths {
		if right[path], err = read(path); err != nil {
			t.Fatal(err)
		}
	}
	found := map[string]int{}
	for n, b := range tree.Blobs {
		if raw.Fetched(n) {
			continue
		}
		p, err := os.ReadFile(object(dir, b.Digest))
		if err != nil {
			t.Fatal(err)
		}
		for at := 40; at < len(p); at += len(p) / 40 {
			bad := bytes.Clone(p)
			bad[at] ^= 0x20
			if err := os.WriteFile(object(dir, b.Digest), bad, 0o644); err != nil {
				t.Fatal(err)
			}
			for _, path := range paths {
				got, err := read(path)
				switch {
				case errors.Is(err, chunk.ErrCorrupt):
					found[b.Digest]++
				case err != nil:
					t.Errorf("byte %d of %s: /%s: %v", at, b.Digest, path, err)
				case !bytes.Equal(got, right[path]):
					t.Errorf("byte %d of %s: /%s is wrong, and nobody noticed", at, b.Digest, path)
				}
			}
		}
		if err := os.WriteFile(object(dir, b.Digest), p, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	// Three layers, and a ztoc: of another one nobody has needed a window, and one
	// has none.
	if len(found) < 4 {
		t.Errorf("damage was found in %v", found)
	}
}
