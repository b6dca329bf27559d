package link

import (
	"errors"
	"path/filepath"
	"testing"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// TestTree: what was linked is read back, file by file, with all that it takes to read it.
func TestTree(t *testing.T) {
	w := newWorld(2)
	long := w.file("long", w.chunk(0, 1, chunk.Size), w.chunk(0, 2, chunk.Size), w.chunk(1, 3, 777))
	w.file("short", w.chunk(1, 4, 10))
	w.file("same", long.Extents[0].Chunk, long.Extents[0].Chunk, w.chunk(0, 5, 4096))
	w.file("shared", w.chunk(0, 6, 5000), long.Extents[1].Chunk)
	w.file("empty")
	hole := w.file("hole", w.chunk(0, 7, 100))
	hole.Extents[0].Off, hole.Size = 3*chunk.Size, 5*chunk.Size
	w.tree.Root.Children["link"] = long
	w.tree.Root.Children["dir"] = directory()
	w.tree.Blobs[0].First = 3
	im := w.link(t, openPool(t), filepath.Join(t.TempDir(), "im"))
	got, err := im.Tree()
	if err != nil {
		t.Fatal(err)
	}
	if err := index.Equal(w.tree, got); err != nil {
		t.Error(err)
	}
	if got.Root.Children["link"] != got.Root.Children["long"] {
		t.Error("a hard link is a file of its own")
	}
	if got.Blobs[0].First != 3 || got.Blobs[1].Digest != w.tree.Blobs[1].Digest {
		t.Errorf("%+v", got.Blobs)
	}
	for i := range got.Chunks {
		if err := got.CheckChunk(&got.Chunks[i]); err != nil {
			t.Error(err)
		}
	}
}

// TestTreeOfAnother: metadata that the map does not fit are refused.
func TestTreeOfAnother(t *testing.T) {
	w, other := newWorld(1), newWorld(1)
	w.file("a", w.chunk(0, 1, 100), w.chunk(0, 2, chunk.Size))
	other.file("a", other.chunk(0, 1, 100))
	im := w.link(t, openPool(t), filepath.Join(t.TempDir(), "im"))
	im.records = other.link(t, openPool(t), filepath.Join(t.TempDir(), "other")).records
	if _, err := im.Tree(); !errors.Is(err, index.ErrCorrupt) {
		t.Error(err)
	}
}
