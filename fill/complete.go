package fill

import (
	"context"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/link"
)

// Missing is what of an image is not on the node.
type Missing struct {
	Chunks  int
	Content int64 // bytes of these chunks
	Stored  int64 // bytes in blobs that must be fetched for them
}

// Missing adds up what is not on the node.
func (im *Image) Missing() (m Missing) {
	var last link.Stored
	for i := range im.linked.Chunks() {
		c := im.linked.Chunk(i)
		if s, at := im.address(c); s != nil && s.present(at, c) {
			continue
		}
		m.Chunks++
		m.Content += int64(c.Size)
		if m.Chunks > 1 && c.Blob == last.Blob && last.Has(c) {
			continue
		}
		all := im.linked.Stored(c)
		m.Stored += all.Length
		if m.Chunks > 1 && all.Blob == last.Blob && all.First == last.Last { // a span in both
			s, _ := im.linked.Span(all.First)
			if s.Codec != chunk.None {
				m.Stored -= s.Length
			}
		}
		last = all
	}
	return m
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
// what came is kept. When ctx ends it returns at once; the requests under way
// go on. progress, if not nil, is told of bytes of content as they arrive, from
// several goroutines.
func (im *Image) Complete(ctx context.Context, progress func(bytes int64)) error {
	var (
		e       = im.engine
		mu      sync.Mutex
		next    int
		g, gctx = errgroup.WithContext(ctx)
	)
	for range completeRequests {
		g.Go(func() error {
			for gctx.Err() == nil {
				mu.Lock()
				// What is claimed is asked for at once: a reader who joins it
				// does not wait in our queue.
				wants, to := im.background(next, im.linked.FlatSize, completeRequest)
				next = to
				mu.Unlock()
				if len(wants) == 0 {
					break
				}
				im.requests.Go(func() { im.fetch(im.ctx, wants) })
				for _, w := range wants {
					if err := im.arrive(gctx, wait{w.index, w.flight}); err != nil {
						return err
					}
					if progress != nil {
						progress(int64(w.chunk.Size))
					}
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	// What others were fetching meanwhile.
	for i := range im.linked.Chunks() {
		waits, err := e.join(im, i, i+1, 0, im.Size())
		if err != nil {
			return err
		}
		for _, w := range waits {
			if err := im.arrive(ctx, w); err != nil {
				return err
			}
		}
	}
	return ctx.Err()
}

// arrive returns when a chunk is in the pool.
func (im *Image) arrive(ctx context.Context, w wait) error {
	f, err := im.await(ctx, w)
	if err != nil || f == nil || f.data == nil {
		return err
	}
	// The pool was full. Perhaps it no longer is.
	s, at := im.address(im.linked.Chunk(w.chunk))
	if err := im.engine.store(s.pool, at.off, f.data); err != nil {
		return err
	}
	im.engine.mu.Lock()
	defer im.engine.mu.Unlock()
	im.engine.release(at)
	return nil
}
