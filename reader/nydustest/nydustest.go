// Package nydustest pushes images that nydus-image made, as nydus-snapshotter packs
// them, for tests. It knows no reader.
package nydustest

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/shale-image/shale/image"
)

// Tag is what the images that Push pushes are called.
const Tag = "nydus"

// Object is an object of an image; a test may change it before it is pushed.
type Object struct {
	MediaType   string
	Data        []byte
	Annotations map[string]string
	Unlisted    bool // it is in the repository, and not in the manifest
}

// Name is what a manifest calls the object.
func (o *Object) Name() string { return fmt.Sprintf("sha256:%x", sha256.Sum256(o.Data)) }

// Zran is an image of two gzip layers, lowest first, which are unlisted; then for
// each one what tells of its chunks, and last the bootstrap.
func Zran(t testing.TB) []*Object { return zran(t, "merged", "zran", "upper") }

// Awkward is one as Zran, of a layer that has all that is hard and that nydus-image takes.
func Awkward(t testing.TB) []*Object { return zran(t, "awkward", "awkward") }

func zran(t testing.TB, boot string, layers ...string) []*Object {
	t.Helper()
	var all, metas []*Object
	for _, name := range layers {
		layer := &Object{MediaType: "application/vnd.oci.image.layer.v1.tar+gzip", Data: read(t, name+".tar.gz"), Unlisted: true}
		all = append(all, layer)
		metas = append(metas, &Object{MediaType: blobType, Data: gunzip(t, name+".inline.gz"),
			Annotations: map[string]string{blobAnnotation: "true", "containerd.io/snapshot/nydus-ref": layer.Name()}})
	}
	return append(append(all, metas...), Pack(gunzip(t, boot+".boot.gz")))
}

// Batch is an image of one blob with batches, and its bootstrap.
func Batch(t testing.TB) []*Object {
	t.Helper()
	return []*Object{
		{MediaType: blobType, Data: gunzip(t, "batch.blob.gz"), Annotations: map[string]string{blobAnnotation: "true"}},
		Pack(gunzip(t, "batch.boot.gz")),
	}
}

const (
	blobType       = "application/vnd.oci.image.layer.nydus.blob.v1"
	blobAnnotation = "containerd.io/snapshot/nydus-blob"
)

// Pack makes the layer that a bootstrap is in.
func Pack(boot []byte) *Object {
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	w := tar.NewWriter(z)
	w.WriteHeader(&tar.Header{Name: "image/", Typeflag: tar.TypeDir, Mode: 0o755})
	w.WriteHeader(&tar.Header{Name: "image/image.boot", Typeflag: tar.TypeReg, Mode: 0o444, Size: int64(len(boot))})
	w.Write(boot)
	w.Close()
	z.Close()
	return &Object{MediaType: "application/vnd.oci.image.layer.v1.tar+gzip", Data: b.Bytes(), Annotations: map[string]string{
		"containerd.io/snapshot/nydus-bootstrap": "true", "containerd.io/snapshot/nydus-fs-version": "6",
	}}
}

// Bootstrap takes the bootstrap out of its layer.
func Bootstrap(t testing.TB, objects []*Object) []byte {
	t.Helper()
	z, err := gzip.NewReader(bytes.NewReader(objects[len(objects)-1].Data))
	if err != nil {
		t.Fatal(err)
	}
	r := tar.NewReader(z)
	for {
		h, err := r.Next()
		if err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			p, err := io.ReadAll(r)
			if err != nil {
				t.Fatal(err)
			}
			return p
		}
	}
}

// Untold takes from a bootstrap of ours what its chunk table tells of batches, and
// nydus-image's does not: which a chunk is in, and what is stored of it. It returns how
// many chunks are in one.
func Untold(boot []byte) (n int) {
	const (
		ext   = 1024 + 128 // the extended super block
		entry = 80         // of the chunk table
	)
	le := binary.LittleEndian
	at, size := le.Uint64(boot[ext+24:]), le.Uint64(boot[ext+32:])
	for p := boot[at:][:size]; len(p) > 0; p = p[entry:] {
		const batch, crc = 0x8, 0x10
		if le.Uint32(p[36:])&batch == 0 {
			continue
		}
		n++
		le.PutUint32(p[36:], crc)
		clear(p[40:44])                // stored bytes
		clear(p[48:56])                // where
		le.PutUint32(p[76:], 0xdecade) // a checksum, which nobody compares
	}
	return n
}

// Push pushes an image.
func Push(t testing.TB, repo *image.Repository, objects []*Object) *image.Image {
	t.Helper()
	push := func(o *Object) image.Descriptor {
		d := image.Descriptor{MediaType: o.MediaType, Digest: o.Name(), Size: int64(len(o.Data)), Annotations: o.Annotations}
		err := repo.PushBlob(t.Context(), d, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(o.Data)), nil })
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	var layers []image.Descriptor
	var diffIDs []string
	for _, o := range objects {
		if d := push(o); !o.Unlisted {
			layers, diffIDs = append(layers, d), append(diffIDs, d.Digest)
		}
	}
	config := push(&Object{MediaType: image.MediaTypeConfig, Data: encode(t, map[string]any{
		"os": "linux", "architecture": runtime.GOARCH, "rootfs": map[string]any{"type": "layers", "diff_ids": diffIDs},
	})})
	m := encode(t, map[string]any{"schemaVersion": 2, "mediaType": image.MediaTypeManifest, "config": config, "layers": layers})
	if _, err := repo.PushManifest(t.Context(), image.MediaTypeManifest, m, Tag); err != nil {
		t.Fatal(err)
	}
	img, err := repo.Resolve(t.Context(), image.Platform{})
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// Extract unpacks the layers of Zran as tar does, and carries out the whiteouts of
// the upper one.
func Extract(t testing.TB) (dir string) {
	t.Helper()
	dir = extract(t, "zran", "upper")
	at := time.Unix(981173106, 0) // as the upper layer has it
	if err := errors.Join(os.Remove(filepath.Join(dir, "dir/f03")), os.Chtimes(filepath.Join(dir, "dir"), at, at)); err != nil {
		t.Fatal(err)
	}
	return dir
}

// ExtractAwkward unpacks the layer of Awkward as tar does.
func ExtractAwkward(t testing.TB) (dir string) { return extract(t, "awkward") }

func extract(t testing.TB, layers ...string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	for _, name := range layers {
		cmd := exec.Command("tar", "--delay-directory-restore", "--xattrs", "--xattrs-include=*", "--numeric-owner", "--exclude=.wh.*", "-xpzf", testdata(name+".tar.gz"), "-C", dir)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("tar: %v\n%s", err, out)
		}
	}
	return dir
}

// testdata is where the golden data is, from a package one or two below the module's
// root.
func testdata(name string) string {
	const dir = "../index/rafs/testdata"
	if _, err := os.Stat(dir); err != nil {
		return filepath.Join("..", dir, name)
	}
	return filepath.Join(dir, name)
}

func read(t testing.TB, name string) []byte {
	t.Helper()
	p, err := os.ReadFile(testdata(name))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func gunzip(t testing.TB, name string) []byte {
	t.Helper()
	z, err := gzip.NewReader(bytes.NewReader(read(t, name)))
	if err != nil {
		t.Fatal(err)
	}
	p, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func encode(t testing.TB, v any) []byte {
	t.Helper()
	p, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return p
}
