package fill

import (
	"context"
	"fmt"
	"time"

	"github.com/shale-image/shale/chunk"
)

// TryReadAt fills p from the flat address off if all of it is on the node,
// and returns false otherwise. It never waits for a network.
func (im *Image) TryReadAt(p []byte, off int64) (bool, error) {
	if ok, err := im.read(p, off); !ok || err != nil {
		return false, err
	}
	im.follow(off, off+int64(len(p)), false)
	im.noted(off, off+int64(len(p)), 0)
	im.loads.began(p, off)
	return true, nil
}

// ReadAt fills p from the flat address off, fetching what is not on the node.
// It returns an error rather than a byte that is not verified. Cancelling ctx
// gives up waiting; the fetch goes on for others.
func (im *Image) ReadAt(ctx context.Context, p []byte, off int64) error {
	if off < 0 || off+int64(len(p)) > im.Size() {
		return im.outside(p, off)
	}
	end := off + int64(len(p))
	began := time.Now()
	defer func() { im.noted(off, end, time.Since(began)) }()
	waited := false
	if l := im.landing.Load(); l != nil {
		var err error
		if waited, err = l.wait(ctx, off, end); err != nil {
			return err
		}
	}
	lo, hi := im.chunksIn(off, end)
	// What has come may have been evicted before it is read.
	for vain := 0; ; vain++ {
		waits, err := im.engine.join(im, lo, hi, off, end)
		im.follow(off, end, waited || len(waits) > 0)
		if err != nil {
			return err
		}
		if vain == 0 {
			im.stats.waited(waited, len(waits) > 0)
		}
		held, err := im.awaitAll(ctx, waits)
		if err != nil {
			return err
		}
		ok, err := im.readHeld(p, off, held)
		switch {
		case ok:
			im.loads.began(p, off)
			return nil
		case err != nil:
			return err
		case len(waits) == 0 && vain >= maxVain:
			// Not EROFS asked for this: it reads nothing but the image's files.
			return fmt.Errorf("fill: of %d bytes at flat address %d some belong to no chunk of the image", len(p), off)
		case ctx.Err() != nil:
			return fmt.Errorf("fill: what was fetched was evicted: %w", context.Cause(ctx))
		}
	}
}

// awaitAll waits for flights, and returns those whose chunks the pool had no room for.
// What is fetched for nobody yet stands back meanwhile, but not for one whose source
// hangs.
func (im *Image) awaitAll(ctx context.Context, waits []wait) (held []wait, err error) {
	if len(waits) == 0 {
		return nil, nil
	}
	e := im.engine
	e.waiting.Add(1)
	long := time.AfterFunc(slowTurn, func() { e.waiting.Add(-1) })
	defer func() {
		e.waited.Store(time.Now().UnixNano())
		if long.Stop() {
			e.waiting.Add(-1)
		}
	}()
	for _, w := range waits {
		f, err := im.await(ctx, w)
		if err != nil {
			return nil, err
		}
		if f != nil && f.data != nil {
			held = append(held, wait{w.chunk, f})
		}
	}
	return held, nil
}

// maxVain is how often a reader looks again for bytes that are not here, and that
// nobody fetches.
const maxVain = 16

// noted records a read of [off, end), of which the metadata are no part.
func (im *Image) noted(off, end int64, wait time.Duration) {
	if off = max(off, im.linked.MetaSize); off < end && im.record != nil {
		im.record.note(off, end, wait)
	}
}

// Extent returns which part of [from, to) belongs to the file that has the flat
// address off, or to the metadata if they have.
func (im *Image) Extent(off, from, to int64) (int64, int64) {
	if off < im.linked.MetaSize {
		return from, min(to, im.linked.MetaSize)
	}
	i := im.linked.Find(off)
	if i == im.linked.Chunks() || im.linked.Chunk(i).Flat > off {
		return off, off
	}
	first := i
	for first > 0 && im.linked.Chunk(first).Flat > from && im.linked.Chunk(first).Next {
		first--
	}
	from = max(from, im.linked.Chunk(first).Flat)
	for i++; i < im.linked.Chunks(); i++ {
		if c := im.linked.Chunk(i); c.Flat >= to || !c.Next {
			to = min(to, c.Flat)
			break
		}
	}
	return from, to
}

// Peek fills p from the flat address off if all of it is on the node, for the
// kernel, which may give it to a reader without asking again. So it counts as read
// along with what was asked for, as by readahead.
func (im *Image) Peek(p []byte, off int64) bool {
	ok, err := im.copy(p, off)
	if !ok || err != nil {
		return false
	}
	im.noted(off, off+int64(len(p)), 0)
	return true
}

// read is copy for a reader.
func (im *Image) read(p []byte, off int64) (ok bool, err error) {
	ok, err = im.copy(p, off)
	if ok && err == nil {
		im.stats.read(len(p))
	}
	return ok && err == nil, err
}

// copy copies what is present, and returns false if not all is.
func (im *Image) copy(p []byte, off int64) (ok bool, err error) {
	ok = true
	err = im.split(p, off, func(s *segment, q []byte, at int64) (err error) {
		switch {
		case !ok: // in vain
		case s != nil:
			ok, err = s.pool.Read(q, at)
		case at < im.linked.MetaSize:
			_, err = im.linked.Meta().ReadAt(q, at)
		default:
			clear(q) // padding between the metadata and the segments
		}
		return err
	})
	return ok && err == nil, err
}

// readHeld is read where some chunks are only in memory.
func (im *Image) readHeld(p []byte, off int64, held []wait) (ok bool, err error) {
	for _, h := range held {
		c := im.linked.Chunk(h.chunk)
		if n := c.Flat - off; n > 0 {
			if ok, err := im.read(p[:n], off); !ok || err != nil {
				return false, err
			}
			p, off = p[n:], off+n
		}
		// The rest of the chunk's last granule is nobody's, and zero.
		granules := (int64(c.Size) + chunk.Block - 1) &^ (chunk.Block - 1)
		q := p[:min(int64(len(p)), c.Flat+granules-off)]
		clear(q)
		if from := off - c.Flat; from < int64(len(h.flight.data)) {
			copy(q, h.flight.data[from:])
		}
		im.stats.read(len(q))
		p, off = p[len(q):], off+int64(len(q))
	}
	return im.read(p, off)
}

// split cuts [off, off+len(p)) at the boundaries of the metadata and the
// segments. fn gets nil and a flat address for what is in no segment, and an
// address in the segment otherwise.
func (im *Image) split(p []byte, off int64, fn func(*segment, []byte, int64) error) error {
	if off < 0 || off+int64(len(p)) > im.Size() {
		return im.outside(p, off)
	}
	for len(p) > 0 {
		var (
			n = im.linked.MetaSize - off // if positive: bytes of metadata
			s *segment
		)
		for i := range im.segments {
			x := &im.segments[i]
			if n > 0 {
				break
			}
			if off < x.Flat {
				n = x.Flat - off
			} else if off < x.Flat+x.Size {
				s, n = x, x.Flat+x.Size-off
			}
		}
		if n <= 0 {
			return fmt.Errorf("fill: flat address %d of %d: %w", off, im.Size(), ErrStale)
		}
		n = min(n, int64(len(p)))
		at := off
		if s != nil {
			at -= s.Flat
		}
		if err := fn(s, p[:n], at); err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

func (im *Image) outside(p []byte, off int64) error {
	return fmt.Errorf("fill: read of %d bytes at %d is outside the image of %d bytes", len(p), off, im.Size())
}
