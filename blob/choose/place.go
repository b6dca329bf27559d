package choose

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"github.com/shale-image/shale/blob"
)

const (
	samples = 64               // latencies that are remembered of a place
	known   = 16               // so many say what is usual
	fresh   = 30 * time.Second // after which latencies say nothing any more: it is asked again

	shortRest = time.Second // after a failure, doubled with each further one
	longRest  = 30 * time.Second
	toldRest  = time.Minute // the longest that a server may ask for

	lackTime  = time.Minute      // for which a place is thought not to have an object
	wrongTime = 10 * time.Minute // for which one is that gave wrong bytes of it
	maxBad    = 1024
)

// place is one place, and what is known of it. It is also the Source that asks
// only there.
type place struct {
	Place
	all *Source

	mu       sync.Mutex
	took     [samples]time.Duration // a ring of latencies, until the first byte may be read
	n        int                    // of all there ever were
	last     time.Time              // when the last one came
	failures int                    // one after the other
	rest     time.Time              // not asked before that, if there are others
	slow     time.Time              // an answer has dribbled then
	lied     time.Time              // it has given wrong bytes then; zero: never
	asked    time.Time              // not asked at all before that: it has said so
	why      error                  // the last failure
	bad      map[string]time.Time   // by digest: objects it has not, or not right
}

// Range implements blob.Source: nobody else is asked.
func (p *place) Range(ctx context.Context, ref blob.Ref, off, n int64) (io.ReadCloser, error) {
	return p.all.ask(ctx, []*place{p}, ref, off, n)
}

// answered notes that an answer took so long.
func (p *place) answered(took time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.sample(took)
	p.failures, p.rest = 0, time.Time{}
}

// late notes that an answer would have taken longer than that.
func (p *place) late(took time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.sample(took)
}

func (p *place) sample(took time.Duration) {
	now := time.Now()
	if now.Sub(p.last) > fresh {
		p.n = 0
	}
	p.took[p.n%samples], p.last = took, now
	p.n++
}

// failed notes what came instead of an object, or of the rest of it.
func (p *place) failed(ref blob.Ref, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if errors.Is(err, blob.ErrNotFound) || errors.Is(err, blob.ErrRange) {
		p.mark(ref, lackTime)
		return
	}
	now := time.Now()
	rest := min(shortRest<<min(p.failures, 10), longRest)
	p.failures++
	p.why = err
	var w interface{ Wait() time.Duration }
	if errors.As(err, &w) && w.Wait() > 0 {
		told := min(w.Wait(), toldRest)
		rest = max(rest, told)
		p.asked = now.Add(told)
	}
	p.rest = now.Add(rest)
}

// dribbled notes that an answer was given up because it took too long.
func (p *place) dribbled() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.slow = time.Now()
}

// mark remembers that an object is not here. The lock is held.
func (p *place) mark(ref blob.Ref, d time.Duration) {
	if p.bad == nil || len(p.bad) >= maxBad {
		p.bad = map[string]time.Time{}
	}
	p.bad[ref.Digest] = time.Now().Add(d)
}

// wrong notes that an object was not right here. So others may not be.
func (p *place) wrong(ref blob.Ref) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lied = time.Now()
	p.mark(ref, wrongTime)
}

// rank is 0 for a place in good health, and more the less it promises.
func (p *place) rank(ref blob.Ref, now time.Time) (rank int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if now.Before(p.bad[ref.Digest]) {
		rank += 4
	}
	if now.Before(p.rest) {
		rank += 2
	}
	if now.Sub(p.slow) < fresh {
		rank++
	}
	if now.Sub(p.lied) < wrongTime {
		rank++
	}
	return rank
}

// usual is the latency that 19 of 20 answers have kept to.
func (p *place) usual() (time.Duration, bool) { return p.quantile(time.Now(), 95) }

func (p *place) median(now time.Time) (time.Duration, bool) { return p.quantile(now, 50) }

func (p *place) quantile(now time.Time, percent int) (time.Duration, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := min(p.n, samples)
	if n < known || now.Sub(p.last) > fresh {
		return 0, false
	}
	took := p.took
	slices.Sort(took[:n])
	return took[(n-1)*percent/100], true
}

// told returns an error as long as the place wants to be left alone.
func (p *place) told() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if left := time.Until(p.asked); left > 0 {
		return &resting{left, p.why}
	}
	return nil
}

// resting is the error of a request that was not made, because the answer to an
// earlier one was to come back later.
type resting struct {
	left time.Duration
	why  error
}

func (e *resting) Error() string {
	return fmt.Sprintf("not asked again for %v: %v", e.left.Round(time.Millisecond), e.why)
}
func (e *resting) Unwrap() error       { return e.why }
func (e *resting) Wait() time.Duration { return e.left }
