package choose

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	"github.com/shale-image/shale/blob"
)

const (
	lackTime  = time.Minute      // for which a place is thought not to have an object
	wrongTime = 10 * time.Minute // for which one is that gave wrong bytes of it
	maxBad    = 1024
)

// place is one place, as one Source sees it. It is also the Source that asks only
// there.
type place struct {
	Place
	all *Source

	mu   sync.Mutex
	lied time.Time            // it has given us wrong bytes then; zero: never
	bad  map[string]time.Time // by digest: objects it has not for us, or not right
}

// Range implements blob.Source: nobody else is asked.
func (p *place) Range(ctx context.Context, ref blob.Ref, off, n int64) (io.ReadCloser, error) {
	return p.all.ask(ctx, []*place{p}, ref, off, n)
}

// failed notes what came instead of an object, or of the rest of it.
func (p *place) failed(ref blob.Ref, err error) {
	if errors.Is(err, blob.ErrNotFound) || errors.Is(err, blob.ErrRange) || errors.Is(err, blob.ErrUnauthorized) {
		p.mark(ref, lackTime) // which says nothing of others' objects, and credentials
		return
	}
	p.Health.failed(err)
}

// mark remembers that an object is not here.
func (p *place) mark(ref blob.Ref, d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.bad == nil || len(p.bad) >= maxBad {
		p.bad = map[string]time.Time{}
	}
	p.bad[ref.Digest] = time.Now().Add(d)
}

// wrong notes that an object was not right here. So others may not be.
func (p *place) wrong(ref blob.Ref) {
	p.mark(ref, wrongTime)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lied = time.Now()
}

// rank is 0 for a place in good health, and more the less it promises.
func (p *place) rank(ref blob.Ref, now time.Time) (rank int) {
	p.mu.Lock()
	if now.Before(p.bad[ref.Digest]) {
		rank += 4
	}
	if now.Sub(p.lied) < wrongTime {
		rank++
	}
	p.mu.Unlock()
	return rank + p.Health.rank(now)
}
