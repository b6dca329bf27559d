package fill

import (
	"bytes"
	"context"
	"errors"
	"io"
	"syscall"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/memblob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/zframe"
)

// blocks is a file in a zstd frame of small blocks, each of which copies from before it. No
// chunk begins with a block. The states are in the other blob.
func blocks(t *testing.T) *builder {
	t.Helper()
	b := newBuilder(chunk.Zstd)
	b.blob()
	b.blob()
	mib := content(1, 1<<20)
	plain := content(2, 100)
	for i := range 4 {
		plain = append(append(plain, mib[i*777:]...), content(uint64(i), 10_000)...)
	}
	e, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(4<<20))
	must(t, err)
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1))
	must(t, err)
	defer d.Close()
	b.blobs[0] = e.EncodeAll(plain, nil)
	z := zframe.New(bytes.NewReader(b.blobs[0]), d, func(zframe.Frame) error { return nil })
	z.Cut(zframe.NewCutter(1, 1, func(s index.Span, state []byte) error {
		if state != nil {
			p := e.EncodeAll(state, nil)
			s.Window = index.Window{Blob: 1, Offset: b.last(p), Length: uint32(len(p))}
		}
		b.spans[0].Append(s)
		return nil
	}))
	_, err = io.Copy(io.Discard, z)
	must(t, errors.Join(err, z.Whole()))
	ino := &index.Inode{Mode: syscall.S_IFREG | 0o644, Size: int64(len(plain) - 100)}
	for off := 100; off < len(plain); off += cut {
		p := plain[off:min(off+cut, len(plain))]
		c := index.Chunk{Digest: chunk.Sum(chunk.BLAKE3, p), Size: uint32(len(p)), Offset: int64(off)}
		ino.Extents = append(ino.Extents, index.Extent{Off: int64(off - 100), Chunk: uint32(len(b.tree.Chunks))})
		b.tree.Chunks, b.data[c.Digest] = append(b.tree.Chunks, c), p
	}
	b.tree.Root.Children["f"] = ino
	return b
}

// TestBlocks: parts of a zstd frame come with their states, and no more than a request may
// bring of both.
func TestBlocks(t *testing.T) {
	n := newNode(t, Options{Window: 256 * kib, Growth: 1})
	b := blocks(t)
	x := n.image(b)
	if len(b.blobs[1]) < 1<<20 || len(b.blobs[1]) < len(b.blobs[0])/2 {
		t.Fatalf("states of %d bytes, %d are stored: no test", len(b.blobs[1]), len(b.blobs[0]))
	}
	must(t, x.chunk(t, x.linked.Chunks()/2))
	x.settle()
	var came [2]int64
	for _, a := range n.asked() {
		for i := range came {
			if a.blob == b.tree.Blobs[i].Digest {
				came[i] += a.n
			}
		}
	}
	if all := came[0] + came[1]; came[1] == 0 || all > (256+128+256)*kib { // and what one chunk takes
		t.Errorf("%d bytes and states of %d came for a chunk", came[0], came[1])
	}
	x.all(t)
}

// TestWholeBlocks: a blob whose spans need states comes by one request, and they by another.
func TestWholeBlocks(t *testing.T) {
	n := newNode(t, Options{})
	b := blocks(t)
	x := n.image(b)
	must(t, x.Whole(t.Context(), func(int64) {}))
	var states, stored []asked
	for _, a := range n.asked() {
		if a.blob == b.tree.Blobs[1].Digest {
			states = append(states, a)
		} else {
			stored = append(stored, a)
		}
	}
	if len(stored) != 1 || len(states) != 1 {
		t.Errorf("asked %v, and for states %v", stored, states)
	}
	if m := x.Missing(); m.Chunks > 0 {
		t.Errorf("%d chunks are missing", m.Chunks)
	}
	x.all(t)
	if asked := n.asked(); len(asked) > 0 {
		t.Errorf("asked %v", asked)
	}
}

// TestWholeBlocksFails: that states cannot be had says so, and is no damage.
func TestWholeBlocksFails(t *testing.T) {
	n := newNode(t, Options{})
	b := blocks(t)
	x := n.image(b)
	n.setFault(func(_ context.Context, ref blob.Ref, _, _ int64) *memblob.Fault {
		if ref.Digest == b.tree.Blobs[1].Digest {
			return &memblob.Fault{After: -1, Err: blob.ErrNotFound}
		}
		return nil
	})
	if err := x.Whole(t.Context(), func(int64) {}); !errors.Is(err, blob.ErrNotFound) || errors.Is(err, chunk.ErrCorrupt) {
		t.Errorf("%v", err)
	}
	n.setFault(nil)
	must(t, x.Whole(t.Context(), func(int64) {}))
	x.all(t)
}
