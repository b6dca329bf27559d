package fill

import (
	"context"
	"time"
)

// The kernel may read segments itself, and ask before it does (mount/fanotify). Then
// nothing is read here: bytes only have to be in their segment.

// Here tells whether all of [off, off+n), flat addresses in one segment, is in it. It
// counts as a read if it is.
func (im *Image) Here(off, n int64) bool {
	s, at := im.segmentAt(off)
	if s == nil {
		return false
	}
	n = min(n, s.Size-at)
	if !s.pool.Present(at, n) {
		return false
	}
	s.pool.Touch(at, n)
	im.stats.read(int(n))
	im.follow(off, off+n, false)
	im.noted(off, off+n, 0)
	return true
}

// Bring returns when all that the image has in [off, off+n), flat addresses, is in its
// segment, or with an error. Cancelling ctx gives up waiting; the fetch goes on.
func (im *Image) Bring(ctx context.Context, off, n int64) error {
	end := min(off+n, im.Size())
	began := time.Now()
	waited := false
	if l := im.landing.Load(); l != nil {
		var err error
		if waited, err = l.wait(ctx, off, end); err != nil {
			return err
		}
	}
	lo, hi := im.chunksIn(off, end)
	waits, err := im.engine.join(im, lo, hi, off, end)
	if err != nil {
		return err
	}
	if len(waits) > 0 || waited { // else it is another image's
		im.follow(off, end, true)
		im.stats.waited(waited, len(waits) > 0)
		defer func() { im.noted(off, end, time.Since(began)) }()
	}
	held, err := im.awaitAll(ctx, waits)
	if err != nil {
		return err
	}
	for _, h := range held { // the pool was full
		if err := im.arrive(ctx, h); err != nil {
			return err
		}
	}
	im.loads.brought(off)
	return nil
}

func (im *Image) segmentAt(off int64) (*segment, int64) {
	for i := range im.segments {
		if s := &im.segments[i]; off >= s.Flat && off < s.Flat+s.Size {
			return s, off - s.Flat
		}
	}
	return nil, 0
}

// chunksIn returns the chunks [lo, hi) that have bytes in [off, end).
func (im *Image) chunksIn(off, end int64) (lo, hi int) {
	lo = im.linked.Find(off)
	hi = lo
	for hi < im.linked.Chunks() && im.linked.Chunk(hi).Flat < end {
		hi++
	}
	return lo, hi
}
