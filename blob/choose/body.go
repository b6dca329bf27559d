package choose

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/shale-image/shale/blob"
)

// body is a request at one place, and then its answer.
type body struct {
	io.ReadCloser
	from   *place
	ref    blob.Ref
	parent context.Context
	ctx    context.Context
	cancel context.CancelCauseFunc
	begun  time.Time
	stall  *time.Timer // nil before the first Read
	noted  bool        // that it has failed

	left   int64         // bytes still to come
	waited time.Duration // for bytes, since the pace was looked at last
	came   int64         // meanwhile
}

func newBody(parent context.Context, p *place, ref blob.Ref, n int64) *body {
	b := &body{from: p, ref: ref, parent: parent, begun: time.Now(), left: n}
	b.ctx, b.cancel = context.WithCancelCause(parent)
	return b
}

var (
	errSlow      = fmt.Errorf("%w: it is slow", blob.ErrUnavailable)
	errStalled   = fmt.Errorf("%w: nothing came for %v", blob.ErrUnavailable, stalled)
	errAbandoned = errors.New("another place was faster")
)

// open makes the request, and notes how it went.
func (b *body) open(off, n int64) error {
	r, err := b.from.Source.Range(b.ctx, b.ref, off, n)
	switch {
	case err != nil:
		b.note(err)
		b.cancel(nil)
		return err
	case context.Cause(b.ctx) == errAbandoned:
		r.Close()
		return errAbandoned
	}
	b.from.Health.answered(time.Since(b.begun))
	b.ReadCloser = r
	return nil
}

// note tells the place that the request has failed, unless nobody wanted it any more.
func (b *body) note(err error) {
	if !b.noted && b.parent.Err() == nil && context.Cause(b.ctx) != errAbandoned {
		b.noted = true
		b.from.failed(b.ref, err)
	}
}

// abandon gives the request up because another one was answered first.
func (b *body) abandon() {
	waited := time.Since(b.begun)
	switch b.cancel(errAbandoned); {
	case b.parent.Err() != nil:
	case waited >= stalled:
		b.from.failed(b.ref, errStalled)
	default:
		b.from.Health.late(waited)
	}
}

// Read breaks off a body that brings nothing if somebody else could be asked for
// the rest.
func (b *body) Read(p []byte) (int, error) {
	if b.stall == nil {
		b.stall = time.AfterFunc(stalled, func() {
			if b.others() {
				b.cancel(errStalled)
			}
		})
	} else {
		b.stall.Reset(stalled)
	}
	began := time.Now()
	n, err := b.ReadCloser.Read(p)
	b.stall.Stop()
	b.left -= int64(n)
	if err == nil && b.dribbles(time.Since(began), int64(n)) {
		b.from.Health.dribbled()
		err = fmt.Errorf("%s: blob %s: %w", b.from.Name, b.ref.Digest, errSlow)
		b.cancel(errSlow)
	}
	if err != nil && err != io.EOF {
		if b.parent.Err() == nil && context.Cause(b.ctx) == errStalled {
			err = fmt.Errorf("%s: blob %s: %w", b.from.Name, b.ref.Digest, errStalled)
		}
		b.note(err)
	}
	return n, err
}

// dribbles notes that n bytes came after a time, and tells whether the rest would take
// too long at that pace, and somebody else could be asked for it.
func (b *body) dribbles(waited time.Duration, n int64) bool {
	if b.waited += waited; b.waited < stalled {
		b.came += n
		return false
	}
	rest := float64(b.left) / float64(b.came+n+1) * float64(b.waited)
	b.waited, b.came = 0, 0
	return rest > float64(tooLong) && b.others()
}

// others tells whether another place promises as much as this one has.
func (b *body) others() bool {
	now := time.Now()
	own := b.from.rank(b.ref, now)
	for _, p := range b.from.all.places {
		if p != b.from && p.rank(b.ref, now) <= own {
			return true
		}
	}
	return false
}

// Close ends the request.
func (b *body) Close() error {
	if b.stall != nil {
		b.stall.Stop()
	}
	err := b.ReadCloser.Close()
	b.cancel(nil)
	return err
}

// Reject implements blob.Rejecter.
func (b *body) Reject() []blob.Source {
	b.from.wrong(b.ref)
	var others []blob.Source
	for _, p := range b.from.all.order(b.ref) {
		if p != b.from {
			others = append(others, p)
		}
	}
	return others
}
