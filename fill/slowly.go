package fill

import (
	"cmp"
	"context"
	"time"
)

// Slowly is how CompleteSlowly fetches.
type Slowly struct {
	// Rate bounds the stored bytes a second; 0 is without bound.
	Rate int64
	// Yield, if not nil, is called when a request takes so long that others need not
	// wait for it, and what it returns when that has ended.
	Yield func() (back func(context.Context) error)
}

const (
	// slowRequest is how much of the link a reader may find taken: a fiftieth of a
	// second at 100 Mbit/s. There is one such request at a time.
	slowRequest = 256 << 10
	// slowPause is how long after readers waited they may wait again.
	slowPause = 200 * time.Millisecond
	slowLook  = 20 * time.Millisecond
	// slowTurn is how long others wait for a request, or a reader, whose source hangs.
	slowTurn = 3 * time.Second
	// near is how far behind what was read something is likely to be read, in
	// bytes of content.
	near = 4 << 20
)

// LastMiss is when a reader had to wait for a request last; the zero time if none
// ever had to.
func (im *Image) LastMiss() time.Time {
	if at := im.stats.missed.Load(); at != 0 {
		return time.Unix(0, at)
	}
	return time.Time{}
}

// CompleteSlowly fetches what of the image is not here in the time that readers
// leave: one small request at a time, none while readers of any image wait. First
// comes what lies behind what was read, then the rest in its order. It returns nil
// when it has asked for all; what others were fetching may still be missing. The
// caller sees to it that it has returned before Close.
func (im *Image) CompleteSlowly(ctx context.Context, o Slowly) error {
	touches, _ := im.Touched()
	seen := map[int64]bool{}
	for _, t := range touches {
		if seen[t.Flat/near] {
			continue
		}
		seen[t.Flat/near] = true
		if err := im.trickle(ctx, im.linked.Find(t.Flat), t.Flat+near, o); err != nil {
			return err
		}
	}
	return im.trickle(ctx, 0, im.linked.FlatSize, o)
}

// trickle fetches what is missing from chunk i on and before the flat address end.
func (im *Image) trickle(ctx context.Context, i int, end int64, o Slowly) error {
	for {
		if err := im.engine.Quiet(ctx); err != nil {
			return err
		}
		wants, next := im.background(i, end, slowRequest)
		if len(wants) == 0 {
			return ctx.Err()
		}
		i = next
		began := time.Now()
		all := im.linked.Stored(wants[0].chunk)
		all.Extend(im.linked.Stored(wants[len(wants)-1].chunk))
		im.requests.Go(func() { im.fetch(im.ctx, wants) })
		if err := im.arriveSlowly(ctx, wants, o); err != nil {
			return err
		}
		if o.Rate > 0 {
			due := time.Duration(float64(all.Length) / float64(o.Rate) * float64(time.Second))
			if err := sleep(ctx, time.Until(began.Add(due))); err != nil {
				return err
			}
		}
	}
}

// arriveSlowly returns when all that is wanted is in the pool.
func (im *Image) arriveSlowly(ctx context.Context, wants []want, o Slowly) (err error) {
	if o.Yield != nil {
		yielded := make(chan func(context.Context) error, 1)
		late := time.AfterFunc(slowTurn, func() { yielded <- o.Yield() })
		defer func() {
			if !late.Stop() {
				back := <-yielded
				err = cmp.Or(err, back(ctx))
			}
		}()
	}
	for _, w := range wants {
		if err := im.arrive(ctx, wait{w.index, w.flight}); err != nil {
			return err
		}
	}
	return nil
}

// Quiet returns when no reader waits, nor has done so a moment ago.
func (e *Engine) Quiet(ctx context.Context) error {
	for {
		if e.waiting.Load() == 0 && time.Since(time.Unix(0, e.waited.Load())) >= slowPause {
			return ctx.Err()
		}
		if err := sleep(ctx, slowLook); err != nil {
			return err
		}
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
