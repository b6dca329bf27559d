package convert

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/retry"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/stream"
)

// window is how many stored bytes are read at once to be verified, unless a
// chunk alone has more.
const window = 1 << 20

// verifyChunks decodes and digests all chunks that are pushed, also those of
// files that an upper layer hides, and those of the dictionary that files use.
func (c *converter) verifyChunks(ctx context.Context) error {
	used := c.byPlace(func(n uint32, used bool) bool { return used || !c.blobs[c.tree.Chunks[n].Blob].dict })
	var total, done int64
	for _, n := range used {
		total += int64(c.tree.Chunks[n].Size)
	}
	progress := func(n int64) {
		c.o.Progress(Event{Layer: -1, What: "verify", Done: atomic.AddInt64(&done, n), Total: total})
	}
	g, ctx := errgroup.WithContext(ctx)
	runs := make(chan []uint32)
	g.Go(func() error {
		defer close(runs)
		for len(used) > 0 {
			n := c.run(used)
			select {
			case runs <- used[:n]:
			case <-ctx.Done():
				return ctx.Err()
			}
			used = used[n:]
		}
		return nil
	})
	for range min(c.o.Workers, budget/(3*max(window, int(c.o.BatchSize), int(c.o.ChunkSize)))) {
		g.Go(func() error {
			var v verifier
			for run := range runs {
				n, err := v.run(ctx, c, run)
				if err != nil {
					return err
				}
				progress(n)
			}
			return nil
		})
	}
	return g.Wait()
}

// byPlace returns chunks in order of their places: those that pick chooses, by
// whether files use them.
func (c *converter) byPlace(pick func(n uint32, used bool) bool) []uint32 {
	mark := make([]bool, len(c.tree.Chunks))
	c.tree.Walk(func(_ string, ino *index.Inode) error {
		for _, e := range ino.Extents {
			mark[e.Chunk] = true
		}
		return nil
	})
	var picked []uint32
	for n, m := range mark {
		if pick(uint32(n), m) {
			picked = append(picked, uint32(n))
		}
	}
	slices.SortFunc(picked, func(a, b uint32) int {
		return compareChunks(&c.tree.Chunks[a], &c.tree.Chunks[b])
	})
	return picked
}

// run returns how many chunks, from the first on, lie so close together that one
// read brings them all: always those that lie in one span.
func (c *converter) run(used []uint32) int {
	first := &c.tree.Chunks[used[0]]
	b := &c.tree.Blobs[first.Blob]
	for i, n := range used {
		ch := &c.tree.Chunks[n]
		if i == 0 {
			continue
		}
		if ch.Blob != first.Blob {
			return i
		}
		if b.Find(ch.Offset) == b.Find(c.tree.Chunks[used[i-1]].Offset) {
			continue
		}
		if _, n := index.Stored(b.Cover(first.Offset, ch.End()), first.Offset, ch.End()); n > window {
			return i
		}
	}
	return len(used)
}

// verifier has the memory of one worker.
type verifier struct{ stored []byte }

// run verifies chunks of one blob and returns how many bytes they have.
func (v *verifier) run(ctx context.Context, c *converter, run []uint32) (n int64, err error) {
	chunks := c.tree.Chunks
	first, last := &chunks[run[0]], &chunks[run[len(run)-1]]
	b := c.blobs[first.Blob]
	spans := c.tree.Blobs[first.Blob].Cover(first.Offset, last.End())
	off, length := index.Stored(spans, first.Offset, last.End())
	defer func() {
		if err != nil {
			err = fmt.Errorf("blob %s: %d stored bytes at offset %d: %w", b.digest, length, off, err)
		}
	}()
	if b.dict {
		src := retry.New(c.o.Dict.repo.Blobs(), retry.Policy{})
		v.stored, err = blob.ReadAll(ctx, src, blob.Ref{Digest: b.digest, Size: b.size}, off, length)
	} else {
		v.stored = grow(v.stored, int(length))
		_, err = b.ReadAt(v.stored, off)
	}
	if err != nil {
		return 0, err
	}
	r, err := stream.NewReader(bytes.NewReader(v.stored), spans, first.Offset, last.End(), nil)
	if err != nil {
		return 0, err
	}
	defer r.Close()
	for _, k := range run {
		ch := &chunks[k]
		if err := r.Skip(ch.Offset - r.Pos()); err != nil {
			return 0, err
		}
		data, err := r.Next(int(ch.Size))
		if err != nil {
			return 0, err
		}
		if err := ch.Digest.Verify(data); err != nil {
			return 0, err
		}
		n += int64(ch.Size)
	}
	return n, nil
}

func grow(b []byte, n int) []byte {
	if cap(b) < n {
		return make([]byte, n)
	}
	return b[:n]
}
