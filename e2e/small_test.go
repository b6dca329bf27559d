package e2e

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/artifact"
	"github.com/shale-image/shale/reader"
)

// small is an image of a few files in a repository of its own, with a layer of
// each kind, and its index beside it.
type small struct {
	name     string            // "repository:tag"
	files    map[string][]byte // what is in it
	repo     *image.Repository
	img      *image.Image
	made     *reader.Made
	artifact string // digest
}

// prose is n bytes that compress to about a half, by references to what is
// before them.
func prose(r *rand.Rand, n int) []byte {
	p := make([]byte, 0, n+16)
	for len(p) < n {
		for x := r.Uint64() & r.Uint64(); x != 0; x >>= 4 {
			p = append(p, "etaoin shrdlu\n,."[x&15])
		}
	}
	return p[:n]
}

// newSmall makes and pushes an image whose content depends on its repository.
// scale is about how many MB the first layer has.
func (w *world) newSmall(t *testing.T, repository string, scale int) *small {
	t.Helper()
	s := &small{name: repository + ":plain", files: map[string][]byte{}}
	sum := sha256.Sum256([]byte(repository))
	r := rand.New(rand.NewChaCha8(sum))
	layers := []map[string][]byte{
		{"etc/passwd": prose(r, 1000), "etc/shadow": prose(r, 900), "big": prose(r, scale*2<<20)},
		{"zstd/one": prose(r, 300_000), "zstd/two": prose(r, 1<<20)},
		{"tar/one": prose(r, 5000), "tar/two": prose(r, 500_000)},
	}
	for n := range 5 {
		layers[0][fmt.Sprintf("lib/%02d", n)] = prose(r, 30_000+1000*n)
	}
	ref, err := image.ParseRef(w.registry.Host() + "/" + s.name)
	if err != nil {
		t.Fatal(err)
	}
	if s.repo, err = image.Open(t.Context(), ref, image.Options{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.repo.Close() })
	var descriptors []image.Descriptor
	var diffIDs []string
	for n, files := range layers {
		maps.Copy(s.files, files)
		p := tarball(t, files)
		diffIDs = append(diffIDs, digest(p))
		kind := "application/vnd.oci.image.layer.v1.tar"
		switch n {
		case 0:
			kind, p = kind+"+gzip", gzipped(p)
		case 1:
			kind, p = kind+"+zstd", zstded(p)
		}
		descriptors = append(descriptors, s.push(t, kind, p))
	}
	config := s.push(t, image.MediaTypeConfig, encode(t, map[string]any{
		"os": "linux", "architecture": runtime.GOARCH, "rootfs": map[string]any{"type": "layers", "diff_ids": diffIDs},
	}))
	js := encode(t, map[string]any{"schemaVersion": 2, "mediaType": image.MediaTypeManifest, "config": config, "layers": descriptors})
	if _, err := s.repo.PushManifest(t.Context(), image.MediaTypeManifest, js, ref.Tag()); err != nil {
		t.Fatal(err)
	}
	if s.img, err = s.repo.Resolve(t.Context(), image.Platform{}); err != nil {
		t.Fatal(err)
	}
	s.made, err = reader.Make(t.Context(), reader.Job{
		Manifest: s.img.ManifestDigest, Layers: s.img.Layers, DiffIDs: diffIDs, TempDir: t.TempDir(),
		Open: func(ctx context.Context, n int) (io.ReadCloser, error) { return s.repo.Blob(ctx, s.img.Layers[n]) },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.made.Close() })
	if s.made.Side.Size == 0 {
		t.Fatal("nothing beside the layers")
	}
	if s.artifact, err = reader.Push(t.Context(), s.repo, s.img, s.made); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *small) push(t *testing.T, mediaType string, p []byte) image.Descriptor {
	t.Helper()
	d := image.Descriptor{MediaType: mediaType, Digest: digest(p), Size: int64(len(p))}
	err := s.repo.PushBlob(t.Context(), d, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(p)), nil })
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// tree is the image's index, to be changed.
func (s *small) tree(t *testing.T) *index.Tree {
	t.Helper()
	tree, _, err := artifact.Decode(s.made.Encoded, "index", index.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

func encode(t *testing.T, v any) []byte {
	t.Helper()
	js, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return js
}

func tarball(t *testing.T, files map[string][]byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(files[name])), Typeflag: tar.TypeReg})
		if err != nil {
			t.Fatal(err)
		}
		w.Write(files[name])
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func gzipped(p []byte) []byte {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	w.Write(p)
	w.Close()
	return b.Bytes()
}

// zstded has two frames.
func zstded(p []byte) []byte {
	e, err := zstd.NewWriter(nil)
	if err != nil {
		panic(err)
	}
	defer e.Close()
	n := len(p) / 3
	return e.EncodeAll(p[n:], e.EncodeAll(p[:n], nil))
}

// read reads all files below dir, at the same time, and returns those that
// failed, sorted; wrong bytes fail the test, but of those that lie.
func (s *small) read(t *testing.T, dir string, lie ...string) (failed []string) {
	t.Helper()
	var mu sync.Mutex
	var wg sync.WaitGroup
	for name, want := range s.files {
		wg.Go(func() {
			got, err := os.ReadFile(filepath.Join(dir, name))
			mu.Lock()
			defer mu.Unlock()
			switch {
			case slices.Contains(lie, name):
			case errors.Is(err, syscall.EIO):
				failed = append(failed, name)
			case err != nil:
				t.Error(err)
			case !bytes.Equal(got, want):
				t.Errorf("%s: wrong bytes", name)
			}
		})
	}
	wg.Wait()
	slices.Sort(failed)
	return failed
}

// right reads all files, which must be there.
func (s *small) right(t *testing.T, dir string) {
	t.Helper()
	if failed := s.read(t, dir); len(failed) > 0 {
		t.Errorf("cannot be read: %q", failed)
	}
}

// list is the tag of the list that the artifact is in.
func (s *small) list() string { return strings.Replace(s.img.ManifestDigest, ":", "-", 1) }

func digest(p []byte) string { return fmt.Sprintf("sha256:%x", sha256.Sum256(p)) }
