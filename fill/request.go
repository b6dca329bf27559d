package fill

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"sync"
	"time"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/pool"
)

// request brings chunks that lie in one blob in ascending order.
type request struct {
	im    *Image
	wants []want // not landed yet
	timer *time.Timer
}

// start fetches wants in the background, for a reader.
func (im *Image) start(wants []want) {
	im.requests.Go(func() {
		select {
		case im.demand <- struct{}{}:
			defer func() { <-im.demand }()
		case <-im.ctx.Done():
		}
		im.fetch(wants)
	})
}

// fetch brings wants by one request. All of their flights have landed when it
// returns, whatever happens.
func (im *Image) fetch(wants []want) {
	e := im.engine
	ctx, cancel := context.WithCancelCause(im.ctx)
	r := request{im: im, wants: wants, timer: time.AfterFunc(e.opt.Timeout, func() {
		cancel(fmt.Errorf("nothing came for %v: %w", e.opt.Timeout, context.DeadlineExceeded))
	})}
	var err error
	defer func() {
		r.timer.Stop()
		cancel(nil)
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v", p)
			e.opt.Logger.Error("fetch panicked", "panic", p, "stack", string(debug.Stack()))
		}
		if len(r.wants) == 0 {
			return
		}
		switch {
		case im.ctx.Err() != nil:
			err = errClosed
		case err == nil:
			err = errors.New("the fetch ended early")
		}
		r.fail(err, len(r.wants))
	}()
	if err = r.run(ctx); err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
}

func (r *request) run(ctx context.Context) error {
	first, last := r.wants[0].chunk, r.wants[len(r.wants)-1].chunk
	if first.Blob >= len(r.im.linked.Blobs) {
		return fmt.Errorf("%w: blob %d of %d", chunk.ErrCorrupt, first.Blob, len(r.im.linked.Blobs))
	}
	ref := blob.Ref(r.im.linked.Blobs[first.Blob])
	pos := first.Offset
	n := last.Offset + int64(last.Length) - pos
	if pos < 0 || n <= 0 || ref.Size > 0 && n > ref.Size-pos {
		return fmt.Errorf("%w: bytes %d to %d of a blob of %d", chunk.ErrCorrupt, pos, pos+n, ref.Size)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	r.im.stats.request(n)
	asked := time.Now()
	body, err := r.im.source.Range(ctx, ref, pos, n)
	if err != nil {
		return err
	}
	defer body.Close()
	answered := time.Now()
	for len(r.wants) > 0 {
		w := r.wants[0]
		if _, err := io.CopyN(io.Discard, body, w.chunk.Offset-pos); err != nil {
			return unexpected(err)
		}
		pos = w.chunk.Offset + int64(w.chunk.Length)
		if err := r.next(ctx, body, w); err != nil {
			return err
		}
		r.timer.Reset(r.im.engine.opt.Timeout)
	}
	r.im.worth.answered(answered.Sub(asked), n, time.Since(answered))
	return nil
}

var buffers = sync.Pool{New: func() any { return new([]byte) }}

// next lands one chunk, whose stored bytes are next in body. It returns an
// error only if that concerns the chunks behind it too.
func (r *request) next(ctx context.Context, body io.Reader, w want) error {
	c := w.chunk
	if !valid(c) {
		return fmt.Errorf("%w: %d bytes stored as %d, want 1 to %d", chunk.ErrCorrupt, c.Size, c.Length, chunk.MaxSize)
	}
	n := int(c.Length) + int(c.Size)
	if err := r.im.memory.Acquire(ctx, int64(n)); err != nil {
		return err
	}
	defer r.im.memory.Release(int64(n))
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	if cap(*buf) < n {
		*buf = make([]byte, n)
	}
	stored, data := (*buf)[:c.Length:c.Length], (*buf)[c.Length:n]
	if _, err := io.ReadFull(body, stored); err != nil {
		return unexpected(err)
	}
	err := accept(w, data, stored)
	switch {
	case err == nil:
		r.land(nil)
	case errors.Is(err, pool.ErrNoSpace):
		r.im.engine.full(err)
		r.land(append([]byte(nil), data...))
	default:
		r.fail(err, 1) // the others are none the worse
	}
	return nil
}

// accept decodes a chunk into data, verifies and stores it.
func accept(w want, data, stored []byte) error {
	if err := w.chunk.Codec.Decode(data, stored); err != nil {
		return err
	}
	if err := w.chunk.Digest.Verify(data); err != nil {
		return err
	}
	return w.segment.pool.Store(w.at.off, data)
}

// land ends the flight of the first chunk that is left, which was fetched.
func (r *request) land(data []byte) {
	w := r.wants[0]
	r.wants = r.wants[1:]
	r.im.stats.filled(w.chunk)
	r.im.engine.land(w, data, nil)
}

// fail ends the flights of the first n chunks that are left.
func (r *request) fail(err error, n int) {
	wants := r.wants[:n]
	r.wants = r.wants[n:]
	for i, w := range wants {
		name := fmt.Sprint(w.chunk.Blob)
		if w.chunk.Blob < len(r.im.linked.Blobs) {
			name = r.im.linked.Blobs[w.chunk.Blob].Digest
		}
		err := fmt.Errorf("fill: blob %s: offset %d: chunk %s: %w", name, w.chunk.Offset, w.chunk.Digest, err)
		if i == 0 && !errors.Is(err, errClosed) {
			r.im.stats.fail(err)
			r.im.engine.opt.Logger.Error("fetch failed", "err", err, "chunks", n)
		}
		r.im.engine.land(w, nil, err)
	}
}

// full says once in a while that the pool is.
func (e *Engine) full(err error) {
	if now := time.Now().Unix(); e.fullSaid.Swap(now) != now {
		e.opt.Logger.Warn("the pool is full; serving from memory", "err", err)
	}
}

func unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
