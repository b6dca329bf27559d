package daemon

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"
)

// shelf has recordings of mounts that have ended kept, one image after the
// other, when the machine has had time for what comes next. Until then it has
// them in memory.
type shelf struct {
	keep func(context.Context, []*recording) error // recordings of one image
	log  *slog.Logger
	now  chan struct{} // closed when there is no time to wait

	mu      sync.Mutex
	waiting []*recording
	touches int           // of those waiting
	idle    chan struct{} // closed when nothing waits; nil if nothing does
}

const (
	keepPause  = time.Second
	keepTime   = time.Minute      // for those that are kept at a time
	flushTime  = 10 * time.Second // when the service ends
	maxWaiting = 256
	maxTouches = 1 << 20 // of those that wait, 24 bytes each
	maxAtATime = 1 << 17 // touches of those kept at a time, but for one: 60 bytes each on the way
)

func (s *shelf) init(keep func(context.Context, []*recording) error, log *slog.Logger) {
	s.keep, s.log, s.now = keep, log, make(chan struct{})
}

// add takes a recording on.
func (s *shelf) add(r *recording) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.waiting) >= maxWaiting || s.touches+len(r.Touches) > maxTouches {
		s.log.Warn("too much waits to be kept of what was read: a trace is lost", "digest", r.manifest, "traces", len(s.waiting), "blocks", s.touches)
		return
	}
	s.waiting = append(s.waiting, r)
	s.touches += len(r.Touches)
	if s.idle == nil {
		s.idle = make(chan struct{})
		go s.work()
	}
}

func (s *shelf) work() {
	for {
		select {
		case <-s.now:
		case <-time.After(keepPause):
		}
		s.mu.Lock()
		if len(s.waiting) == 0 {
			close(s.idle)
			s.idle = nil
			s.mu.Unlock()
			return
		}
		digest := s.waiting[0].manifest
		s.mu.Unlock()
		all := atATime(s.of(digest), maxAtATime)
		ctx, cancel := context.WithTimeout(context.Background(), keepTime)
		if err := s.keep(ctx, all); err != nil {
			s.log.Warn("a trace could not be kept", "digest", digest, "err", err)
		}
		cancel()
		s.mu.Lock()
		s.waiting = slices.DeleteFunc(s.waiting, func(r *recording) bool { return slices.Contains(all, r) })
		for _, r := range all {
			s.touches -= len(r.Touches)
		}
		s.mu.Unlock()
	}
}

// of lists the recordings of an image that wait.
func (s *shelf) of(digest string) (out []*recording) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.waiting {
		if r.manifest == digest {
			out = append(out, r)
		}
	}
	return out
}

// atATime is the first of some recordings, and those that follow as long as all have
// no more than so many touches.
func atATime(all []*recording, touches int) []*recording {
	for i, r := range all {
		if touches -= len(r.Touches); touches < 0 && i > 0 {
			return all[:i]
		}
	}
	return all
}

// busy tells whether any wait.
func (s *shelf) busy() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.idle != nil
}

// flush has all kept that wait, if that does not take long. It is called once,
// and nothing is added afterwards.
func (s *shelf) flush() {
	close(s.now)
	s.mu.Lock()
	idle := s.idle
	s.mu.Unlock()
	if idle == nil {
		return
	}
	select {
	case <-idle:
	case <-time.After(flushTime):
		s.log.Warn("traces of the last runs are lost: there was no time to keep them")
	}
}
