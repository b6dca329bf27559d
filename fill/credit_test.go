package fill

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/shale-image/shale/chunk"
)

// TestCredit: whatever a pack does, readers wait for it as long as it comes at a pace,
// and half a second besides.
func TestCredit(t *testing.T) {
	for name, c := range map[string]struct {
		run    int // bytes that come at a time
		every  time.Duration
		within time.Duration // of waiting, in a minute in which somebody wants to; 0: all of it
	}{
		"hangs":           {0, time.Second, mostCredit},
		"10 kB a second":  {16 << 10, 1600 * time.Millisecond, 2 * time.Second},
		"500 kB a second": {16 << 10, 32 * time.Millisecond, 31 * time.Second},
		"2 MB a second":   {16 << 10, 8 * time.Millisecond, 0},
		"large chunks":    {1 << 20, 400 * time.Millisecond, 0},
	} {
		now := time.Unix(1e9, 0)
		l := credit{left: mostCredit, since: now}
		waited := time.Duration(0)
		for end := now.Add(time.Minute); now.Before(end); {
			l.spend(now)
			step := c.every
			if !l.late {
				l.waiting++
				step = min(step, l.left)
			}
			now = now.Add(step)
			l.spend(now)
			if l.waiting > 0 {
				waited += step
				l.waiting--
			}
			if step == c.every {
				l.earn(now, c.run, packPace)
			}
		}
		if c.within == 0 && waited < time.Minute || c.within > 0 && (waited > c.within || waited < mostCredit) {
			t.Errorf("%s: waited for %v, want up to %v", name, waited, c.within)
		}
	}
}

// TestPace: where requests are slow a pack may be, too.
func TestPace(t *testing.T) {
	var w worth
	if p := w.pace(); p != packPace {
		t.Errorf("%v with nothing known", p)
	}
	w.answered(time.Millisecond, 100_000, time.Second)
	if p := w.pace(); p != 25_000 {
		t.Errorf("%v where requests bring 100 kB a second", p)
	}
	w.answered(time.Millisecond, 100_000_000, time.Second)
	if p := w.pace(); p != packPace {
		t.Errorf("%v where they bring 100 MB", p)
	}
}

// TestLandHangs: a pack that hangs delays readers once, and those that come then do not
// wait for it at all. When it comes after all it does no
// harm.
func TestLandHangs(t *testing.T) {
	n := newNode(t, Options{})
	b := newBuilder(chunk.Zstd)
	b.blob()
	b.files(900_000)
	x := n.image(b)
	all := x.blocks()
	p := n.packOf(x, all[:40])
	g := newGate(p)
	g.open(len(p) / 3)
	known, landed := make(chan struct{}), make(chan error, 1)
	go func() { landed <- x.Land(t.Context(), reading(t, g), func() { close(known) }) }()
	<-known
	must(t, x.read(t.Context(), t, all[39], chunk.Block))
	if len(n.asked()) == 0 {
		t.Error("no request in place of a pack that hangs")
	}
	l := x.landing.Load()
	if l == nil || !l.late() || x.led() || l.brings(all[38], chunk.Block) {
		t.Error("it is still counted on")
	}
	for _, f := range all[25:39] {
		if waited, err := l.wait(t.Context(), f, f+1); waited || err != nil {
			t.Errorf("somebody waits for it again, or %v", err)
		}
		must(t, x.read(t.Context(), t, f, chunk.Block))
	}
	g.open(len(p))
	must(t, <-landed)
	x.all(t)
}

// TestLandHangsForWatched is TestLandHangs where the kernel reads itself.
func TestLandHangsForWatched(t *testing.T) {
	n := newNode(t, Options{})
	b := newBuilder(chunk.Zstd)
	b.blob()
	b.files(900_000)
	x := n.image(b)
	all := x.blocks()
	p := n.packOf(x, all[:40])
	g := newGate(p)
	g.open(len(p) / 3)
	ctx, cancel := context.WithCancel(t.Context())
	known, landed := make(chan struct{}), make(chan error, 1)
	go func() { landed <- x.Land(ctx, reading(t, g), func() { close(known) }) }()
	<-known
	must(t, x.Bring(t.Context(), all[39], chunk.Block))
	must(t, x.Bring(t.Context(), all[38], chunk.Block))
	cancel()
	g.open(len(p))
	if err := <-landed; err != nil && !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
