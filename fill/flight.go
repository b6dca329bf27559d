package fill

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/shale-image/shale/link"
	"github.com/shale-image/shale/pool"
)

// flight is a chunk that is being fetched. After done is closed, err says
// whether that failed; data holds the bytes if the pool could not store them
// and nil otherwise.
type flight struct {
	done chan struct{}
	err  error
	data []byte

	// wanted: a reader waited for this chunk when its request was made. If it
	// did not, and the request fails, whoever waits now deserves a request of
	// its own.
	wanted bool

	// guessed: nobody may ever read it. If it cannot be had, that is nobody's failure.
	guessed bool

	owner *Image    // whose source is asked
	since time.Time // when it was claimed
	moved *movement // of its request
}

// movement is when something last came of a request, in nanoseconds since 1970.
type movement struct{ atomic.Int64 }

func (m *movement) now() { m.Store(time.Now().UnixNano()) }

// foreignWait is how long a reader waits for a chunk that another image fetches, whose
// source may hang. Then its own source is asked too; both store the same bytes.
const foreignWait = 500 * time.Millisecond

// guessedWait is how long a reader waits for a chunk that nobody waited for when it was
// asked for, with many others perhaps, while nothing comes of that request: half of
// Options.Timeout in all.
const guessedWait = 3 * time.Second

// flying returns the flight of a chunk that im should wait for, nil if there is
// none. e.mu is held.
func (im *Image) flying(at address) *flight {
	f := im.engine.flights[at]
	if f != nil && f.data == nil {
		if left, ok := f.patience(im); ok && left <= 0 {
			return nil
		}
	}
	return f
}

// patience is how much longer im waits for a flight, as it looks now; and false if as long as
// it takes.
func (f *flight) patience(im *Image) (left time.Duration, ok bool) {
	switch {
	case f.owner != nil && f.owner != im:
		return foreignWait - time.Since(f.since), true
	case f.guessed:
		left = guessedWait - time.Since(time.Unix(0, f.moved.Load()))
		return min(left, im.engine.opt.Timeout/2-time.Since(f.since)), true
	}
	return 0, false
}

// failed tells whether the end of a flight tells im that a chunk cannot be had: not if
// another image's source was asked, nor if nobody was waiting, but for who has once begun
// anew.
func (f *flight) failed(im *Image, again bool) bool {
	return f.owner == im && !f.guessed && (f.wanted || again)
}

// wait is a flight that a reader waits for, and its chunk in the reader's map.
type wait struct {
	chunk  int
	flight *flight
}

// join returns the flights of the chunks [lo, hi) of which bytes at the flat
// addresses [from, to) are not here. Those that nobody fetches yet it starts to
// fetch, with what is worth to come along.
//
// A chunk is stored before its flight leaves the table. So under e.mu it is
// either here, or in the table, or nobody fetches it. What is stored by other ways, and
// without e.mu, may come at any moment.
func (e *Engine) join(im *Image, lo, hi int, from, to int64) (waits []wait, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for i := lo; i < hi; i++ {
		c := im.linked.Chunk(i)
		s, at := im.address(c)
		if s == nil {
			return waits, fmt.Errorf("fill: chunk %s of %d bytes at flat address %d: %w", c.Digest, c.Size, c.Flat, ErrStale)
		}
		f := im.flying(at)
		if f == nil {
			first := max(0, from-c.Flat)
			if n := min(int64(c.Size), to-c.Flat) - first; n <= 0 || s.pool.Present(at.off+first, n) {
				continue
			}
			if err := im.failures.of(at); err != nil {
				return waits, err
			}
			if wants := im.plan(i, hi); len(wants) > 0 {
				e.claim(im, wants, lo, hi)
				im.start(wants)
			}
			if f = e.flights[at]; f == nil { // it has just come
				continue
			}
		}
		waits = append(waits, wait{i, f})
	}
	return waits, nil
}

// claim enters flights of im for wants, of which chunks [lo, hi) are waited for.
// e.mu is held.
func (e *Engine) claim(im *Image, wants []want, lo, hi int) {
	moved := new(movement)
	moved.now()
	for k := range wants {
		w := &wants[k]
		w.flight = &flight{
			done: make(chan struct{}), wanted: w.index >= lo && w.index < hi,
			owner: im, since: time.Now(), moved: moved,
		}
		e.flights[w.at] = w.flight
	}
}

// await returns the flight that brought a chunk, or nil if the chunk was
// already here when a second look was taken.
func (im *Image) await(ctx context.Context, w wait) (*flight, error) {
	for f, again := w.flight, false; ; {
		came, err := f.wait(ctx, im)
		switch {
		case err != nil:
			return nil, fmt.Errorf("fill: waiting for chunk %s: %w", im.linked.Chunk(w.chunk).Digest, err)
		case !came:
		case f.err == nil:
			return f, nil
		case errors.Is(f.err, errClosed) && im.ctx.Err() == nil: // another image was
		case f.err == errAgain && im.ctx.Err() == nil:
		case f.failed(im, again):
			return nil, f.err
		default:
			again = true
		}
		waits, err := im.engine.join(im, w.chunk, w.chunk+1, 0, im.Size())
		if err != nil || len(waits) == 0 {
			return nil, err
		}
		f = waits[0].flight
	}
}

// wait waits for the end of a flight, and returns false where im waits no longer.
func (f *flight) wait(ctx context.Context, im *Image) (came bool, err error) {
	for {
		select {
		case <-f.done:
			return true, nil
		default:
		}
		var hangs <-chan time.Time
		if left, ok := f.patience(im); ok {
			if left <= 0 {
				return false, nil
			}
			hangs = time.After(left)
		}
		select {
		case <-f.done:
			return true, nil
		case <-hangs:
		case <-ctx.Done():
			return false, context.Cause(ctx)
		}
	}
}

// Flights is how many chunks are on their way, or kept in memory.
func (e *Engine) Flights() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.flights)
}

// maxHeld bounds the bytes of chunks that a full pool left in memory: a reader
// that comes page by page must not fetch a chunk for each page.
const maxHeld = 16 << 20

// land ends the flight of a chunk that was stored, or could not be had (err),
// or could not be stored (data).
func (e *Engine) land(w want, data []byte, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	w.flight.data, w.flight.err = data, err
	close(w.flight.done)
	if e.flights[w.at] != w.flight {
		return // another image did not wait for it
	}
	if data == nil {
		delete(e.flights, w.at)
		return
	}
	e.held = append(e.held, w.at)
	e.heldLen += int64(len(data))
	for e.heldLen > maxHeld {
		e.release(e.held[0])
	}
}

// release forgets the data of a chunk that land kept. e.mu is held.
func (e *Engine) release(at address) {
	if i := slices.Index(e.held, at); i >= 0 {
		e.held = slices.Delete(e.held, i, i+1)
		e.heldLen -= int64(len(e.flights[at].data))
		delete(e.flights, at)
	}
}

// StoreHeld tries again to store what a full pool left in memory.
func (e *Engine) StoreHeld() {
	e.mu.Lock()
	held := slices.Clone(e.held)
	e.mu.Unlock()
	for _, at := range held {
		e.mu.Lock()
		f := e.flights[at]
		e.mu.Unlock()
		if f == nil || f.data == nil {
			continue
		}
		if s, ok := e.pool.Segment(at.segment); ok { // else nobody wants it any more
			switch err := e.store(s, at.off, f.data); {
			case errors.Is(err, pool.ErrSealed):
				continue
			case err != nil:
				return
			}
		}
		e.mu.Lock()
		if e.flights[at] == f {
			e.release(at)
		}
		e.mu.Unlock()
	}
}

// want is a chunk a request is to bring.
type want struct {
	index   int // in the map
	chunk   link.Chunk
	segment *segment
	at      address
	flight  *flight
}
