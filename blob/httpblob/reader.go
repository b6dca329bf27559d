package httpblob

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/shale-image/shale/blob"
)

// reader gives left bytes of a body, no more and, silently, no less.
type reader struct {
	body      io.ReadCloser
	watch     *watchdog
	ref       blob.Ref
	off, left int64 // of the next byte; bytes still to give
	err       error // sticky
}

func (r *reader) Read(p []byte) (int, error) {
	if r.err == nil && r.left == 0 {
		r.err = io.EOF
	}
	if r.err == nil && len(p) > 0 {
		r.err = r.watch.parent.Err()
	}
	if r.err != nil || len(p) == 0 {
		return 0, r.err
	}
	r.watch.start()
	n, err := r.body.Read(p[:min(int64(len(p)), r.left)])
	r.watch.pause()
	r.off, r.left = r.off+int64(n), r.left-int64(n)
	if err != nil && r.left > 0 {
		switch err {
		case io.EOF, io.ErrUnexpectedEOF:
			err = io.ErrUnexpectedEOF
		default: // resets, HTTP/2 stream errors: the request was accepted, so trying again may help
			err = fmt.Errorf("%w: %w", blob.ErrUnavailable, err)
		}
		r.err = fmt.Errorf("blob %s: at offset %d, %d bytes missing: %w", r.ref.Digest, r.off, r.left, r.watch.explain(err))
		return n, r.err
	}
	return n, nil
}

// Close ends the request. A connection is worth more than a short rest of the
// body: what is left is read if it is at most maxDrain and comes at once.
func (r *reader) Close() error {
	if (r.err == nil || r.err == io.EOF) && r.left <= maxDrain {
		r.watch.drain()
		io.CopyN(io.Discard, r.body, r.left+1) // 1 more, to see the end of the body
	}
	r.watch.stop()
	r.left, r.err = 0, errClosed
	return r.body.Close()
}

var errClosed = errors.New("read after close")

// watchdog cancels a request that makes no progress.
type watchdog struct {
	parent context.Context
	cancel context.CancelCauseFunc
	ctx    context.Context
	timer  *time.Timer
	idle   time.Duration
}

// drainTime bounds how long Close may wait for the rest of a body: about the
// time a new connection costs.
const drainTime = 100 * time.Millisecond

func newWatchdog(parent context.Context, idle time.Duration) (*watchdog, context.Context) {
	w := &watchdog{parent: parent, idle: idle}
	w.ctx, w.cancel = context.WithCancelCause(parent)
	cause := fmt.Errorf("%w: no progress for %v", blob.ErrUnavailable, idle)
	w.timer = time.AfterFunc(idle, func() { w.cancel(cause) })
	return w, w.ctx
}

func (w *watchdog) start() { w.timer.Reset(w.idle) }
func (w *watchdog) drain() { w.timer.Reset(min(drainTime, w.idle)) }
func (w *watchdog) pause() { w.timer.Stop() }
func (w *watchdog) stop()  { w.timer.Stop(); w.cancel(context.Canceled) }

// explain says why a request failed, if that is because of the context: the
// caller's own error, or that there was no progress.
func (w *watchdog) explain(err error) error {
	if perr := w.parent.Err(); perr != nil {
		return perr
	}
	if cause := context.Cause(w.ctx); cause != nil && errors.Is(cause, blob.ErrUnavailable) {
		return cause
	}
	return err
}
