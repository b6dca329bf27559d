package fill

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/link"
	"github.com/shale-image/shale/pool"
)

// maxGap is how many bytes that nobody wants a request may pass over to reach
// bytes that somebody does: over gaps of up to 64 KiB merging costs 13% more
// bytes and saves a round trip each.
const maxGap = 64 << 10

// want is a chunk a request is to bring.
type want struct {
	chunk   link.Chunk
	segment *segment
	at      address
	flight  *flight
}

// stream is a reader that went through a file in sequence up to a chunk.
type stream struct {
	next   int // the chunk it would read next
	window int64
}

// join returns the flight that brings chunk i, which lies at the given
// address. If there is none it starts one, together with neighbours worth
// having, and says so with true.
func (e *Engine) join(im *Image, i int, at address) (*flight, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if f, ok := e.flights[at]; ok {
		return f, false
	}
	s, _ := im.address(im.linked.Chunk(i))
	if c := im.linked.Chunk(i); s.pool.Present(at.off, int64(c.Size)) {
		// It landed between the caller's look and ours.
		f := &flight{done: make(chan struct{})}
		close(f.done)
		return f, false
	}
	wants := im.plan(i, im.window(i))
	for k := range wants {
		wants[k].flight = &flight{done: make(chan struct{})}
		e.flights[wants[k].at] = wants[k].flight
	}
	im.advance(i, i+len(wants), wants)
	e.start(im, wants)
	return wants[0].flight, true
}

// start fetches wants in the background.
func (e *Engine) start(im *Image, wants []want) {
	im.wg.Go(func() {
		e.slots <- struct{}{}
		defer func() { <-e.slots }()
		ctx, cancel := context.WithTimeout(context.Background(), e.opt.Timeout)
		defer cancel()
		e.fetch(ctx, im, wants)
	})
}

// plan lists chunk i and those behind it that one request should bring:
// chunks of the same file up to window stored bytes, then up to Neighbours
// bytes of the files that follow. e.mu is held.
func (im *Image) plan(i int, window int64) []want {
	var (
		e     = im.engine
		wants []want
		own   = true // still in the file that was read
		end   int64  // of what is wanted so far, in the blob
		limit = window
		bytes int64
	)
	for n := im.linked.Chunks(); i < n; i++ {
		c := im.linked.Chunk(i)
		s, at := im.address(c)
		if s == nil {
			break
		}
		if len(wants) > 0 {
			first := wants[0].chunk
			if own && !c.Next {
				own = false
				limit = min(window, bytes+e.opt.Neighbours)
			}
			if c.Blob != first.Blob || c.Offset < end || c.Offset-end > maxGap || bytes+int64(c.Length) > limit {
				break
			}
			if _, busy := e.flights[at]; busy || s.pool.Present(at.off, int64(c.Size)) {
				continue // a gap, perhaps
			}
		}
		wants = append(wants, want{chunk: c, segment: s, at: at})
		end = c.Offset + int64(c.Length)
		bytes += int64(c.Length)
	}
	return wants
}

// window is how much to ask for at chunk i: more each time the reader comes
// back for exactly what would have been next.
func (im *Image) window(i int) int64 {
	im.mu.Lock()
	defer im.mu.Unlock()
	for _, s := range im.streams {
		if s.window > 0 && s.next == i {
			return min(2*s.window, im.engine.opt.MaxWindow)
		}
	}
	return im.engine.opt.Window
}

// advance remembers that the reader of chunk i has everything before next.
func (im *Image) advance(i, next int, wants []want) {
	var bytes int64
	for _, w := range wants {
		bytes += int64(w.chunk.Length)
	}
	im.mu.Lock()
	defer im.mu.Unlock()
	for k := range im.streams {
		if s := &im.streams[k]; s.window > 0 && s.next == i {
			*s = stream{next: next, window: min(2*s.window, im.engine.opt.MaxWindow)}
			return
		}
	}
	im.streams[im.nextSlot] = stream{next: next, window: im.engine.opt.Window}
	im.nextSlot = (im.nextSlot + 1) % len(im.streams)
}

var stored = sync.Pool{New: func() any { return new([]byte) }}

// fetch brings wants, which lie in one blob in ascending order, by one
// request, and lands each flight as soon as its bytes are here.
func (e *Engine) fetch(ctx context.Context, im *Image, wants []want) {
	first, last := wants[0].chunk, wants[len(wants)-1].chunk
	if first.Blob >= len(im.linked.Blobs) {
		e.fail(im, wants, fmt.Errorf("fill: %w: chunk %s lies in blob %d of %d", chunk.ErrCorrupt, first.Digest, first.Blob, len(im.linked.Blobs)))
		return
	}
	ref := blob.Ref(im.linked.Blobs[first.Blob])
	pos := first.Offset
	n := last.Offset + int64(last.Length) - pos
	im.stats.request(n)
	r, err := im.source.Range(ctx, ref, pos, n)
	if err != nil {
		e.fail(im, wants, fmt.Errorf("fetch %d bytes at %d: %w", n, pos, err))
		return
	}
	defer r.Close()
	buf := stored.Get().(*[]byte)
	defer stored.Put(buf)
	for k, w := range wants {
		if _, err := io.CopyN(io.Discard, r, w.chunk.Offset-pos); err != nil {
			e.fail(im, wants[k:], fmt.Errorf("blob %s: at offset %d: %w", ref.Digest, pos, unexpected(err)))
			return
		}
		if cap(*buf) < int(w.chunk.Length) {
			*buf = make([]byte, w.chunk.Length)
		}
		b := (*buf)[:w.chunk.Length]
		if _, err := io.ReadFull(r, b); err != nil {
			e.fail(im, wants[k:], fmt.Errorf("blob %s: at offset %d: %w", ref.Digest, w.chunk.Offset, unexpected(err)))
			return
		}
		pos = w.chunk.Offset + int64(w.chunk.Length)
		data, err := e.accept(w, b)
		if err != nil {
			err = fmt.Errorf("blob %s: chunk of %d bytes at offset %d: %w", ref.Digest, w.chunk.Length, w.chunk.Offset, err)
			e.fail(im, wants[k:k+1], err)
			continue // the others are none the worse
		}
		im.stats.filled(w.chunk)
		e.land(w, data, nil)
	}
}

// accept decodes and verifies a chunk and stores it. If the pool has no room
// it returns the bytes instead.
func (e *Engine) accept(w want, b []byte) ([]byte, error) {
	if w.chunk.Size == 0 || w.chunk.Size > chunk.MaxSize {
		return nil, fmt.Errorf("%w: size %d, want 1 to %d", chunk.ErrCorrupt, w.chunk.Size, chunk.MaxSize)
	}
	data := make([]byte, w.chunk.Size)
	if err := w.chunk.Codec.Decode(data, b); err != nil {
		return nil, err
	}
	if err := w.chunk.Digest.Verify(data); err != nil {
		return nil, err
	}
	switch err := w.segment.pool.Store(w.at.off, data); {
	case errors.Is(err, pool.ErrNoSpace):
		e.opt.Logger.Warn("the pool is full; serving from memory", "err", err)
		return data, nil
	case err != nil:
		return nil, err
	}
	return nil, nil
}

func (e *Engine) land(w want, data []byte, err error) {
	e.mu.Lock()
	delete(e.flights, w.at)
	e.mu.Unlock()
	w.flight.data, w.flight.err = data, err
	close(w.flight.done)
}

func (e *Engine) fail(im *Image, wants []want, err error) {
	im.stats.fail(err)
	e.opt.Logger.Error("fetch failed", "err", err)
	for _, w := range wants {
		e.land(w, nil, err)
	}
}

func unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
