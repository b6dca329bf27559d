// Package choose makes one blob.Source of several places that have the same
// objects: an image's registry and its mirrors. The healthiest is asked first;
// if it fails, or takes much longer than it used to, the next one is asked for
// the same range. Who was found to give wrong bytes comes last.
//
//	choose.go  one request, and who is asked for it
//	health.go  what is known of a place: latencies, failures
//	place.go   what it has not, or not right
//	body.go    an answer: it may stall, break off, or be rejected
//	each.go    what is no range of an object
//
// It verifies nothing, and retries nothing: each place is asked once for a
// range, and blob/retry goes around it. It knows no protocol.
package choose

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"github.com/shale-image/shale/blob"
)

const (
	// smallest is the longest range that is asked for a second time while its
	// first request still waits for an answer (urgent ranges only).
	smallest = 512 << 10

	// share is the part of all bytes that may be asked for a second time: 1/share.
	// burst is what may be at any time.
	share = 20
	burst = 1 << 20

	// stalled is how long a place may say nothing before another one is asked,
	// if there is another one.
	stalled = 3 * time.Second

	// tooLong is how long the rest of an answer may take, at the pace of the last stalled,
	// before somebody who is not known to be slow is asked for it.
	tooLong = stalled
)

// Place is somewhere to ask.
type Place struct {
	Name   string // for messages
	Source blob.Source
	Health *Health // nil: nobody else's
}

// Source asks several places. It is safe for concurrent use.
type Source struct {
	places []*place

	mu    sync.Mutex
	extra int64 // bytes that may be asked for twice
}

// New returns a source of the given places, at least one, in the order of
// preference: that of equally healthy ones. Of errors that of the last place
// counts, which knows best what there is.
func New(places ...Place) *Source {
	s := &Source{extra: burst}
	for _, p := range places {
		if p.Health == nil {
			p.Health = &Health{}
		}
		s.places = append(s.places, &place{Place: p, all: s})
	}
	return s
}

// Range implements blob.Source. Bodies implement blob.Rejecter.
func (s *Source) Range(ctx context.Context, ref blob.Ref, off, n int64) (io.ReadCloser, error) {
	return s.ask(ctx, s.order(ref), ref, off, n)
}

// answer is what became of one request.
type answer struct {
	from *place
	body *body
	err  error
}

// nextOf takes the first place off order that can be asked, and nil if there is none; errs
// tells why those before it cannot.
func nextOf(order *[]*place, errs map[*place]error) *place {
	for len(*order) > 0 {
		p := (*order)[0]
		*order = (*order)[1:]
		err := p.Health.told()
		if err == nil {
			return p
		}
		errs[p] = err
	}
	return nil
}

// ask makes a request at the first place, and at the next one when it fails or
// is late. The first answer counts; other requests are broken off.
func (s *Source) ask(ctx context.Context, order []*place, ref blob.Ref, off, n int64) (io.ReadCloser, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s.earn(n)
	var (
		answers = make(chan answer)
		running = map[*body]bool{}
		errs    = map[*place]error{}
	)
	launch := func(p *place) {
		b := newBody(ctx, p, ref, n)
		running[b] = true
		go func() { answers <- answer{p, b, b.open(off, n)} }()
	}
	// next launches at the next place that can be asked, and returns false if there is none.
	next := func() bool {
		p := nextOf(&order, errs)
		if p != nil {
			launch(p)
		}
		return p != nil
	}
	defer func() {
		if len(running) == 0 {
			return
		}
		for b := range running {
			b.abandon()
		}
		left := len(running)
		go func() { // their answers, if they have come meanwhile
			for range left {
				if a := <-answers; a.err == nil {
					a.body.Close()
				}
			}
		}()
	}()
	first, begun := order[0], time.Now()
	next()
	late := time.NewTimer(s.patience(ctx, first, n))
	defer late.Stop()
	for len(running) > 0 {
		select {
		case a := <-answers:
			delete(running, a.body)
			if a.err == nil {
				return a.body, nil
			}
			if ctx.Err() != nil {
				return nil, a.err
			}
			errs[a.from] = a.err
			if len(running) == 0 && next() {
				late.Reset(stalled)
			}
		case <-late.C:
			waited := time.Since(begun)
			healthy := len(order) > 0 && order[0].rank(ref, time.Now()) == 0
			switch {
			case waited < stalled && !s.spend(n):
				late.Reset(stalled - waited)
			case waited < stalled && !healthy:
				launch(first) // another connection may have more luck
				late.Reset(stalled - waited)
			case next():
				late.Reset(stalled)
			}
		}
	}
	last := s.places[len(s.places)-1]
	if err := errs[last]; err != nil {
		return nil, err
	}
	for _, err := range errs {
		return nil, err
	}
	return nil, fmt.Errorf("blob %s: %w: nobody to ask", ref.Digest, blob.ErrUnavailable)
}

// patience is how long to wait for the first answer before a second request is
// made. What is urgent and small does not wait longer than 19 of 20 answers of
// this place have taken.
func (s *Source) patience(ctx context.Context, first *place, n int64) time.Duration {
	usual, known := first.Health.usual()
	if !known || !blob.Urgent(ctx) || n > smallest {
		return stalled
	}
	return min(max(usual+usual/4, 20*time.Millisecond), stalled)
}

func (s *Source) earn(n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.extra = min(s.extra+max(n, 0)/share, 4*burst)
}

// spend takes n bytes of what may be asked for twice, if there are so many.
func (s *Source) spend(n int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.extra < n {
		return false
	}
	s.extra -= n
	return true
}

// order lists the places, the most promising for a blob first.
func (s *Source) order(ref blob.Ref) []*place {
	now := time.Now()
	rank := map[*place]int{}
	best := time.Duration(-1)
	for _, p := range s.places {
		if m, known := p.Health.median(now); known && (best < 0 || m < best) && p.rank(ref, now) == 0 {
			best = m
		}
	}
	for _, p := range s.places {
		rank[p] = p.rank(ref, now)
		// A mirror is there to be used, unless it is clearly worse than what it mirrors.
		if m, known := p.Health.median(now); known && best >= 0 && m > 3*best+50*time.Millisecond {
			rank[p]++
		}
	}
	order := slices.Clone(s.places)
	slices.SortStableFunc(order, func(a, b *place) int {
		return cmp.Or(a.wrongSince(ref).Compare(b.wrongSince(ref)), rank[a]-rank[b])
	})
	return order
}
