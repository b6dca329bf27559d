package keeper

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// worker is a worker as its keeper sees it.
type worker struct {
	pid   int
	conn  *net.UnixConn
	hello chan hello    // buffered
	ready chan struct{} // closed when it serves
	dead  chan struct{} // closed when it has died and all that it sent is taken
	state string        // how it died; valid after dead

	said    atomic.Pointer[hello]
	alive   atomic.Bool // it has answered since it was looked after last
	end     atomic.Bool // the service ends with it
	failure atomic.Pointer[json.RawMessage]
}

// firstFile is the first descriptor that a worker inherits besides the standard
// ones.
const firstFile = 3

// spawn starts a worker. It is given no mounts yet.
func (k *keeper) spawn(exe *os.File) (*worker, error) {
	conn, theirs, err := pair()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		conn.Close()
		return nil, err
	}
	defer null.Close()
	path := "/proc/self/exe"
	if exe != nil {
		path = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), exe.Fd())
	}
	p, err := os.StartProcess(path, k.o.Args, &os.ProcAttr{
		Env:   append(os.Environ(), envWorker+"="+strconv.Itoa(firstFile)),
		Files: []*os.File{null, os.Stdout, os.Stderr, theirs, k.o.API, k.o.Lock},
	})
	if err != nil {
		conn.Close()
		return nil, err
	}
	w := &worker{pid: p.Pid, conn: conn, hello: make(chan hello, 1), ready: make(chan struct{}), dead: make(chan struct{})}
	heard := make(chan struct{})
	go func() {
		defer close(heard)
		k.hear(w)
	}()
	go k.await(w, p, heard)
	return w, nil
}

// hear takes what a worker says, until nothing more can come.
func (k *keeper) hear(w *worker) {
	buf := make([]byte, maxPacket)
	for {
		kind, body, files, err := readPacket(w.conn, buf)
		if err != nil {
			return
		}
		m := &Mount{Files: files}
		switch kind {
		case kindHello:
			var h hello
			_ = json.Unmarshal(body, &h)
			w.said.Store(&h)
			select {
			case w.hello <- h:
			default:
			}
			continue
		case kindMount:
			if err := json.Unmarshal(body, m); err == nil && m.ID != "" {
				k.keep(m)
				continue
			}
		case kindDrop:
			if json.Unmarshal(body, m) == nil {
				k.drop(m.ID)
			}
		case kindReady:
			select {
			case <-w.ready:
			default:
				close(w.ready)
			}
		case kindPing:
			w.alive.Store(true)
		case kindFail:
			why := json.RawMessage(bytes.Clone(body))
			w.failure.Store(&why)
		case kindEnd:
			w.end.Store(true)
		}
		closeAll(files)
	}
}

// await waits for a worker's death. A thread of it may be in the kernel, where it
// mounts what the worker itself should serve, and not even SIGKILL ends it before
// somebody answers. So a worker whose first thread is dead is dead.
func (k *keeper) await(w *worker, p *os.Process, heard <-chan struct{}) {
	exited := make(chan string, 1)
	go func() {
		st, err := p.Wait()
		if err != nil {
			exited <- err.Error()
			return
		}
		exited <- st.String()
	}()
	tick := time.NewTicker(checkTime)
	defer tick.Stop()
	for w.state == "" {
		select {
		case w.state = <-exited:
		case <-tick.C:
			if k.unsettled() && dying(p.Pid) {
				w.state = "killed while it made a mount"
			}
		}
	}
	// What it has sent is there to be read.
	_ = w.conn.SetReadDeadline(time.Now().Add(checkTime))
	<-heard
	w.conn.Close()
	close(w.dead)
}

// dying tells whether the first thread of a process has ended, and the others, if
// there are any, wait in the kernel for what not even SIGKILL ends: none of them does
// anything any more.
func dying(pid int) bool {
	if !strings.ContainsRune("ZX", state(fmt.Sprintf("/proc/%d/stat", pid))) {
		return false
	}
	threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	for _, path := range threads {
		if !strings.ContainsRune("ZXD", state(path)) {
			return false
		}
	}
	return true
}

// state is the state of a thread; X if it is no more.
func state(path string) rune {
	// "123 (name) Z 1 ..."; a name may have any byte in it
	p, err := os.ReadFile(path)
	i := bytes.LastIndexByte(p, ')')
	if err != nil || i < 0 || len(p) <= i+2 {
		return 'X'
	}
	return rune(p[i+2])
}

func (w *worker) order(o Order) { _ = writePacket(w.conn, byte(o), nil) }

func (w *worker) kill() { _ = syscall.Kill(w.pid, syscall.SIGKILL) }

// give gives a worker all mounts: from now on it is the one.
func (k *keeper) give(w *worker) error {
	k.mu.Lock()
	all := slices.Clone(k.kept) // nobody changes them before the worker has them
	k.mu.Unlock()
	w.conn.SetWriteDeadline(time.Now().Add(helloTime))
	defer w.conn.SetWriteDeadline(time.Time{})
	for _, m := range all {
		if err := writePacket(w.conn, kindMount, m, m.Files...); err != nil {
			return err
		}
	}
	return writePacket(w.conn, kindGo, nil)
}

// hangLooks is how often a worker is looked after within Options.Hang. Time counts
// only as far as the keeper itself has lived through it: a machine that was suspended,
// or let nobody run, is no reason to kill.
const hangLooks = 10

// pulse is whether a worker answers.
type pulse struct {
	asked  bool
	silent int // looks in a row without a word that was due
}

// look asks a worker that has been given all, unless it still owes an answer.
func (p *pulse) look(w *worker, given bool) {
	h := w.said.Load()
	switch alive := w.alive.Swap(false); {
	case given && h != nil && !h.Pings: // one of old, which nobody can tell of
		p.silent = 0
	case !given || h == nil || p.asked && !alive:
		p.silent++
	default:
		p.asked, p.silent = true, 0
		w.order(kindPing)
	}
}

// outcome is how a worker's time was over.
type outcome struct {
	served  bool
	end     bool            // the service ends
	late    bool            // readers have waited for long enough
	failure json.RawMessage // what it said, if it could not serve
	next    *swap           // who takes over
}

// swap is a wish to have another worker.
type swap struct {
	exe    *os.File
	worker *worker // that has said hello
	err    error
	done   chan error // buffered
}

// watch gives a worker the mounts, and returns when it is dead. since is when the
// last one stopped to serve; from, if not nil, is the wish for this one.
func (k *keeper) watch(ctx context.Context, w *worker, from *swap, since time.Time) (out outcome) {
	gave := make(chan error, 1)
	go func() { gave <- k.give(w) }() // it takes them when it is ready to
	patience := time.NewTimer(time.Until(since.Add(k.o.Patience)))
	defer patience.Stop()
	look := time.NewTicker(max(k.o.Hang/hangLooks, time.Millisecond))
	defer look.Stop()
	var (
		pulse    pulse
		given    bool
		ready    = w.ready
		swaps    chan *swap
		prepared chan *swap
		ended    = ctx.Done()
		late     <-chan time.Time
	)
	leave := func(o Order) {
		w.order(o)
		late = time.After(endTime)
	}
	defer func() {
		k.mu.Lock()
		k.worker = nil
		k.mu.Unlock()
		if from != nil {
			from.finish(fmt.Errorf("%w of it: %s", ErrNoWorker, w.state), nil)
		}
	}()
	for {
		select {
		case err := <-gave:
			if given = err == nil; !given {
				k.log.Error("give a worker the mounts", "err", err)
				w.kill()
			}
		case <-look.C:
			if pulse.look(w, given); k.o.Hang > 0 && pulse.silent >= hangLooks {
				k.log.Error("the worker does not answer: it is killed", "pid", w.pid, "for", k.o.Hang)
				pulse.silent = 0
				w.kill()
			}
		case <-ready:
			ready, swaps, out.served = nil, k.swaps, true
			patience.Stop()
			k.mu.Lock()
			k.worker = w
			k.mu.Unlock()
			k.log.Info("a worker serves", "pid", w.pid, "nobody_did_for", time.Since(since))
			k.tell(nil)
			if from != nil {
				from.finish(nil, &k.exe)
				from = nil
			}
		case <-patience.C:
			if k.idle() { // who starts waits, and nobody else
				continue
			}
			out.late = true
			w.kill()
		case q := <-swaps:
			swaps, prepared = nil, make(chan *swap, 1)
			go func() {
				q.worker, q.err = k.prepare(q.exe)
				prepared <- q
			}()
		case q := <-prepared:
			prepared = nil
			switch {
			case q.err != nil:
				swaps = k.swaps
				q.finish(q.err, nil)
			case late != nil: // the service ends
				q.worker.kill()
				q.finish(errors.New("the service ends"), nil)
			default:
				out.next = q
				leave(Leave)
			}
		case <-ended:
			ended = nil
			if k.store.lasts() {
				leave(Leave)
			} else {
				leave(Stop)
			}
		case <-late:
			k.log.Error("the worker does not end: it is killed", "pid", w.pid)
			w.kill()
		case <-w.dead:
			if prepared != nil { // it died while another was prepared, which comes as called
				if q := <-prepared; q.err == nil {
					out.next = q
				} else {
					q.finish(q.err, nil)
				}
			}
			out.end = w.end.Load()
			if why := w.failure.Load(); why != nil {
				out.failure = *why
			}
			if out.next != nil && (out.end || ctx.Err() != nil) {
				out.next.worker.kill()
				out.next.finish(errors.New("the service ends"), nil)
			}
			return out
		}
	}
}

// prepare starts a worker beside the one that serves.
func (k *keeper) prepare(exe *os.File) (*worker, error) {
	w, err := k.spawn(exe)
	if err != nil {
		return nil, err
	}
	select {
	case h := <-w.hello:
		if h.Protocol == protocol {
			return w, nil
		}
		err = fmt.Errorf("version %s is too far from this keeper's %s: end the service, and the next command starts that", h.Version, k.o.Version)
	case <-w.dead:
		return nil, fmt.Errorf("%w of it: %s", ErrNoWorker, w.state)
	case <-time.After(helloTime):
		err = errors.New("it does not become ready")
	}
	w.kill()
	return nil, err
}

// finish tells who wished for it how it went. If it went well its program is that
// of later workers, too.
func (q *swap) finish(err error, exe **os.File) {
	if err == nil {
		if *exe != nil {
			(*exe).Close()
		}
		*exe = q.exe
	} else if q.exe != nil {
		q.exe.Close()
	}
	q.done <- err
}
