package fill

import (
	"context"

	"golang.org/x/sync/errgroup"

	"github.com/shale-image/shale/pool"
)

// Missing adds up the chunks of the image that are not on the node: how many
// there are, and the bytes stored in blobs for them.
func (im *Image) Missing() (chunks int, bytes int64) {
	for i := range im.linked.Chunks() {
		c := im.linked.Chunk(i)
		if s, at := im.address(c); s == nil || !s.pool.Present(at.off, int64(c.Size)) {
			chunks++
			bytes += int64(c.Length)
		}
	}
	return chunks, bytes
}

// ContentBytes is the size of all the image's chunks, uncompressed.
func (im *Image) ContentBytes() (n int64) {
	for i := range im.linked.Chunks() {
		n += int64(im.linked.Chunk(i).Size)
	}
	return n
}

// Complete fetches everything of the image that is not on the node yet, in
// large requests, several at once. It returns the first error, after which
// what came is kept. progress, if not nil, is told of stored bytes as they
// are asked for, from several goroutines.
func (im *Image) Complete(ctx context.Context, progress func(bytes int64)) error {
	e := im.engine
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(max(1, e.opt.Requests/2)) // leave slots for readers
	for i := 0; i < im.linked.Chunks() && gctx.Err() == nil; {
		wants, next := im.planAll(i)
		i = next
		if len(wants) == 0 {
			continue
		}
		g.Go(func() error {
			var bytes int64
			for _, w := range wants {
				bytes += int64(w.chunk.Length)
			}
			if progress != nil {
				defer progress(bytes)
			}
			e.start(im, wants)
			for _, w := range wants {
				select {
				case <-w.flight.done:
				case <-gctx.Done():
					return gctx.Err()
				}
				if w.flight.err != nil {
					return w.flight.err
				}
				if w.flight.data != nil {
					return pool.ErrNoSpace
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	// What others were fetching while we planned may have failed since.
	if n, _ := im.Missing(); n > 0 {
		for i := range im.linked.Chunks() {
			if _, err := im.need(ctx, i, im.linked.Chunk(i)); err != nil {
				return err
			}
		}
	}
	return ctx.Err()
}

// planAll claims missing chunks from i on, MaxWindow stored bytes of one blob
// at most, and says where to go on.
func (im *Image) planAll(i int) (wants []want, next int) {
	e := im.engine
	e.mu.Lock()
	defer e.mu.Unlock()
	var end, bytes int64
	for ; i < im.linked.Chunks(); i++ {
		c := im.linked.Chunk(i)
		s, at := im.address(c)
		if s == nil {
			continue
		}
		if _, busy := e.flights[at]; busy || s.pool.Present(at.off, int64(c.Size)) {
			continue
		}
		if len(wants) > 0 && (c.Blob != wants[0].chunk.Blob || c.Offset < end || c.Offset-end > maxGap ||
			bytes+int64(c.Length) > e.opt.MaxWindow) {
			break
		}
		w := want{chunk: c, segment: s, at: at, flight: &flight{done: make(chan struct{})}}
		e.flights[at] = w.flight
		wants = append(wants, w)
		end, bytes = c.Offset+int64(c.Length), bytes+int64(c.Length)
	}
	return wants, i
}
