package netmodel

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

const mbit100 = 100e6 / 8

// within fails the test unless got is near want, by 2 %.
func within(t *testing.T, what string, got, want time.Duration) {
	t.Helper()
	if d := got - want; d < -want/50 || d > want/50 {
		t.Errorf("%s took %v, want %v", what, got, want)
	}
}

// send passes n bytes over the link, as fast as it lets them.
func send(l *link, n int) error {
	s := sender{link: l}
	for ; n > 0; n -= piece {
		if err := s.wait(context.Background(), min(n, piece)); err != nil {
			return err
		}
	}
	return nil
}

// Time is that of a synctest bubble in these tests: exact, and free.

func TestLinkHasItsRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		if err := send(&link{rate: mbit100}, 10e6); err != nil {
			t.Fatal(err)
		}
		within(t, "10 MB", time.Since(start), 800*time.Millisecond)
	})
}

func TestLinkIsShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &link{rate: mbit100}
		start := time.Now()
		var wg sync.WaitGroup
		for i := range 4 {
			wg.Go(func() {
				if err := send(l, (i+1)*1e6); err != nil {
					t.Error(err)
				}
				// With k senders left each has 1/k of the link.
				sum := []int{4, 7, 9, 10}[i]
				within(t, "a share", time.Since(start), time.Duration(sum)*80*time.Millisecond)
			})
		}
		wg.Wait()
	})
}

func TestIdleLinkSavesOnePiece(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &link{rate: mbit100}
		time.Sleep(time.Hour)
		start := time.Now()
		if err := send(l, piece); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(start); d != 0 {
			t.Errorf("the first piece took %v", d)
		}
		if err := send(l, piece); err != nil {
			t.Fatal(err)
		}
		within(t, "the second piece", time.Since(start), l.duration(piece))
	})
}

func TestLateTimersCostNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := sender{link: &link{rate: mbit100}}
		start := time.Now()
		const pieces = 1000
		for range pieces {
			if err := s.wait(t.Context(), piece); err != nil {
				t.Fatal(err)
			}
			// As if the timer had fired 3 ms late, which sleeps for.
			const late = 3 * time.Millisecond
			if s.late < late {
				time.Sleep(late - s.late)
				s.late = late
			}
		}
		within(t, "1000 pieces", time.Since(start), s.link.duration(pieces*piece))
	})
}

func TestUnlimitedLinkAndCancel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		if err := send(&link{}, 1e9); err != nil || time.Since(start) != 0 {
			t.Errorf("an unlimited link took %v, %v", time.Since(start), err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		s := sender{link: &link{rate: 1}}
		if err := errors.Join(s.wait(ctx, piece), s.wait(ctx, piece)); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error %v, want the deadline's", err)
		}
	})
}
