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
	lied time.Time       // it has given us wrong bytes then; zero: never
	bad  map[string]mark // by digest: objects it has not for us, or not right
}

// mark is what is remembered of an object.
type mark struct {
	until time.Time
	wrong time.Time // it was not right then; zero: it was not there
}

// Range implements blob.Source: nobody else is asked.
func (p *place) Range(ctx context.Context, ref blob.Ref, off, n int64) (io.ReadCloser, error) {
	return p.all.ask(ctx, []*place{p}, ref, off, n)
}

// failed notes what came instead of an object, or of the rest of it.
func (p *place) failed(ref blob.Ref, err error) {
	if errors.Is(err, blob.ErrNotFound) || errors.Is(err, blob.ErrRange) || errors.Is(err, blob.ErrUnauthorized) {
		p.mark(ref, mark{until: time.Now().Add(lackTime)}) // which says nothing of others' objects, and credentials
		return
	}
	p.Health.failed(err)
}

// mark remembers that an object is not here, or not right.
func (p *place) mark(ref blob.Ref, m mark) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.bad == nil || len(p.bad) >= maxBad {
		p.bad = map[string]mark{}
	}
	p.bad[ref.Digest] = m
}

// wrong notes that an object was not right here. So others may not be.
func (p *place) wrong(ref blob.Ref) {
	now := time.Now()
	p.mark(ref, mark{until: now.Add(wrongTime), wrong: now})
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lied = now
}

// wrongSince tells when an object was not right here; zero if that is not known. Where
// bytes of two places were wrong, nobody knows whose: who was found out first is asked
// first, so that each has its turn.
func (p *place) wrongSince(ref blob.Ref) time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	if m := p.bad[ref.Digest]; time.Now().Before(m.until) {
		return m.wrong
	}
	return time.Time{}
}

// rank is 0 for a place in good health, and more the less it promises.
func (p *place) rank(ref blob.Ref, now time.Time) (rank int) {
	p.mu.Lock()
	if now.Before(p.bad[ref.Digest].until) {
		rank += 4
	}
	if now.Sub(p.lied) < wrongTime {
		rank++
	}
	p.mu.Unlock()
	return rank + p.Health.rank(now)
}
