package keeper

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Mount is what is kept of a mount, so that a worker can serve it on.
type Mount struct {
	ID   string          `json:"id"`
	Show json.RawMessage `json:"show"` // what the keeper tells of it when no worker does
	Rest json.RawMessage `json:"rest"` // what only a worker sees; credentials may be in it
	// Settled says that whoever made the mount waits for nothing that the mount's
	// server has to answer.
	Settled bool `json:"settled"`
	// Held says that nobody can abort it: were nobody to hold its files its readers
	// would see what is not so. The keeper does not end while there is one.
	Held bool `json:"held,omitempty"`
	// Parts are the names that the service manager has for Files, if some are shared with
	// other mounts: the keeper's own.
	Parts []string `json:"parts,omitempty"`

	// Files are what serves it; unless it is Held, /dev/fuse and the file that aborts
	// it, if there is one.
	Files []*os.File `json:"-"`
}

// Order is what a keeper wants of its worker.
type Order byte

// The orders.
const (
	Leave Order = kindLeave // exit, and leave the mounts to another worker
	Stop  Order = kindStop  // end them
)

// Worker is a worker's side. Its methods are safe for concurrent use; they do
// nothing once the keeper is dead, and a worker then serves on without one.
type Worker struct {
	API    *os.File // the listening socket of the service
	Lock   *os.File // keeps others from the root directory as long as it is open
	Orders <-chan Order

	// Check is called when the keeper wants to know whether this process does its
	// work, and returns when it does. It may be set until Hello.
	Check func()

	conn   *net.UnixConn
	orders chan Order
	pings  chan struct{}
	parent int
	alone  atomic.Bool
	mu     sync.Mutex // one packet at a time
}

// envWorker tells a process that it is a worker: which descriptor is the first of
// those it inherits.
const envWorker = "SHALE_WORKER_FD"

// Inherit returns this process' side of its keeper, or nil if it was not started
// by one. It is called once, before any other process is started.
func Inherit() (*Worker, error) {
	first, err := strconv.Atoi(os.Getenv(envWorker))
	if err != nil {
		return nil, nil
	}
	os.Unsetenv(envWorker)
	var f [3]*os.File
	for i := range f {
		unix.CloseOnExec(first + i)
		f[i] = os.NewFile(uintptr(first+i), "inherited")
	}
	conn, err := fileConn(f[0])
	if err != nil {
		return nil, err
	}
	w := &Worker{conn: conn, API: f[1], Lock: f[2], orders: make(chan Order, 4), pings: make(chan struct{}, 1), parent: os.Getppid()}
	w.Orders = w.orders
	return w, nil
}

// Hello says that this process has come so far that it can be given mounts, and
// waits until it is. Then it is the only worker.
func (w *Worker) Hello(version string) ([]Mount, error) {
	w.send(kindHello, hello{protocol, version, true})
	var all []Mount
	buf := make([]byte, maxPacket)
	for {
		kind, body, files, err := readPacket(w.conn, buf)
		if err != nil {
			return nil, fmt.Errorf("the keeper is gone: %w", err)
		}
		switch kind {
		case kindMount:
			m := Mount{Files: files}
			if err := json.Unmarshal(body, &m); err != nil {
				return nil, fmt.Errorf("keeper: %w", err)
			}
			all = append(all, m)
		case kindGo:
			go w.listen(buf)
			go w.echo()
			return all, nil
		case kindLeave, kindStop:
			return nil, errors.New("the service ends")
		}
	}
}

// listen passes orders on until the keeper is gone.
func (w *Worker) listen(buf []byte) {
	defer close(w.orders)
	defer close(w.pings)
	for {
		kind, _, files, err := readPacket(w.conn, buf)
		closeAll(files)
		if err != nil {
			w.alone.Store(true)
			return
		}
		switch kind {
		case kindLeave, kindStop:
			w.orders <- Order(kind)
		case kindPing:
			select {
			case w.pings <- struct{}{}:
			default: // one is being answered
			}
		}
	}
}

// echo answers pings.
func (w *Worker) echo() {
	for range w.pings {
		if w.Check != nil {
			w.Check()
		}
		w.send(kindPing, nil)
	}
}

// Keeper is the keeper's process id, 0 if it is dead.
func (w *Worker) Keeper() int {
	if w.alone.Load() || os.Getppid() != w.parent {
		return 0
	}
	return w.parent
}

// Keep has a mount kept, or what is kept of it changed; its files are needed the
// first time. It is kept when Keep returns.
func (w *Worker) Keep(m Mount) error { return w.send(kindMount, m, m.Files...) }

// Drop says that a mount is no more.
func (w *Worker) Drop(id string) { w.send(kindDrop, Mount{ID: id}) }

// Ready says that this process serves.
func (w *Worker) Ready() { w.send(kindReady, nil) }

// Fail says why it cannot. why is JSON that whoever started the keeper understands.
func (w *Worker) Fail(why json.RawMessage) { w.send(kindFail, why) }

// End says that the service ends when this process does.
func (w *Worker) End() { w.send(kindEnd, nil) }

func (w *Worker) send(kind byte, body any, files ...*os.File) error {
	if w.alone.Load() {
		return nil
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	err := writePacket(w.conn, kind, body, files...)
	if errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) {
		return nil // listen notes it
	}
	return err
}
