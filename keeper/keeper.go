// Package keeper is the process of a service that does not die: it holds the
// connections of mounts, and starts a worker to serve them; when the worker dies,
// another.
//
// A FUSE connection lives as long as somebody has its /dev/fuse open. Readers wait
// while nobody reads from it, and a new worker has the kernel send again what the
// last one has not answered. So a worker may die at any moment, or be exchanged
// for one of another version, and no reader sees more than a pause.
//
// For each mount the keeper has a journal: bytes that a worker gave it, which it
// gives the next. It knows nothing of images, registries and how mounts are served,
// so that there is little in it that could fail or have to be upgraded. Nothing of
// a journal is ever on disk: there may be credentials in it.
package keeper

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"os"
	"runtime/debug"
	"slices"
	"sync"
	"time"
)

// Options is how a keeper runs.
type Options struct {
	API  *os.File // the listening socket of the service: clients wait in its queue while no worker is up
	Lock *os.File // keeps others from the root directory as long as it is open
	Dir  string   // the root directory, where the keeper has a socket of its own: SocketName

	Version string
	Args    []string // command line of a worker, which Inherit tells that it is one
	Logger  *slog.Logger

	// Ready is called once: when the first worker serves, or, with what it said,
	// when it cannot.
	Ready func(failure json.RawMessage)
	// Prepare is called before each worker is started. An error ends the service.
	Prepare func() error
	// Patience is how long readers wait while no worker can be started. Then all
	// mounts are aborted: their readers get EIO.
	Patience time.Duration
	// Hang is how long a worker may fail to answer before it is killed, and another
	// one takes over; 0 is for ever.
	Hang time.Duration
}

// ErrNoWorker says that no worker could be started.
var ErrNoWorker = errors.New("no worker could be started")

const (
	endTime   = 20 * time.Second // for a worker to do what it still has to
	helloTime = 10 * time.Second // for a new worker to get as far as it can beside the old one
	checkTime = 100 * time.Millisecond

	// memory is what the keeper's own objects may take, about.
	memory = 4 << 20
)

type keeper struct {
	o     Options
	log   *slog.Logger
	store *store
	own   *net.UnixListener
	swaps chan *swap
	ctx   context.Context
	told  sync.Once
	exe   *os.File // of workers; nil: what this process runs

	mu     sync.Mutex
	kept   []*Mount
	worker *worker // that serves; nil if none does
}

// Run keeps a service until a worker ends it, or ctx does.
func Run(ctx context.Context, o Options) (err error) {
	debug.SetGCPercent(20)
	debug.SetMemoryLimit(memory)
	k := &keeper{o: o, log: o.Logger, swaps: make(chan *swap), ctx: ctx}
	defer func() { k.tell(failure(err)) }()
	if k.store, k.kept, err = openStore(k.log); err != nil {
		k.store = &store{log: k.log}
		return err
	}
	if len(k.kept) > 0 {
		k.log.Info("mounts of an earlier keeper are taken over", "mounts", len(k.kept))
	}
	if k.own, err = listen(o.Dir); err != nil {
		return err
	}
	defer k.own.Close()
	go k.answer()
	err = k.run(k.untilFree(ctx))
	k.end(ctx.Err() != nil && k.store.lasts())
	return err
}

// untilFree returns a context that ends with ctx, but not before nothing is Held any
// more that would end with this process.
func (k *keeper) untilFree(ctx context.Context) context.Context {
	free, end := context.WithCancel(context.Background())
	context.AfterFunc(ctx, func() {
		defer end()
		if k.holds() {
			k.log.Error("not ending before all that is mounted with the face fanotify is complete, or unmounted: its readers would see zeros")
		}
		for k.holds() {
			time.Sleep(checkTime)
		}
	})
	return free
}

// holds tells whether something is Held by nobody else.
func (k *keeper) holds() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.ContainsFunc(k.kept, func(m *Mount) bool { return m.Held && !k.store.has(m) })
}

// failure is an error as Options.Ready wants it, if the worker has not said more.
func failure(err error) json.RawMessage {
	if err == nil {
		return nil
	}
	js, _ := json.Marshal(map[string]string{"text": err.Error()})
	return js
}

func (k *keeper) tell(failure json.RawMessage) {
	k.told.Do(func() {
		k.o.Ready(failure)
		if failure == nil {
			k.store.notify("READY=1")
		}
	})
}

// run starts workers, one after the other.
func (k *keeper) run(ctx context.Context) error {
	var (
		next   *swap // waits to take over
		died   []time.Time
		failed int // workers in a row that never served
		since  = time.Now()
	)
	for {
		if err := k.o.Prepare(); err != nil {
			if !k.holds() {
				return err
			}
			k.log.Error("no worker can be started: readers wait", "err", err)
			time.Sleep(pause(0, math.MaxInt))
			continue
		}
		var w *worker
		var err error
		if next != nil {
			w = next.worker
		} else {
			w, err = k.spawn(k.exe)
		}
		var out outcome
		if err == nil {
			out = k.watch(ctx, w, next, since)
		} else {
			k.log.Error("start a worker", "err", err)
		}
		switch {
		case ctx.Err() != nil, out.end && !k.holds():
			return nil
		case out.late && !k.holds():
			return fmt.Errorf("%w for %v: mounts are aborted", ErrNoWorker, k.o.Patience)
		case out.late: // those of the rest wait
			k.letGo(func(m *Mount) bool { return !m.Held })
			since = time.Now()
		}
		if next = out.next; next != nil {
			since, failed = time.Now(), 0
			continue // as it was asked to
		}
		if failed++; out.served {
			since, failed = time.Now(), 0
			k.log.Error("the worker has died; another one takes over", "pid", w.pid, "state", w.state)
		} else if len(out.failure) > 0 {
			k.log.Error("a worker could not start", "err", string(out.failure))
		}
		if k.idle() && (failed >= 3 || !out.served && len(out.failure) > 0) {
			if len(out.failure) > 0 { // there is nothing to lose
				k.tell(out.failure)
			}
			return ErrNoWorker
		}
		now := time.Now()
		for died = append(died, now); now.Sub(died[0]) > crashSpan; {
			died = died[1:]
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause(len(died), failed)):
		}
	}
}

// crashSpan is how long a death counts.
const crashSpan = 10 * time.Second

// pause is how long no worker is started after so many deaths within crashSpan, and
// so many in a row before they served. Those who read wait as long, but a worker
// that dies of what it serves must not take the machine along.
func pause(died, failed int) time.Duration {
	p := time.Duration(max(0, died-10)) * 20 * time.Millisecond
	if failed > 0 {
		p += 20 * time.Millisecond << min(failed, 8)
	}
	return min(p, time.Second)
}

func (k *keeper) idle() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.kept) == 0
}

// unsettled tells whether a process may wait in the kernel for an answer that only
// a worker gives.
func (k *keeper) unsettled() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, m := range k.kept {
		if !m.Settled {
			return true
		}
	}
	return false
}

// keep takes a mount, or what is new of it.
func (k *keeper) keep(m *Mount) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, old := range k.kept {
		if old.ID == m.ID {
			closeAll(m.Files)
			old.Show, old.Rest, old.Settled = m.Show, m.Rest, m.Settled
			k.store.put(old)
			return
		}
	}
	if len(m.Files) == 0 {
		return // of one that is no more
	}
	k.kept = append(k.kept, m)
	k.store.put(m)
}

// drop forgets a mount.
func (k *keeper) drop(id string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for i, m := range k.kept {
		if m.ID == id {
			closeAll(m.Files)
			k.store.remove(m)
			k.kept = append(k.kept[:i], k.kept[i+1:]...)
			return
		}
	}
}

// end lets go of what is kept. If others hold it too, they keep it for the next
// keeper; else readers get EIO.
func (k *keeper) end(held bool) {
	if !held {
		k.letGo(func(*Mount) bool { return true })
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, m := range k.kept {
		closeAll(m.Files)
	}
	k.kept = nil
}

// letGo aborts mounts, and forgets them.
func (k *keeper) letGo(which func(*Mount) bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.kept = slices.DeleteFunc(k.kept, func(m *Mount) bool {
		if !which(m) {
			return false
		}
		k.log.Warn("ending with an image mounted", "id", m.ID)
		m.Abort()
		k.store.remove(m)
		closeAll(m.Files)
		return true
	})
}

// Abort ends the connection of a mount: who reads gets EIO.
func (m *Mount) Abort() {
	if len(m.Files) > 1 && !m.Held {
		_, _ = m.Files[1].Write([]byte("1")) // or it is gone already
	}
}
