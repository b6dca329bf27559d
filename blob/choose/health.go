package choose

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

const (
	samples = 64               // latencies that are remembered of a place
	known   = 16               // so many say what is usual
	fresh   = 30 * time.Second // after which latencies say nothing any more: it is asked again

	shortRest = time.Second // after a failure, doubled with each further one
	longRest  = 30 * time.Second
	toldRest  = time.Minute // the longest that a server may ask for
)

// Health is what is known of a place, whoever asked it for whatever: sources that ask
// the same server in the same name may share it. The zero value knows nothing. It is
// safe for concurrent use.
type Health struct {
	mu       sync.Mutex
	took     [samples]time.Duration // a ring of latencies, until the first byte may be read
	n        int                    // of all there ever were
	last     time.Time              // when the last one came
	failures int                    // one after the other
	rest     time.Time              // not asked before that, if there are others
	slow     time.Time              // an answer has dribbled then
	asked    time.Time              // not asked at all before that: it has said so
	why      error                  // the last failure
}

// answered notes that an answer took so long.
func (h *Health) answered(took time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.sample(took)
	h.failures, h.rest = 0, time.Time{}
}

// late notes that an answer would have taken longer than that.
func (h *Health) late(took time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.sample(took)
}

func (h *Health) sample(took time.Duration) {
	now := time.Now()
	if now.Sub(h.last) > fresh {
		h.n = 0
	}
	h.took[h.n%samples], h.last = took, now
	h.n++
}

// failed notes that an answer did not come, or not all of it.
func (h *Health) failed(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := time.Now()
	rest := min(shortRest<<min(h.failures, 10), longRest)
	h.failures++
	h.why = err
	var w interface{ Wait() time.Duration }
	if errors.As(err, &w) && w.Wait() > 0 {
		told := min(w.Wait(), toldRest)
		rest = max(rest, told)
		h.asked = now.Add(told)
	}
	h.rest = now.Add(rest)
}

// dribbled notes that an answer was given up because it took too long.
func (h *Health) dribbled() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.slow = time.Now()
}

// rank is 0 for good health.
func (h *Health) rank(now time.Time) (rank int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if now.Before(h.rest) {
		rank += 2
	}
	if now.Sub(h.slow) < fresh {
		rank++
	}
	return rank
}

// usual is the latency that 19 of 20 answers have kept to.
func (h *Health) usual() (time.Duration, bool) { return h.quantile(time.Now(), 95) }

func (h *Health) median(now time.Time) (time.Duration, bool) { return h.quantile(now, 50) }

func (h *Health) quantile(now time.Time, percent int) (time.Duration, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	n := min(h.n, samples)
	if n < known || now.Sub(h.last) > fresh {
		return 0, false
	}
	took := h.took
	slices.Sort(took[:n])
	return took[(n-1)*percent/100], true
}

// told returns an error as long as the place wants to be left alone.
func (h *Health) told() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if left := time.Until(h.asked); left > 0 {
		return &resting{left, h.why}
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
