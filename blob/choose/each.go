package choose

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/shale-image/shale/blob"
)

// Each calls f with the numbers of places, as New has got them, the most promising
// first, until one succeeds: for small things that are no range of an object. One that
// takes as long as to be called stalled goes on, but the next one is asked too; whoever
// succeeds first counts, and the context of the others ends. What fails rests as for a
// range; that a place does not have something is held against nobody.
func Each[T any](ctx context.Context, s *Source, f func(ctx context.Context, place int) (T, error)) (T, error) {
	type result struct {
		from *place
		v    T
		err  error
	}
	fctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var (
		order   = s.order(blob.Ref{})
		results = make(chan result, len(order))
		begun   = map[*place]time.Time{} // those that are asked
		errs    = map[*place]error{}
	)
	next := func() bool {
		p := nextOf(&order, errs)
		if p == nil {
			return false
		}
		begun[p] = time.Now()
		go func() {
			v, err := f(fctx, slices.Index(s.places, p))
			results <- result{p, v, err}
		}()
		return true
	}
	next()
	late := time.NewTimer(stalled)
	defer late.Stop()
	for len(begun) > 0 {
		select {
		case r := <-results:
			delete(begun, r.from)
			if r.err == nil {
				for p, at := range begun {
					if time.Since(at) >= stalled {
						p.failed(blob.Ref{}, errStalled)
					}
				}
			}
			if r.err == nil || ctx.Err() != nil {
				return r.v, r.err
			}
			if !errors.Is(r.err, blob.ErrNotFound) && !errors.Is(r.err, blob.ErrRange) {
				r.from.failed(blob.Ref{}, r.err)
			}
			errs[r.from] = r.err
			if next() {
				late.Reset(stalled)
			}
		case <-late.C:
			if next() {
				late.Reset(stalled)
			}
		}
	}
	var none T
	return none, errs[s.places[len(s.places)-1]]
}
