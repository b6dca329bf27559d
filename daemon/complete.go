package daemon

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/shale-image/shale/config"
	"github.com/shale-image/shale/fill"
	"github.com/shale-image/shale/pool"
)

// The rest of a mounted image is fetched when nobody waits for anything: then the
// mount survives the loss of its registry. It is the mount's: when that ends, so does
// this, and an image that does not fit without pushing others out is left as it is.

// How long after a completion that failed there is no other: at first, and at most.
const (
	completePause    = 10 * time.Second
	maxCompletePause = 10 * time.Minute
)

// completion fetches the rest of an image.
type completion struct {
	cancel context.CancelFunc
	done   sync.WaitGroup
	again  chan struct{} // has one if something may be missing again

	mu    sync.Mutex
	never string // why nothing is fetched; "" if it is
	last  error  // of the last try, if it failed
	rest  bool   // all was here, and nothing is fetched until again
}

// tried notes what has come of a try.
func (c *completion) tried(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.last, c.rest = err, err == nil && len(c.again) == 0
}

// more has it look again.
func (c *completion) more() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.rest = false
	select {
	case c.again <- struct{}{}:
	default:
	}
}

// coming tells whether the rest may come by itself, and why not, or what went wrong when
// that was tried last; "" if nothing did.
func (c *completion) coming() (bool, string) {
	if c == nil {
		return true, "" // it is about to be made
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.never != "":
		return false, c.never
	case errors.Is(c.last, pool.ErrNoSpace):
		return false, "it does not fit: " + c.last.Error()
	case c.rest:
		return false, "it was complete, and others needed the room"
	case c.last != nil:
		return true, c.last.Error()
	}
	return true, ""
}

// completes tells whether anything is fetched for a mount that nobody has read.
func (s *server) completes(m *mounted) bool {
	return !m.asked.NoComplete && s.cfg.Registries.Cache.Complete != config.CompleteOff
}

// complete begins to fetch the rest of what m shows, once nobody has waited for a
// while.
func (s *server) complete(m *mounted) *completion {
	c := &completion{cancel: func() {}, again: make(chan struct{}, 1)}
	opt := s.cfg.Registries.Cache
	off := !s.completes(m)
	switch {
	case !m.fs.Served():
		c.never = "its mount is not served any more"
	case m.asked.NoComplete:
		c.never = "its mount does not fetch the rest (--no-complete)"
	case off:
		c.never = `this node fetches nothing by itself ("complete": "off")`
	}
	if !m.fs.Served() || off && m.face != fanotifyFace {
		return c
	}
	ctx, cancel := context.WithCancel(context.Background())
	c.cancel = cancel
	c.done.Go(func() {
		select { // what is detached is unmarked, also where one that is not resumed yet needs that
		case <-s.resumed:
		case <-ctx.Done():
			return
		}
		if off {
			if !s.untilAlone(ctx) {
				return
			}
			c.mu.Lock()
			c.never = ""
			c.mu.Unlock()
		}
		pause := completePause
		for {
			if s.isAlone() && m.face == fanotifyFace {
				if err := s.completeAlone(ctx, m); err == nil || ctx.Err() != nil {
					return
				}
				if !sleep(ctx, aloneAgain) {
					return
				}
				continue
			}
			after := time.Duration(opt.CompleteAfter)
			if after == 0 {
				after = config.CompleteAfter
			}
			last := m.since
			if miss := m.image.LastMiss(); miss.After(last) {
				last = miss
			}
			if wait := time.Until(last.Add(after)); wait > 0 {
				if !s.sleep(ctx, wait) {
					return
				}
				continue
			}
			try, end := s.whileKept(ctx)
			err := s.completeNow(try, m, int64(opt.CompleteRate))
			end()
			c.tried(err)
			if err == nil {
				s.detach(m)
				s.log.Info("all of an image is here", "id", m.id, "ref", m.ref)
				select {
				case <-c.again:
					continue
				case <-ctx.Done():
					return
				}
			}
			if ctx.Err() != nil {
				return
			}
			s.log.Info("an image is not complete yet", "id", m.id, "ref", m.ref, "err", err)
			if !s.sleep(ctx, pause) {
				return
			}
			pause = min(2*pause, maxCompletePause)
		}
	})
	return c
}

// When the keeper is dead, readers of a mount of the face fanotify would see zeros as soon
// as this process dies, too. So all of its image is fetched at once, also where it was to
// be left as it is, and then it needs nobody.

const aloneAgain = time.Second

func (s *server) completeAlone(ctx context.Context, m *mounted) error {
	s.log.Warn("all of an image is fetched, so that its mount needs no process", "id", m.id, "ref", m.ref)
	err := m.image.Complete(ctx, nil)
	if err == nil && m.image.Missing().Chunks > 0 {
		err = errOthers
	}
	if err == nil {
		s.detach(m)
	} else if ctx.Err() == nil {
		s.log.Error("an image is not complete, and nobody holds its mount if this process dies", "id", m.id, "ref", m.ref, "err", err)
	}
	return err
}

// isAlone tells whether the keeper is dead.
func (s *server) isAlone() bool {
	select {
	case <-s.alone:
		return true
	default:
		return false
	}
}

// untilAlone waits for that. It returns false if ctx ends first.
func (s *server) untilAlone(ctx context.Context) bool {
	select {
	case <-s.alone:
		return true
	case <-ctx.Done():
		return false
	}
}

// whileKept returns a context that also ends when the keeper dies.
func (s *server) whileKept(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		defer cancel()
		s.untilAlone(ctx)
	}()
	return ctx, cancel
}

// sleep returns earlier when the keeper dies, and false if ctx ends first.
func (s *server) sleep(ctx context.Context, d time.Duration) bool {
	kept, end := s.whileKept(ctx)
	defer end()
	sleep(kept, d)
	return ctx.Err() == nil
}

var errOthers = errors.New("others are still fetching parts of it")

// completeNow is one try. There is one at a time on a node, besides those whose source
// hangs.
func (s *server) completeNow(ctx context.Context, m *mounted, rate int64) error {
	held := false // by this image; the calls of take and give follow each other
	take := func(ctx context.Context) error {
		select {
		case s.completing <- struct{}{}:
			held = true
		case <-ctx.Done():
			return ctx.Err()
		}
		if n := m.image.Missing().Content; n > s.pool.Room() && !m.fs.ReadsSegments() { // that has its room
			return fmt.Errorf("%d bytes are missing: %w", n, pool.ErrNoSpace)
		}
		return nil
	}
	give := func() {
		if held {
			<-s.completing
			held = false
		}
	}
	defer give()
	if err := take(ctx); err != nil {
		return err
	}
	err := m.image.CompleteSlowly(ctx, fill.Slowly{Rate: rate, Yield: func() func(context.Context) error {
		give()
		return take
	}})
	if err != nil {
		return err
	}
	if m.image.Missing().Chunks > 0 {
		return errOthers
	}
	return s.pool.Sync()
}

// stop returns when nothing is fetched any more.
func (c *completion) stop() {
	c.cancel()
	c.done.Wait()
}

// sleep returns false if ctx ends first.
func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}
