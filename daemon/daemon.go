// Package daemon is the node service: the one process of a root directory that
// owns its pool, fetches, and serves mounts; and the client side of its API.
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
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/config"
	"github.com/shale-image/shale/fill"
	"github.com/shale-image/shale/pool"
)

const (
	logName  = "daemon.log"
	lockName = "daemon.lock"

	readyOK    = "ok"
	readyTaken = "taken" // another service has the root directory

	// syncEvery is how much a power cut may cost: what was fetched since the
	// last sync is hashed again before it is used.
	syncEvery = 5 * time.Second
)

// Config is how a service runs.
type Config struct {
	Root    string        // directory of all its state
	Idle    time.Duration // end after this long without a mount or a call; 0: never
	Version string
	Logger  *slog.Logger
	// Registries is how to reach registries; nil means the defaults.
	Registries *config.Config
	// Ready, if not nil, is written "ok", "taken" or an error, and closed,
	// when the service serves or cannot.
	Ready io.WriteCloser
}

// Run serves until ctx ends, the service is idle for long enough, or the root
// directory vanishes.
func Run(ctx context.Context, cfg Config) error {
	s, err := start(cfg)
	if err == nil && cfg.Ready != nil {
		if err := leaveCgroups(); err != nil {
			s.log.Info("stays in its caller's cgroup", "err", err)
		}
	}
	if cfg.Ready != nil {
		switch {
		case errors.Is(err, ErrBusy):
			io.WriteString(cfg.Ready, readyTaken)
		case err != nil:
			io.WriteString(cfg.Ready, err.Error())
		default:
			io.WriteString(cfg.Ready, readyOK)
		}
		cfg.Ready.Close()
	}
	if err != nil {
		return err
	}
	return s.run(ctx)
}

// NotReady tells whoever started the service (Config.Ready) why it could not
// be run, and returns err.
func NotReady(ready io.WriteCloser, err error) error {
	if ready != nil {
		io.WriteString(ready, err.Error())
		ready.Close()
	}
	return err
}

type server struct {
	cfg     Config
	log     *slog.Logger
	lock    *os.File
	root    os.FileInfo
	socket  *net.UnixListener
	pool    *pool.Pool
	engine  *fill.Engine
	store   *store
	started time.Time
	stop    context.CancelFunc

	mu     sync.Mutex
	mounts map[string]*mounted
	ended  fill.Stats // of mounts that are no more
	calls  int        // being served
	last   time.Time  // when there was last something to do
}

func start(cfg Config) (*server, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Registries == nil {
		cfg.Registries = &config.Config{}
	}
	if err := os.MkdirAll(cfg.Root, 0o700); err != nil {
		return nil, err
	}
	root, err := filepath.Abs(cfg.Root)
	if err != nil {
		return nil, err
	}
	cfg.Root = root
	s := &server{cfg: cfg, log: cfg.Logger, started: time.Now(), last: time.Now(), mounts: map[string]*mounted{}}
	if err := s.open(); err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

// open takes possession of the root directory.
func (s *server) open() (err error) {
	root := s.cfg.Root
	if s.lock, err = lockRoot(root); err != nil {
		return err
	}
	if s.root, err = os.Stat(root); err != nil {
		return err
	}
	if s.pool, err = pool.Open(poolDir(root)); err != nil {
		return err
	}
	for _, err := range s.pool.Damage() {
		s.log.Error("a segment of the pool is damaged and was set aside", "err", err)
	}
	s.engine = fill.New(s.pool, fill.Options{Logger: s.log})
	if s.store, err = openStore(s.cfg, s.pool, s.engine); err != nil {
		return err
	}
	s.socket, err = listen(root)
	return err
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

func (s *server) run(ctx context.Context) error {
	ctx, s.stop = context.WithCancel(ctx)
	defer s.stop()
	s.log.Info("serving", "root", s.cfg.Root, "pid", os.Getpid(), "version", s.cfg.Version)
	context.AfterFunc(ctx, func() { s.socket.Close() })
	if err := s.serveMetrics(ctx); err != nil {
		s.log.Error("no metrics", "err", err)
	}
	go s.keepHouse(ctx)
	var calls sync.WaitGroup
	for {
		c, err := s.socket.AcceptUnix()
		if err != nil {
			if ctx.Err() == nil {
				s.log.Error("accept", "err", err)
			}
			break
		}
		calls.Go(func() { s.serve(ctx, c) })
	}
	s.stop()
	calls.Wait()
	s.endMounts()
	s.log.Info("ended")
	return s.close()
}

func (s *server) close() error {
	var errs []error
	if s.socket != nil {
		s.socket.Close()
		os.Remove(filepath.Join(s.cfg.Root, socketName))
	}
	if s.pool != nil {
		errs = append(errs, s.pool.Close())
	}
	if s.lock != nil {
		s.lock.Close()
	}
	return errors.Join(errs...)
}

// keepHouse syncs the pool, and ends the service when it is of no use.
func (s *server) keepHouse(ctx context.Context) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	synced := time.Now()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if time.Since(synced) >= syncEvery {
			if err := s.pool.Sync(); err != nil {
				s.log.Error("sync the pool", "err", err)
			}
			synced = time.Now()
		}
		if st, err := os.Stat(s.cfg.Root); err != nil || !os.SameFile(st, s.root) {
			s.log.Warn("the root directory is gone; ending", "root", s.cfg.Root)
			s.stop()
			return
		}
		s.mu.Lock()
		if s.calls > 0 || s.served() > 0 {
			s.last = time.Now()
		}
		idle := time.Since(s.last)
		s.mu.Unlock()
		if s.cfg.Idle > 0 && idle >= s.cfg.Idle {
			s.log.Info("idle; ending", "idle", idle.Round(time.Second))
			s.stop()
			return
		}
	}
}

// serve answers one connection.
func (s *server) serve(ctx context.Context, c *net.UnixConn) {
	defer c.Close()
	if err := allowed(c); err != nil {
		s.log.Warn("call refused", "err", err)
		return
	}
	s.mu.Lock()
	s.calls++
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		s.calls--
		s.last = time.Now()
		s.mu.Unlock()
	}()
	if ctx.Err() != nil || send(c, kindHello, nil) != nil {
		return
	}
	buf := make([]byte, maxPacket+1)
	kind, body, files, err := receive(c, buf)
	closeAll(files)
	if err != nil || kind != kindRequest {
		return
	}
	var q request
	if err := json.Unmarshal(body, &q); err != nil {
		s.log.Warn("bad request", "err", err)
		return
	}
	ctx, cancel := watchHangup(ctx, c)
	defer cancel()
	result, out, err := s.safely(ctx, c, q)
	defer closeAll(out)
	if err != nil {
		s.log.Info("call failed", "op", q.Op, "err", err)
		js, _ := json.Marshal(encodeError(err))
		send(c, kindError, js[:min(len(js), maxPacket)])
		return
	}
	js, err := json.Marshal(result)
	if err != nil {
		s.log.Error("encode result", "op", q.Op, "err", err)
		return
	}
	for len(js) > maxPacket {
		if send(c, kindPiece, js[:maxPacket]) != nil {
			return
		}
		js = js[maxPacket:]
	}
	if err := send(c, kindResult, js, out...); err != nil {
		s.log.Warn("reply", "op", q.Op, "err", err)
	}
}

// safely dispatches a request. One that panics must not take the mounts of
// all others along.
func (s *server) safely(ctx context.Context, c *net.UnixConn, q request) (result any, out []*os.File, err error) {
	defer func() {
		if p := recover(); p != nil {
			s.log.Error("call panicked", "op", q.Op, "panic", p, "stack", string(debug.Stack()))
			err = fmt.Errorf("internal error in %q: %v (the service's log has more)", q.Op, p)
		}
	}()
	return s.dispatch(ctx, c, q)
}

// allowed lets in root and the service's own user.
func allowed(c *net.UnixConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var cerr error
	if err := raw.Control(func(fd uintptr) {
		cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return err
	}
	if cerr != nil {
		return cerr
	}
	if cred.Uid != 0 && int(cred.Uid) != syscall.Geteuid() {
		return fmt.Errorf("user %d (pid %d) is neither root nor user %d", cred.Uid, cred.Pid, syscall.Geteuid())
	}
	return nil
}
