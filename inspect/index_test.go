package inspect

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/reader"
)

// TestCheckIndex: of an image that is started by an index, check verifies that its chunks are
// where the index says, by the states that lie beside the layer, whatever cut it is of.
func TestCheckIndex(t *testing.T) {
	for _, cut := range []uint32{chunk.Size, chunk.Earlier} {
		t.Run(fmt.Sprint(cut), func(t *testing.T) { checkIndex(t, cut) })
	}
}

func checkIndex(t *testing.T, cut uint32) {
	data := make([]byte, 1<<20)
	rand.NewChaCha8([32]byte{4}).Read(data)
	for at := 300_000; at < len(data); at += 3000 { // blocks copy from those before
		copy(data[at:at+1000], data[at/7:])
	}
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	if err := w.WriteHeader(&tar.Header{Name: "data", Size: int64(len(data)), Mode: 0o644}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	e, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	_, repo := tocImage(t, e.EncodeAll(archive.Bytes(), nil), nil)
	img, err := repo.Resolve(t.Context(), image.Platform{OS: "linux", Architecture: "amd64"})
	if err == nil {
		err = repo.LoadConfig(t.Context(), img)
	}
	if err != nil {
		t.Fatal(err)
	}
	made, err := reader.Make(t.Context(), reader.Job{Manifest: img.ManifestDigest, Layers: img.Layers, DiffIDs: img.Config.DiffIDs, TempDir: t.TempDir(), Cut: cut,
		Open: func(ctx context.Context, n int) (io.ReadCloser, error) { return repo.Blob(ctx, img.Layers[n]) }})
	if err != nil {
		t.Fatal(err)
	}
	defer made.Close()
	if _, err := reader.Push(t.Context(), repo, img, made); err != nil {
		t.Fatal(err)
	}
	open := func() *Image {
		im, err := Open(t.Context(), repo, img, reader.Options{TempDir: t.TempDir()})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { im.Close() })
		if im.Kind != reader.Index || len(im.Tree.Blobs) != 2 || im.Tree.Blobs[0].Spans[1].Codec != chunk.ZstdBlocks {
			t.Fatalf("kind %q, %d blobs", im.Kind, len(im.Tree.Blobs))
		}
		return im
	}
	if r := check(t, open()); len(r.Defects) > 0 || r.Chunks != len(data)/int(cut) {
		t.Errorf("%+v", r)
	}
	for what, change := range map[string]func(t *index.Tree){
		"another place": func(t *index.Tree) { t.Chunks[3].Offset += 512 },
		"another state": func(t *index.Tree) {
			s := t.Blobs[0].Spans
			s[4].Window = s[3].Window
		},
		"no state": func(t *index.Tree) { t.Blobs[0].Spans[4].Window = index.Window{} },
	} {
		im := open()
		change(im.Tree)
		r := check(t, im)
		if len(r.Defects) == 0 || !strings.HasPrefix(r.Defects[0].Object, "blob sha256:") {
			t.Errorf("%s: %+v", what, r)
		}
	}
}
