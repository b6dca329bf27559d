package daemon

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"
)

// keeper has recordings of mounts that have ended kept, one image after the
// other, when the machine has had time for what comes next. Until then it has
// them in memory.
type keeper struct {
	keep func(context.Context, []*recording) error // recordings of one image
	log  *slog.Logger
	now  chan struct{} // closed when there is no time to wait

	mu      sync.Mutex
	waiting []*recording
	idle    chan struct{} // closed when nothing waits; nil if nothing does
}

const (
	keepPause  = time.Second
	keepTime   = time.Minute      // for all of one image
	flushTime  = 10 * time.Second // when the service ends
	maxWaiting = 256
)

func (k *keeper) init(keep func(context.Context, []*recording) error, log *slog.Logger) {
	k.keep, k.log, k.now = keep, log, make(chan struct{})
}

// add takes a recording on.
func (k *keeper) add(r *recording) {
	if len(r.Touches) == 0 {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.waiting) >= maxWaiting {
		k.log.Warn("too many traces wait to be kept: one is lost", "digest", r.manifest)
		return
	}
	k.waiting = append(k.waiting, r)
	if k.idle == nil {
		k.idle = make(chan struct{})
		go k.work()
	}
}

func (k *keeper) work() {
	for {
		select {
		case <-k.now:
		case <-time.After(keepPause):
		}
		k.mu.Lock()
		if len(k.waiting) == 0 {
			close(k.idle)
			k.idle = nil
			k.mu.Unlock()
			return
		}
		digest := k.waiting[0].manifest
		k.mu.Unlock()
		all := k.of(digest)
		ctx, cancel := context.WithTimeout(context.Background(), keepTime)
		if err := k.keep(ctx, all); err != nil {
			k.log.Warn("a trace could not be kept", "digest", digest, "err", err)
		}
		cancel()
		k.mu.Lock()
		k.waiting = slices.DeleteFunc(k.waiting, func(r *recording) bool { return slices.Contains(all, r) })
		k.mu.Unlock()
	}
}

// of lists the recordings of an image that wait.
func (k *keeper) of(digest string) (out []*recording) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, r := range k.waiting {
		if r.manifest == digest {
			out = append(out, r)
		}
	}
	return out
}

// busy tells whether any wait.
func (k *keeper) busy() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.idle != nil
}

// flush has all kept that wait, if that does not take long. It is called once,
// and nothing is added afterwards.
func (k *keeper) flush() {
	close(k.now)
	k.mu.Lock()
	idle := k.idle
	k.mu.Unlock()
	if idle == nil {
		return
	}
	select {
	case <-idle:
	case <-time.After(flushTime):
		k.log.Warn("traces of the last runs are lost: there was no time to keep them")
	}
}
