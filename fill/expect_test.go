package fill

import (
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"syscall"
	"testing"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/link"
)

// TestFileChunks: a part of a file is found as by going through all of its chunks.
func TestFileChunks(t *testing.T) {
	b := newBuilder(chunk.None)
	b.blob()
	b.files(cut, 5*cut+100, 100, 9*cut, 3*cut)
	x := newNode(t, Options{}).image(b)
	m := x.linked
	for first := range m.Chunks() {
		if m.Chunk(first).Next {
			continue
		}
		f := x.file(m.Chunk(first).Flat)
		for range 2000 {
			off, n := rand.Int64N(10*cut), 1+rand.Int64N(4*cut)
			var from, to int
			end := f.flat
			for i := first; i < m.Chunks() && (i == first || m.Chunk(i).Next) && m.Chunk(i).Flat < f.flat+off+n; i++ {
				c := m.Chunk(i)
				if end = c.Flat + int64(c.Size); end <= f.flat+off {
					from = i + 1
				} else if to == 0 {
					from = i
				}
				to = i + 1
			}
			if end = min(end, f.flat+off+n); end <= f.flat+off {
				from, to, end = 0, 0, f.flat
			}
			if lo, hi, e := f.chunks(off, n); lo != from && e > f.flat || hi != to || e != end {
				t.Fatalf("file at %d: %d bytes at %d are chunks %d to %d and end at %d, want %d to %d and %d", f.flat, n, off, lo, hi, e, from, to, end)
			}
		}
	}
}

// TestFileLarge: a file of very many chunks is looked into up to a bound.
func TestFileLarge(t *testing.T) {
	b := newBuilder(chunk.None)
	b.blob()
	b.files(4096)
	ino := &index.Inode{Mode: syscall.S_IFREG | 0o644, Size: 4096 * (maxFile + 10)}
	for i := range maxFile + 10 { // nobody reads them
		ino.Extents = append(ino.Extents, index.Extent{Off: 4096 * int64(i), Chunk: uint32(len(b.tree.Chunks))})
		c := index.Chunk{Digest: chunk.Sum(chunk.BLAKE3, binary.LittleEndian.AppendUint64(nil, uint64(i))), Size: 4096}
		b.tree.Chunks = append(b.tree.Chunks, c)
	}
	b.tree.Root.Children["large"] = ino
	n := newNode(t, Options{})
	l, err := link.Open(n.link(b))
	must(t, err)
	x, err := n.engine.Open(l, n.source)
	must(t, err)
	defer x.Close()
	for i := range x.linked.Chunks() {
		if c := x.linked.Chunk(i); !c.Next {
			if f := x.file(c.Flat); f.last-f.first != 1 && f.last-f.first != maxFile {
				t.Errorf("%d chunks of a file", f.last-f.first)
			}
		}
	}
}

// TestFileClosed: no file is looked into any more when the image ends, although it is here.
func TestFileClosed(t *testing.T) {
	b := newBuilder(chunk.None)
	b.blob()
	b.files(cut)
	x := newNode(t, Options{}).image(b)
	must(t, x.chunk(t, 0))
	f := x.file(x.linked.Chunk(0).Flat)
	x.cancel()
	if n, err := f.ReadAt(make([]byte, 10), 0); !errors.Is(err, context.Canceled) {
		t.Errorf("%d bytes, %v", n, err)
	}
}
