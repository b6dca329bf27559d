package link

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/pool"
)

// world makes trees whose chunks' content is known.
type world struct {
	tree    *index.Tree
	content map[chunk.Digest][]byte
	end     []int64 // of each blob
	rnd     *rand.Rand
}

func newWorld(blobs int) *world {
	w := &world{
		tree:    &index.Tree{Root: directory()},
		content: map[chunk.Digest][]byte{}, end: make([]int64, blobs), rnd: rand.New(rand.NewPCG(3, 4)),
	}
	for i := range blobs {
		w.tree.Blobs = append(w.tree.Blobs, index.Blob{Digest: fmt.Sprintf("sha256:%064x", i)})
	}
	return w
}

func directory() *index.Inode {
	return &index.Inode{Mode: syscall.S_IFDIR | 0o755, Children: map[string]*index.Inode{}}
}

// chunk adds a chunk with content that seed decides, behind what its blob has.
func (w *world) chunk(blob uint32, seed uint64, size int) uint32 {
	b := make([]byte, size)
	r := rand.NewPCG(seed, uint64(size))
	for i := range b {
		b[i] = byte(r.Uint64())
	}
	d := chunk.Sum(chunk.BLAKE3, b)
	w.content[d] = b
	stored := int64(size/2 + 1)
	start := w.tree.Blobs[blob].Append(index.Span{Size: int64(size), Codec: chunk.Zstd, Length: stored, Offset: w.end[blob]})
	w.tree.Chunks = append(w.tree.Chunks, index.Chunk{Digest: d, Size: uint32(size), Blob: blob, Offset: start})
	w.end[blob] += stored
	return uint32(len(w.tree.Chunks) - 1)
}

// file adds a file of these chunks, one behind the other at multiples of 64 KiB.
func (w *world) file(name string, chunks ...uint32) *index.Inode {
	f := &index.Inode{Mode: syscall.S_IFREG | 0o644}
	for i, c := range chunks {
		off := int64(i) * chunk.Size
		f.Extents = append(f.Extents, index.Extent{Off: off, Chunk: c})
		f.Size = off + int64(w.tree.Chunks[c].Size)
	}
	w.tree.Root.Children[name] = f
	return f
}

// bytes is what a file of the tree must read as.
func (w *world) bytes(f *index.Inode) []byte {
	b := make([]byte, f.Size)
	for _, e := range f.Extents {
		copy(b[e.Off:], w.content[w.tree.Chunks[e.Chunk].Digest])
	}
	return b
}

func openPool(t testing.TB) *pool.Pool {
	t.Helper()
	p, err := pool.Open(filepath.Join(t.TempDir(), "pool"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

func (w *world) link(t testing.TB, p *pool.Pool, dir string) *Image {
	t.Helper()
	if err := Link(t.Context(), w.tree, p, dir); err != nil {
		t.Fatal(err)
	}
	im, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { im.Close() })
	if err := im.Verify(); err != nil {
		t.Fatal(err)
	}
	return im
}

// fill stores all chunks of an image at their addresses.
func (w *world) fill(t testing.TB, p *pool.Pool, im *Image) {
	t.Helper()
	for i := range im.Chunks() {
		c := im.Chunk(i)
		s, off := find(t, p, im, c)
		if err := s.Store(off, w.content[c.Digest]); err != nil {
			t.Fatal(err)
		}
	}
}

// find returns where a chunk of an image lies in the pool.
func find(t testing.TB, p *pool.Pool, im *Image, c Chunk) (*pool.Segment, int64) {
	t.Helper()
	for _, s := range im.Segments {
		if c.Flat >= s.Flat && c.Flat < s.Flat+s.Size {
			ps, ok := p.Segment(s.ID)
			if !ok || ps.Size != s.Size {
				t.Fatalf("segment %08x is not in the pool", s.ID)
			}
			return ps, c.Flat - s.Flat
		}
	}
	t.Fatalf("flat address %d is in no segment", c.Flat)
	return nil, 0
}

// flatten writes the flat address space of an image to a file.
func flatten(t testing.TB, p *pool.Pool, im *Image) string {
	t.Helper()
	b := make([]byte, im.FlatSize)
	if _, err := im.Meta().ReadAt(b[:im.MetaSize], 0); err != nil {
		t.Fatal(err)
	}
	for _, s := range im.Segments {
		ps, _ := p.Segment(s.ID)
		if err := ps.ReadAt(b[s.Flat:s.Flat+s.Size], 0); err != nil {
			t.Fatal(err)
		}
	}
	name := filepath.Join(t.TempDir(), "flat")
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

func flags(im *Image) (next []bool) {
	for i := range im.Chunks() {
		next = append(next, im.Chunk(i).Next)
	}
	return next
}
