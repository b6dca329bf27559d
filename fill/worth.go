package fill

import (
	"sync"
	"time"
)

// worth estimates how many bytes pass an image's link in the time that a
// request takes to be answered. That is what a request saved is worth, and so
// how much may be fetched in vain for it. The zero value knows nothing yet.
type worth struct {
	mu   sync.Mutex
	wait time.Duration // until the first byte; near the least seen lately
	rate float64       // bytes a second; near the most seen lately
}

// rated is how long an answer must be to tell a rate.
const rated = 64 << 10

// answered notes that a request was answered after wait, and n bytes came in
// the time that followed.
func (w *worth) answered(wait time.Duration, n int64, took time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.wait == 0 || wait < w.wait {
		w.wait = wait
	} else {
		w.wait += (wait - w.wait) / 8
	}
	if n < rated || took <= 0 {
		return
	}
	if rate := float64(n) / took.Seconds(); rate > w.rate {
		w.rate = rate
	} else {
		w.rate += (rate - w.rate) / 8
	}
}

// bytes is the estimate, 0 if there is none.
func (w *worth) bytes() float64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.rate * w.wait.Seconds()
}
