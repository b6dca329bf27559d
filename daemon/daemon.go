// Package daemon is the node service: it owns the pool of a root directory,
// fetches, and serves mounts; and the client side of its API. It is two processes:
// a keeper (package keeper), and a worker that does all of this and may die.
//
// The service starts when a command needs it and ends by itself when nothing
// is mounted any more. It knows how images become mounts; it knows nothing of
// containers.
package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/config"
	"github.com/shale-image/shale/fill"
	"github.com/shale-image/shale/keeper"
	"github.com/shale-image/shale/mount"
	"github.com/shale-image/shale/pool"
)

const (
	logName  = "daemon.log"
	lockName = "daemon.lock"

	readyOK    = "ok"
	readyTaken = "taken" // another service has the root directory

	// garbage is how much of the memory in use there may be for what no longer is, in
	// percent: readers of a hundred images at once make much of it.
	garbage = 50

	// syncEvery is how much a power cut may cost: what was fetched since the
	// last sync is hashed again before it is used.
	syncEvery = 5 * time.Second
)

// Config is how a service runs.
type Config struct {
	Root    string        // directory of all its state
	Idle    time.Duration // end after this long without a mount or a call; 0: never
	Version string
	Logger  *slog.Logger // to standard error, so that it can be turned over
	// Registries is how to reach registries; nil means the defaults.
	Registries *config.Config
	// Ready, if not nil, is written "ok", "taken" or an error as JSON, and
	// closed, when the service serves or cannot.
	Ready io.WriteCloser
}

// Run serves until ctx ends, the service is idle for long enough, or the root
// directory vanishes. Calls that are under way then fail. So do readers of
// mounts that need a process, with EIO: nobody is left who could bring their bytes.
// Mounts of complete images (face direct) live on.
//
// This process becomes the keeper, and starts the worker with its own command line,
// but for --ready-fd: there Run is called again, and is the worker.
func Run(ctx context.Context, cfg Config) error {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Registries == nil {
		cfg.Registries = &config.Config{}
	}
	root, err := filepath.Abs(cfg.Root)
	if err != nil {
		return NotReady(cfg.Ready, err)
	}
	cfg.Root = root
	w, err := keeper.Inherit()
	switch {
	case err != nil:
		return err
	case w != nil:
		return work(ctx, cfg, w)
	}
	return keep(ctx, cfg)
}

// NotReady tells whoever started the service (Config.Ready) why it could not
// be run, and returns err.
func NotReady(ready io.WriteCloser, err error) error {
	if ready != nil {
		js, _ := json.Marshal(encodeError(err))
		ready.Write(js)
		ready.Close()
	}
	return err
}

type server struct {
	cfg     Config
	log     *slog.Logger
	keeper  *keeper.Worker
	root    os.FileInfo
	socket  *net.UnixListener
	pool    *pool.Pool
	engine  *fill.Engine
	store   *store
	traces  shelf // keep what was read
	sharing shelf // push it
	started time.Time
	stop    context.CancelFunc
	life    context.Context // until stop

	opened     atomic.Bool    // open has returned
	sealing    atomic.Bool    // a segment is being sealed or unsealed
	pushing    atomic.Int32   // indexes that are to be pushed
	pushOne    sync.Mutex     // held while one is
	background sync.WaitGroup // comparisons, verification and seals of the pool, pushes of indexes
	telling    sync.Mutex     // held by keepCounts
	aside      aside
	completing chan struct{} // has one if an image is being completed
	alone      chan struct{} // closed when the keeper is dead
	resumed    chan struct{} // closed when all mounts of the worker before are served on

	mu     sync.Mutex
	mounts map[string]*mounted
	lost   int       // mounts of the face fanotify that nobody can serve any more
	ended  totals    // of mounts that are no more
	calls  int       // being served
	work   int       // of these, those that pull, mount or remove
	worked bool      // since memory was last given back
	ending bool      // no call begins any more
	leaves bool      // another worker takes over
	last   time.Time // when there was last something to do
}

// work is the worker's part of Run.
func work(ctx context.Context, cfg Config, w *keeper.Worker) error {
	debug.SetGCPercent(garbage)
	mount.Try = tryKernel
	s := &server{cfg: cfg, log: cfg.Logger, keeper: w, started: time.Now(), last: time.Now(), mounts: map[string]*mounted{}, completing: make(chan struct{}, 1), alone: make(chan struct{}), resumed: make(chan struct{})}
	w.Check = s.check
	kept, err := w.Hello(cfg.Version)
	if err != nil {
		return err
	}
	raiseFileLimit()
	err = s.open(kept)
	s.opened.Store(true)
	if err != nil {
		err = errors.Join(err, s.close())
		js, _ := json.Marshal(encodeError(err))
		w.Fail(js)
		return err
	}
	return s.run(ctx, kept)
}

// open takes possession of the root directory.
func (s *server) open(kept []keeper.Mount) (err error) {
	root := s.cfg.Root
	if s.root, err = os.Stat(root); err != nil {
		return err
	}
	s.turnLog()
	data := watchedData(kept)
	s.pool, err = pool.OpenWith(poolDir(root), data)
	for _, f := range data {
		f.Close() // it has its own
	}
	if err != nil {
		return err
	}
	for _, err := range s.pool.Damage() {
		s.log.Error("a segment of the pool is damaged and was set aside", "err", err)
	}
	s.engine = fill.New(s.pool, fill.Options{Timeout: s.cfg.Registries.ReadWait() + readSlack/2, ZstdWindow: limits(s.cfg.Registries).Window, Logger: s.log})
	s.traces.init(s.keepTraces, s.log)
	s.sharing.init(s.shareTraces, s.log)
	if s.store, err = openStore(s.cfg, s.pool, s.engine); err != nil {
		return err
	}
	l, err := net.FileListener(s.keeper.API)
	if err != nil {
		return err
	}
	s.socket = l.(*net.UnixListener)
	return nil
}

// lockRoot makes sure that there is one service a root directory.
func lockRoot(root string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(root, lockName), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%s: another node service has this root directory: %w", root, ErrBusy)
		}
		return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return f, nil
}

// unlocked tells whether no process of a service has the root directory any more.
func unlocked(root string) bool {
	f, err := os.Open(filepath.Join(root, lockName))
	if err != nil {
		return true
	}
	defer f.Close()
	return unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB) == nil
}

func listen(root string) (*net.UnixListener, error) {
	// We hold the lock: a socket that is there is a dead service's.
	if err := os.Remove(filepath.Join(root, socketName)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	addr, dir, err := socketAddr(root)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	l, err := net.ListenUnix("unixpacket", addr)
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false) // its name ends with dir; see close
	if err := os.Chmod(filepath.Join(root, socketName), 0o600); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

func (s *server) run(ctx context.Context, kept []keeper.Mount) error {
	signalled := ctx
	ctx, s.stop = context.WithCancel(context.WithoutCancel(ctx))
	s.mu.Lock()
	s.life = ctx
	s.mu.Unlock()
	defer s.stop()
	// A signal to this process alone is no reason to end the service.
	defer context.AfterFunc(signalled, s.leave)()
	go s.obey()
	context.AfterFunc(ctx, func() {
		s.mu.Lock()
		s.ending = true
		s.mu.Unlock()
		s.socket.Close()
	})
	for i := range kept {
		s.resume(ctx, &kept[i])
	}
	s.serveWatched()
	close(s.resumed)
	s.pool.OnRot(s.rotten)
	s.log.Info("serving", "root", s.cfg.Root, "pid", os.Getpid(), "version", s.cfg.Version, "mounts", len(kept))
	if err := s.serveMetrics(ctx); err != nil {
		s.log.Error("no metrics", "err", err)
	}
	s.keeper.Ready()
	go mount.Ready() // before anybody waits for a mount
	go s.keepHouse(ctx)
	s.background.Go(func() { s.scrubInTime(ctx) })
	s.background.Go(func() { s.sealInTime(ctx) })
	var calls sync.WaitGroup
	for ctx.Err() == nil {
		c, err := s.socket.AcceptUnix()
		switch {
		case err == nil:
			calls.Go(func() { s.serve(ctx, c) })
		case ctx.Err() == nil:
			// Too many open files, perhaps: that is no reason to fail those
			// who read what is mounted.
			s.log.Error("accept", "err", err)
			select {
			case <-ctx.Done():
			case <-time.After(time.Second):
			}
		}
	}
	calls.Wait()
	if s.leaving() {
		return s.handOver()
	}
	s.keeper.End()
	s.endMounts()
	s.traces.flush()
	s.sharing.flush()
	s.background.Wait()
	s.log.Info("ended")
	return s.close()
}

func (s *server) close() error {
	var errs []error
	if s.pool != nil {
		errs = append(errs, s.pool.Close())
	}
	if s.socket != nil {
		s.socket.Close()
	}
	if s.keeper.Keeper() == 0 {
		removeSockets(s.cfg.Root)
	}
	return errors.Join(errs...)
}

// keepHouse syncs the pool, and ends the service when it is of no use.
func (s *server) keepHouse(ctx context.Context) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	synced, failed := time.Now(), ""
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if time.Since(synced) >= syncEvery {
			failed = s.tellOnce("sync the pool", s.pool.Sync(), failed)
			s.engine.StoreHeld()
			s.keepCounts()
			synced = time.Now()
		}
		if st, err := os.Stat(s.cfg.Root); err != nil || !os.SameFile(st, s.root) {
			if !s.watched() {
				s.log.Warn("the root directory is gone; ending", "root", s.cfg.Root)
				s.stop()
				return
			}
		}
		s.turnLog()
		s.giveMemoryBack()
		s.detachComplete()
		s.compareComplete()
		if s.idle() {
			s.log.Info("idle; ending", "idle", s.cfg.Idle)
			s.stop()
			return
		}
	}
}

// tellOnce logs an error that is not what was told before, and returns what was told now.
func (s *server) tellOnce(what string, err error, before string) string {
	switch {
	case err == nil && before != "":
		s.log.Info(what + ": that goes again")
	case err != nil && err.Error() != before:
		s.log.Error(what, "err", err)
	}
	if err == nil {
		return ""
	}
	return err.Error()
}

// idle tells whether the service has been of no use for long enough. Then no
// call begins any more: a client that is just connecting starts another one.
func (s *server) idle() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.calls > 0 || s.served() > 0 || s.traces.busy() || s.sharing.busy() || s.pushing.Load() > 0 || s.store.compares() || s.sealing.Load() {
		s.last = time.Now()
	}
	if s.cfg.Idle > 0 && time.Since(s.last) >= s.cfg.Idle {
		s.ending = true
	}
	return s.ending
}

// giveMemoryBack returns to the system what a pull or a conversion took,
// instead of keeping it until some later garbage collection.
func (s *server) giveMemoryBack() {
	s.mu.Lock()
	now := s.worked && s.work == 0
	s.worked = s.worked && !now
	s.mu.Unlock()
	if now {
		debug.FreeOSMemory()
	}
}
