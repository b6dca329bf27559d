package netmodel

import (
	"context"
	"sync"
	"time"
)

// piece is how much of a response passes the link at once: 1.3 ms at
// 100 Mbit/s, so that concurrent responses share the link smoothly.
const piece = 16 << 10

// link is the wire all responses share: one byte after the other, in the order
// in which their senders ask. It is safe for concurrent use.
type link struct {
	rate float64 // bytes a second; 0 is no limit

	mu   sync.Mutex
	free time.Time // when all that was accepted so far has passed
}

// pass returns when n bytes that a sender has had ready since the given time
// have passed. An idle link lets one piece pass at once: without that, the
// time a sender takes to fetch its next piece would be lost to it.
func (l *link) pass(ready time.Time, n int) time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	if start := ready.Add(-l.duration(piece)); l.free.Before(start) {
		l.free = start
	}
	l.free = l.free.Add(l.duration(n))
	return l.free
}

func (l *link) duration(n int) time.Duration {
	return time.Duration(float64(n) / l.rate * float64(time.Second))
}

// sender passes one response over the link. It is not safe for concurrent use.
type sender struct {
	link *link
	late time.Duration // how much too late the last sleep ended
}

// wait returns when n bytes have passed, n at most piece. A timer that fires
// late does not cost bandwidth: the lateness is given back to the next piece.
func (s *sender) wait(ctx context.Context, n int) error {
	if s.link.rate <= 0 {
		return ctx.Err()
	}
	due := s.link.pass(time.Now().Add(-s.late), n)
	if err := sleep(ctx, time.Until(due)); err != nil {
		return err
	}
	s.late = max(0, time.Since(due))
	if s.late > maxLate {
		s.late = maxLate
	}
	return nil
}

// maxLate bounds the catching up after a machine stood still.
const maxLate = 20 * time.Millisecond

// sleep waits for d, or until ctx ends.
func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
