package fill

import (
	"context"
	"errors"
	"testing"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/memblob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/pool"
)

// TestBring: what was brought is in the segment and right, and what could not be is
// told and is not.
func TestBring(t *testing.T) {
	n := newNode(t, Options{Unrecorded: true})
	x := n.image(mixed(chunk.Zstd, 1, 2))
	broken := errors.New("broken")
	n.setFault(func(context.Context, blob.Ref, int64, int64) *memblob.Fault { return &memblob.Fault{Err: broken} })
	c := x.linked.Chunk(3)
	if err := x.Bring(t.Context(), c.Flat, int64(c.Size)); !errors.Is(err, broken) || x.Here(c.Flat, int64(c.Size)) {
		t.Errorf("%v, want %v", err, broken)
	}
	n.setFault(nil)
	for i := range x.linked.Chunks() {
		c := x.linked.Chunk(i)
		if err := x.Bring(t.Context(), c.Flat, int64(c.Size)); err != nil {
			t.Fatal(err)
		}
		if !x.Here(c.Flat, int64(c.Size)) {
			t.Errorf("chunk %d is not here", i)
		}
		s, at := x.segmentAt(c.Flat)
		p := make([]byte, c.Size)
		if err := s.pool.ReadAt(p, at); err != nil || c.Digest.Verify(p) != nil {
			t.Errorf("chunk %d is wrong: %v", i, err)
		}
	}
	if x.Here(0, 4096) || x.Here(x.Size(), 4096) {
		t.Error("what is in no segment is here")
	}
	if err := x.Bring(t.Context(), x.Size()-1, 1<<20); err != nil { // the kernel asks for whole blocks
		t.Error(err)
	}
}

// TestBringFull: a chunk that the pool has no room for is not brought, though readers
// by other ways get it from memory.
func TestBringFull(t *testing.T) {
	n := newNode(t, Options{})
	x := n.image(mixed(chunk.Zstd, 1))
	if err := n.pool.SetQuota(1, func(int64) error { return nil }); err != nil {
		t.Fatal(err)
	}
	c := x.linked.Chunk(0)
	if err := x.Bring(t.Context(), c.Flat, int64(c.Size)); !errors.Is(err, pool.ErrNoSpace) || x.Here(c.Flat, int64(c.Size)) {
		t.Errorf("%v, want ErrNoSpace", err)
	}
	x.chunk(t, 0)
}
