package fill

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"time"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/stream"
	"github.com/shale-image/shale/pool"
)

// request brings chunks that lie in one blob in ascending order.
type request struct {
	im    *Image
	wants []want // not landed yet
	timer *time.Timer
	begun time.Time
	bad   error // why the last span could not be decoded
	again bool  // a rescue takes long: it was waited for once

	body     io.Reader     // what they are decoded from
	beside   *besides      // what lies beside that
	ends     *ends         // what of them other requests bring
	fresh    bool          // nothing of that is used any more: it was wrong, perhaps, or late
	rejected bool          // a body was
	others   []blob.Source // whom to ask instead then, each once
}

// start fetches wants in the background, for a reader.
func (im *Image) start(wants []want) {
	im.requests.Go(func() {
		select {
		case im.demand <- struct{}{}:
			defer func() { <-im.demand }()
		case <-im.ctx.Done():
		}
		im.fetch(blob.WithUrgent(im.ctx), wants)
	})
}

// fetch brings wants by one request. All of their flights have landed when it
// returns, whatever happens.
func (im *Image) fetch(ctx context.Context, wants []want) {
	e := im.engine
	ctx, cancel := context.WithCancelCause(ctx)
	r := request{im: im, wants: wants, begun: time.Now(), timer: time.AfterFunc(e.opt.Timeout, func() {
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
		err = fmt.Errorf("%w: %v", context.Cause(ctx), err)
	}
}

// run asks the image's source, and then, if that has given wrong bytes, one place
// after the other for what is left.
func (r *request) run(ctx context.Context) error {
	err := r.from(ctx, r.im.source)
	for err != nil && len(r.others) > 0 && ctx.Err() == nil {
		if !errors.Is(err, errLate) {
			r.im.engine.opt.Logger.Warn("another source is asked", "err", err)
		}
		next := r.others[0]
		r.others = r.others[1:]
		err = r.from(ctx, next)
	}
	return err
}

// elsewhere tells whether to ask somebody else, or anew, because of an error. Where err is what
// is wrong with the bytes of the body, that is told to where it comes from.
func (r *request) elsewhere(err error) bool {
	late := errors.Is(err, errLate)
	if !late && !errors.Is(err, chunk.ErrCorrupt) {
		return false
	}
	if !late {
		r.im.edges.drop(r.ends)
	}
	if r.ends.used() {
		r.fresh = true
		r.others = append([]blob.Source{r.im.source}, r.others...)
		return true
	}
	// One of the two is wrong, and they may be of different places.
	others := append(blob.Reject(r.body), r.beside.reject()...)
	if r.fresh = true; !r.rejected {
		r.rejected, r.others = true, others
	}
	return len(r.others) > 0
}

// from asks a source for what is left.
func (r *request) from(ctx context.Context, source blob.Source) error {
	first, last := r.wants[0].chunk, r.wants[len(r.wants)-1].chunk
	all := r.im.linked.Stored(first)
	all.Extend(r.im.linked.Stored(last))
	spans := make([]index.Span, 0, all.Last-all.First+1)
	for i := all.First; i <= all.Last; i++ {
		s, _ := r.im.linked.Span(i)
		spans = append(spans, s)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	r.ends = r.im.ends(all.First, spans, first.Offset, last.End(), r.fresh)
	defer r.im.edges.ended(r.ends)
	off, length := all.Offset, all.Length
	if r.ends.used() {
		off, length = r.ends.missing()
	}
	wctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	r.beside = r.im.besides(wctx, source, r.ends)
	defer r.beside.close()
	r.beside.late = func() {
		if r.im.rescue.all != nil {
			cancel(errNoWindow)
		}
	}
	r.body, r.bad = nil, nil
	asked := time.Now()
	if length > 0 {
		r.im.stats.request(length)
		body, err := source.Range(ctx, r.im.blob(all.Blob), off, length)
		if err != nil {
			return err
		}
		defer body.Close()
		r.body = body
	}
	answered := time.Now()
	r.ends.use(ctx, r.body)
	n := stream.Memory(spans)
	var held int64
	memory, most := r.im.memory, int64(imageMemory)
	if r.wants[0].flight.guessed {
		memory, most = r.im.guessMemory, guessMemory
	}
	room := func(n int64) error {
		if n = min(n, most); n <= held {
			return nil
		}
		// Who waits holds nothing, or two could wait for each other.
		memory.Release(held)
		held = 0
		if err := memory.Acquire(ctx, n); err != nil {
			return err
		}
		held = n
		return nil
	}
	defer func() { memory.Release(held) }()
	if err := room(n); err != nil {
		return err
	}
	o := stream.Options{Window: r.im.engine.opt.ZstdWindow, Room: room, More: r.beside.window}
	in, err := o.NewReader(r.ends, spans, first.Offset, last.End(), nil)
	if err != nil {
		r.elsewhere(err)
		return r.noWindow(ctx, wctx, err)
	}
	defer in.Close()
	for len(r.wants) > 0 {
		if err := r.next(in); err != nil {
			return r.noWindow(ctx, wctx, err)
		}
		r.timer.Reset(r.im.engine.opt.Timeout)
	}
	if length > 0 {
		if r.ends.waited { // which tells no rate
			length = 0
		}
		r.im.worth.answered(answered.Sub(asked), length, time.Since(answered))
	}
	if r.bad == nil {
		r.ends.rest()
	}
	return nil
}

// blob returns how to ask for a blob.
func (im *Image) blob(n int) blob.Ref { return blob.Ref(im.linked.Blobs[n]) }

// noWindow makes err say so if a window did not come in time, or is refused.
func (r *request) noWindow(ctx, wctx context.Context, err error) error {
	if ctx.Err() == nil && r.beside.failed != nil && (context.Cause(wctx) == errNoWindow || errors.Is(err, blob.ErrUnauthorized)) {
		return fmt.Errorf("%w: %w", errNoWindow, err)
	}
	return err
}

// next lands one chunk. It returns an error only if that concerns the chunks
// behind it too.
func (r *request) next(in *stream.Reader) error {
	w := r.wants[0]
	if w.chunk.Offset < in.Pos() {
		r.fail(r.bad, 1)
		return nil
	}
	var data []byte
	err := in.Skip(w.chunk.Offset - in.Pos())
	if err == nil {
		data, err = in.Next(int(w.chunk.Size))
	}
	if err != nil {
		if r.elsewhere(err) {
			return err
		}
		if r.bad = err; in.Pos() <= w.chunk.Offset || in.Err() != nil {
			return err
		}
		return nil // the next call fails all that the span has
	}
	err = in.Verify(w.chunk.Digest, data)
	switch {
	case err != nil && r.elsewhere(err):
		return err
	case err != nil:
		r.fail(err, 1) // the others are none the worse
	case r.im.engine.store(w.segment.pool, w.at.off, data) != nil:
		r.land(append([]byte(nil), data...)) // it is right, wherever it lies
	default:
		r.land(nil)
	}
	return nil
}

// land ends the flight of the first chunk that is left, which was fetched.
func (r *request) land(data []byte) {
	w := r.wants[0]
	r.wants = r.wants[1:]
	w.flight.moved.now()
	r.im.stats.filled(w.chunk)
	r.im.engine.land(w, data, nil)
}

// fail ends the flights of the first n chunks that are left.
func (r *request) fail(err error, n int) {
	wants := r.wants[:n]
	r.wants = r.wants[n:]
	told := false
	for _, w := range wants {
		err := err
		if w.flight.guessed { // who waits for it by now makes a request of his own
			r.im.engine.opt.Logger.Debug("fetch failed of what nobody reads", "err", err)
			r.im.engine.land(w, nil, err)
			continue
		}
		if !r.again {
			err = r.im.rescued(w, err)
			r.again = err == errAgain
		}
		switch {
		case r.again:
			r.im.engine.land(w, nil, errAgain)
			continue
		case err == nil:
			r.im.stats.filled(w.chunk)
			r.im.engine.land(w, nil, nil)
			continue
		}
		at := r.im.linked.Stored(w.chunk)
		err = fmt.Errorf("fill: blob %s: offset %d: chunk %s: %w", r.im.linked.Blobs[at.Blob].Digest, at.Offset, w.chunk.Digest, err)
		if !told && !errors.Is(err, errClosed) {
			told = true
			r.im.stats.fail(err)
			r.im.engine.opt.Logger.Error("fetch failed", "err", err, "chunks", n)
		}
		r.im.failures.note(w.at, r.begun, err)
		r.im.engine.land(w, nil, err)
	}
}

// store puts what is verified into the pool. It says once that the pool is full, or its
// disk takes nothing any more, and when that is over.
func (e *Engine) store(s *pool.Segment, off int64, data []byte) error {
	err := s.Store(off, data)
	switch {
	case errors.Is(err, pool.ErrSealed): // there may be room for others
	case err != nil && !e.full.Swap(true):
		what := "the pool cannot be written; serving from memory"
		if errors.Is(err, pool.ErrNoSpace) {
			what = "the pool is full; serving from memory"
		}
		e.opt.Logger.Warn(what, "err", err)
	case err == nil && e.full.Load() && e.full.Swap(false):
		e.opt.Logger.Info("the pool can be written again")
	}
	return err
}
