package inspect

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/reader"
)

func TestReport(t *testing.T) {
	b := newBuilder(chunk.BLAKE3, 4096)
	p := random(10000)
	f := b.add("f", b.file(p, nil))
	b.add("g", f)
	copied := b.file(p, func(off int) bool { return off == 0 })
	copied.Extents[0].Chunk, copied.Extents[1].Chunk = 1, 2 // the file's before
	b.add("h", copied)
	b.add("d", dir())
	im := b.image()
	im.Manifest = &image.Image{ManifestDigest: "sha256:m", Platform: image.Platform{OS: "linux", Architecture: "arm64"},
		Layers: []image.Descriptor{{MediaType: "t", Digest: b.tree.Blobs[0].Digest, Size: 3}, {Digest: "sha256:other", Size: 4}}}
	im.Kind, im.Trust, im.Metadata = reader.Index, "t", 99
	got := Inspect(im)
	want := &Report{
		Ref: "built", ManifestDigest: "sha256:m", Platform: "linux/arm64", Lazy: true, Format: "oci", LayerBytes: 7,
		Index: "index", IndexTrust: "t", IndexBytes: 99,
		Layers: []Layer{{b.tree.Blobs[0].Digest, "t", 3, "layer"}, {"sha256:other", "", 4, "layer"}},
		Blobs:  []Blob{{Digest: b.tree.Blobs[0].Digest, Size: int64(b.data.Len()), UsedChunks: 3, UsedStored: 10000, UsedBytes: 10000, ReadBytes: 4096}},
		Content: &Content{Files: 2, Directories: 2, HardLinks: 1, FileBytes: 20000, HoleBytes: 4096, References: 5, Referenced: 15904,
			Chunks: 3, Unique: 10000, Stored: 10000},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

// What has no index of use starts by its layers, if it has any, and says why.
func TestSpare(t *testing.T) {
	plain := &image.Image{Layers: []image.Descriptor{{Digest: "sha256:l", Size: 4}}}
	nydus := &image.Image{Layers: []image.Descriptor{{Annotations: map[string]string{reader.NydusBootstrap: "true"}}}}
	for _, c := range []struct {
		manifest *image.Image
		want     bool
	}{{plain, true}, {nydus, false}, {nil, false}} {
		im := &Image{Manifest: c.manifest, Damage: index.Errorf(index.ErrCorrupt, "an index", 7, "it lies")}
		if im.Spare() != c.want {
			t.Errorf("%+v: %v", c.manifest, im.Spare())
		}
		if r := Inspect(im); r.Lazy || r.Reason != "an index: at offset 7: corrupt data: it lies" {
			t.Errorf("%+v: %+v", c.manifest, r)
		}
	}
}

func TestOpenFile(t *testing.T) {
	for _, name := range goldens {
		boot, data := goldenFiles(t, name)
		im := openFile(t, boot)
		r := Inspect(im)
		if r.Format != "rafs-v6" || len(r.Blobs) != 1 || r.Blobs[0].ChunkSize != 4096 || r.Content.Files == 0 {
			t.Errorf("%s: %+v", name, r)
		}
		sums(t, im)
		// What it is called and where it lies does not matter.
		at := t.TempDir()
		moved := filepath.Join(at, "x")
		if err := os.Rename(boot, moved); err != nil {
			t.Fatal(err)
		}
		im, err := OpenFile(moved, filepath.Dir(data))
		if err != nil {
			t.Fatal(err)
		}
		sums(t, im)
		if err := im.Close(); err != nil {
			t.Error(err)
		}
	}
}
