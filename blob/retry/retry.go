// Package retry wraps a blob.Source so that passing faults of a network stay
// hidden: a failed request is made again, and a body that breaks off goes on
// at the byte where it stopped.
//
// Verification is not its business: bytes from different attempts are joined
// as they come.
package retry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"syscall"
	"time"

	"github.com/shale-image/shale/blob"
)

// Policy bounds how long to go on trying. The zero value means the defaults.
type Policy struct {
	Attempts int           // tries in all, the first included; default 6
	Total    time.Duration // no try begins later than this after the first one; default 1 minute
	Base     time.Duration // pause before the second try, doubled for each further one; default 100 ms
	Max      time.Duration // longest pause; default 5 s
}

func (p Policy) withDefaults() Policy {
	def := func(d *time.Duration, v time.Duration) {
		if *d <= 0 {
			*d = v
		}
	}
	if p.Attempts <= 0 {
		p.Attempts = 6
	}
	def(&p.Total, time.Minute)
	def(&p.Base, 100*time.Millisecond)
	def(&p.Max, 5*time.Second)
	return p
}

// renewal is the progress after which a body has its whole budget again: a
// long one may break often, one that dribbles may not go on for ever.
const renewal = 1 << 20

// progress is what a body must have brought for the next pause to be as short as the
// first, and the tries to be counted anew. The time is not.
const progress = 16 << 10

// maxGave bounds how many bodies of one range are remembered, to be rejected.
const maxGave = 64

// New returns a view of src that retries as the policy says. A reader's budget
// is renewed with every MiB it has delivered.
func New(src blob.Source, policy Policy) *Source {
	return &Source{src, policy.withDefaults()}
}

// Source retries requests to another source. It is safe for concurrent use.
type Source struct {
	src    blob.Source
	policy Policy
}

// Range implements blob.Source.
func (s *Source) Range(ctx context.Context, ref blob.Ref, off, n int64) (io.ReadCloser, error) {
	r := &reader{src: s, ctx: ctx, ref: ref, off: off, left: n, budget: newBudget(s.policy)}
	if err := r.open(); err != nil {
		return nil, err
	}
	return r, nil
}

type reader struct {
	src       *Source
	ctx       context.Context
	ref       blob.Ref
	body      io.ReadCloser // nil after an error
	off, left int64         // of the next byte; bytes still to give
	fresh     int64         // bytes since the budget was renewed
	got       int64         // of them, when the body broke off last
	budget    budget
	err       error           // sticky
	gave      []io.ReadCloser // the bodies that bytes came from
	counted   bool            // body is among them
}

// open makes the request for the rest of the range, as often as it takes.
func (r *reader) open() error {
	for {
		body, err := r.src.src.Range(r.ctx, r.ref, r.off, r.left)
		if err == nil {
			r.body, r.counted = body, false
			return nil
		}
		if err := r.budget.spend(r.ctx, err); err != nil {
			return err
		}
	}
}

func (r *reader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for r.err == nil && r.left > 0 {
		n, err := r.body.Read(p[:min(int64(len(p)), r.left)])
		r.off, r.left = r.off+int64(n), r.left-int64(n)
		if n > 0 && !r.counted && len(r.gave) < maxGave {
			r.gave, r.counted = append(r.gave, r.body), true
		}
		if r.fresh += int64(n); r.fresh >= renewal {
			r.fresh, r.got, r.budget = 0, 0, newBudget(r.src.policy)
		}
		if err != nil && r.left > 0 {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			r.resume(err)
		}
		if n > 0 {
			return n, nil
		}
	}
	if r.err == nil {
		r.err = io.EOF
	}
	return 0, r.err
}

func (r *reader) resume(err error) {
	r.body.Close()
	r.body = nil
	if errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, blob.ErrUnavailable) {
		err = fmt.Errorf("%w: %w", blob.ErrUnavailable, err) // it breaks off each time
	}
	if r.fresh-r.got >= progress {
		r.budget.tries = 1 // what breaks off in its middle is not pressed by going on at once
	}
	r.got = r.fresh
	if r.err = r.budget.spend(r.ctx, err); r.err == nil {
		r.err = r.open()
	}
}

func (r *reader) Close() error {
	r.left, r.err = 0, errors.New("read after close")
	if r.body == nil {
		return nil
	}
	err := r.body.Close()
	r.body = nil
	return err
}

// Reject implements blob.Rejecter. If the bytes came from several bodies, nobody
// knows whose were wrong: all of them are asked again, each alone.
func (r *reader) Reject() []blob.Source {
	var others []blob.Source
	for _, body := range r.gave {
		for _, s := range blob.Reject(body) {
			if !slices.Contains(others, s) {
				others = append(others, s)
			}
		}
	}
	for i, s := range others {
		policy := r.src.policy
		if i < len(others)-1 {
			policy.Attempts = min(policy.Attempts, 2) // there are others
		}
		others[i] = New(s, policy)
	}
	return others
}

// Do calls f until it succeeds, fails for good or has used up the policy, and
// returns its last error.
func Do(ctx context.Context, policy Policy, f func(context.Context) error) error {
	b := newBudget(policy.withDefaults())
	for {
		err := f(ctx)
		if err == nil {
			return nil
		}
		if err := b.spend(ctx, err); err != nil {
			return err
		}
	}
}

// budget is what is left of a policy.
type budget struct {
	Policy
	start time.Time
	tries int
}

func newBudget(p Policy) budget { return budget{Policy: p, start: time.Now(), tries: 1} }

// spend waits before the next try, or returns err if there is to be none.
func (b *budget) spend(ctx context.Context, err error) error {
	if b.tries >= b.Attempts || ctx.Err() != nil || !Retryable(err) {
		return err
	}
	pause := b.Max
	if shift := b.tries - 1; shift < 20 {
		pause = min(b.Base<<shift, b.Max)
	}
	pause = pause/2 + rand.N(pause/2+1) // so that those who failed together do not return together
	left := b.Total - time.Since(b.start)
	pause = min(pause, left) // the last try is made when the time is over
	var w interface{ Wait() time.Duration }
	if errors.As(err, &w) {
		pause = max(pause, w.Wait())
	}
	if left <= 0 || pause > left {
		return err
	}
	b.tries++
	t := time.NewTimer(pause)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%w, after %w", ctx.Err(), err)
	}
}

// Retryable tells whether trying again may help. What says that the object is
// missing, forbidden or shorter stays said.
func Retryable(err error) bool {
	var netErr net.Error
	switch {
	case errors.Is(err, blob.ErrNotFound), errors.Is(err, blob.ErrUnauthorized), errors.Is(err, blob.ErrRange),
		errors.Is(err, context.Canceled):
		return false
	case errors.Is(err, blob.ErrUnavailable), errors.Is(err, io.ErrUnexpectedEOF),
		errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return true
	}
	return errors.As(err, &netErr) && netErr.Timeout()
}
