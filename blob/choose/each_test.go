package choose_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/choose"
)

// small asks places for something small, each of which does as it is told.
type small struct {
	mu  sync.Mutex
	log string
	do  []func(ctx context.Context) error
}

func (s *small) ask(ctx context.Context, of *choose.Source) (int, error) {
	return choose.Each(ctx, of, func(ctx context.Context, n int) (int, error) {
		s.mu.Lock()
		s.log += fmt.Sprint(n)
		s.mu.Unlock()
		return n, s.do[n](ctx)
	})
}

func (s *small) asked() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	log := s.log
	s.log = ""
	return log
}

// after answers when a time has passed, unless nobody wants it any more.
func after(d time.Duration, err error) func(context.Context) error {
	return func(ctx context.Context) error {
		select {
		case <-time.After(d):
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func TestEach(t *testing.T) {
	const ever = time.Hour
	busy := fmt.Errorf("it is %w", blob.ErrUnavailable)
	for name, c := range map[string]struct {
		do    []func(context.Context) error
		want  int
		err   error
		took  time.Duration
		asked string
		then  string // who is asked the next time
	}{
		"well":               {[]func(context.Context) error{after(0, nil), after(0, nil)}, 0, nil, 0, "0", "0"},
		"slow":               {[]func(context.Context) error{after(2900*time.Millisecond, nil), after(0, nil)}, 0, nil, 2900 * time.Millisecond, "0", "0"},
		"hangs":              {[]func(context.Context) error{after(ever, nil), after(0, nil)}, 1, nil, 3 * time.Second, "01", "1"},
		"hangs, and another": {[]func(context.Context) error{after(ever, nil), after(ever, nil), after(0, nil)}, 2, nil, 6 * time.Second, "012", "2"},
		"late":               {[]func(context.Context) error{after(4*time.Second, nil), after(ever, nil)}, 0, nil, 4 * time.Second, "01", "01"},
		"fails":              {[]func(context.Context) error{after(0, busy), after(0, nil)}, 1, nil, 0, "01", "1"},
		"lacks it":           {[]func(context.Context) error{after(0, blob.ErrNotFound), after(0, nil)}, 1, nil, 0, "01", "01"},
		"hangs, fails":       {[]func(context.Context) error{after(ever, nil), after(0, busy), after(0, nil)}, 2, nil, 3 * time.Second, "012", "2"},
		"all fail":           {[]func(context.Context) error{after(0, busy), after(0, blob.ErrUnauthorized)}, 0, blob.ErrUnauthorized, 0, "01", ""},
		"alone":              {[]func(context.Context) error{after(20*time.Second, nil)}, 0, nil, 20 * time.Second, "0", "0"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := newLab(len(c.do))
				of, s := choose.New(l.places...), &small{do: c.do}
				began := time.Now()
				got, err := s.ask(t.Context(), of)
				if !errors.Is(err, c.err) || err == nil && got != c.want || time.Since(began) != c.took {
					t.Errorf("place %d after %v, %v; want %d after %v, %v", got, time.Since(began), err, c.want, c.took, c.err)
				}
				if got := s.asked(); got != c.asked {
					t.Errorf("asked %s, want %s", got, c.asked)
				}
				synctest.Wait() // nobody is left who asks
				if c.then == "" {
					return
				}
				_, err = s.ask(t.Context(), of)
				if got := s.asked(); err != nil || got != c.then {
					t.Errorf("the next time: asked %s, want %s; %v", got, c.then, err)
				}
			})
		})
	}
}

// Who does not want it any more does not wait.
func TestEachCancelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(2)
		s := &small{do: []func(context.Context) error{after(time.Hour, nil), after(time.Hour, nil)}}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := s.ask(ctx, choose.New(l.places...)); !errors.Is(err, context.DeadlineExceeded) || s.asked() != "0" {
			t.Error(err)
		}
	})
}
