package daemon

import (
	"path/filepath"
	"syscall"
	"testing"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/fill"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/link"
	"github.com/shale-image/shale/pool"
)

// A face is told of an image that is read wrong from loop devices.
func TestImageMeets(t *testing.T) {
	p, err := pool.Open(filepath.Join(t.TempDir(), "pool"))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	s := &server{pool: p}
	// The second image has a file of the first one's first chunk and its own second one.
	for _, contents := range []string{"ab", "acd"} {
		tree := &index.Tree{Root: &index.Inode{Mode: syscall.S_IFDIR | 0o755, Children: map[string]*index.Inode{}}, Blobs: make([]index.Blob, 1)}
		file := func(name string, chunks ...uint32) {
			f := &index.Inode{Mode: syscall.S_IFREG | 0o644, Size: int64(len(chunks)) * chunk.Block}
			for i, c := range chunks {
				f.Extents = append(f.Extents, index.Extent{Off: int64(i) * chunk.Block, Chunk: c})
			}
			tree.Root.Children[name] = f
		}
		for i, c := range []byte(contents) {
			data := make([]byte, chunk.Block)
			data[0] = c
			b := &tree.Blobs[0]
			at := b.Append(index.Span{Size: chunk.Block, Length: chunk.Block, Offset: int64(i) * chunk.Block})
			tree.Chunks = append(tree.Chunks, index.Chunk{Digest: chunk.Sum(chunk.BLAKE3, data), Size: chunk.Block, Offset: at})
			file(string(c), uint32(i))
		}
		meets := len(contents) == 3
		if meets {
			file("both", 0, 2)
		}
		dir := filepath.Join(t.TempDir(), "linked")
		if err := link.Link(t.Context(), tree, p, dir); err != nil {
			t.Fatal(err)
		}
		l, err := link.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		im, err := fill.New(p, fill.Options{}).Open(l, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer im.Close()
		if image, err := s.imageOf(im); err != nil || image.Meets != meets {
			t.Errorf("%q: meets %v, %v", contents, image.Meets, err)
		}
	}
}
