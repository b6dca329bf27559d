package fill

import (
	"errors"
	"sync"
	"time"

	"github.com/shale-image/shale/chunk"
)

// A read that waited in vain is followed at once by another of part of the same: the
// kernel asks for the first page alone where its readahead has failed. The second
// would take as long again. So a failure that took its time stands for a moment.
const (
	slowFailure   = time.Second
	failureStands = 50 * time.Millisecond
	maxFailures   = 1024 // that are remembered
)

// failures are those of an image's chunks that stand. The zero value has none.
type failures struct {
	mu  sync.Mutex
	all map[address]failure
}

type failure struct {
	err   error
	until time.Time
}

// note remembers that what was begun at a time to bring a chunk has failed now.
func (f *failures) note(at address, begun time.Time, err error) {
	now := time.Now()
	if now.Sub(begun) < slowFailure || errors.Is(err, errClosed) || errors.Is(err, chunk.ErrCorrupt) {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.all == nil || len(f.all) >= maxFailures {
		f.all = map[address]failure{}
	}
	f.all[at] = failure{err, now.Add(failureStands)}
}

// of returns the failure that stands for a chunk.
func (f *failures) of(at address) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	x, ok := f.all[at]
	if !ok {
		return nil
	}
	if time.Now().After(x.until) {
		delete(f.all, at)
		return nil
	}
	return x.err
}
