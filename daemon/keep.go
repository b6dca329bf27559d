package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/keeper"
)

// keep is the keeper's part of Run.
func keep(ctx context.Context, cfg Config) (err error) {
	ready := func(failure json.RawMessage) {
		if cfg.Ready == nil {
			return
		}
		switch {
		case failure == nil:
			io.WriteString(cfg.Ready, readyOK)
		default:
			cfg.Ready.Write(failure)
		}
		cfg.Ready.Close()
	}
	if err := os.MkdirAll(cfg.Root, 0o700); err != nil {
		return NotReady(cfg.Ready, err)
	}
	lock, err := lockRoot(cfg.Root)
	if err != nil {
		if errors.Is(err, ErrBusy) && cfg.Ready != nil {
			io.WriteString(cfg.Ready, readyTaken)
			cfg.Ready.Close()
			return err
		}
		return NotReady(cfg.Ready, err)
	}
	defer lock.Close()
	if cfg.Ready != nil {
		if err := leaveCgroups(); err != nil {
			cfg.Logger.Info("stays in its caller's cgroup", "err", err)
		}
	}
	root, err := os.Stat(cfg.Root)
	if err != nil {
		return NotReady(cfg.Ready, err)
	}
	api, err := listenFile(cfg.Root)
	if err != nil {
		return NotReady(cfg.Ready, err)
	}
	defer func() {
		if at, err := os.Stat(cfg.Root); err == nil && os.SameFile(at, root) {
			removeSockets(cfg.Root)
		}
		api.Close()
	}()
	raiseFileLimit()
	follow := logFollower(cfg.Root)
	return keeper.Run(ctx, keeper.Options{
		API: api, Lock: lock, Dir: cfg.Root, Version: cfg.Version, Args: workerArgs(os.Args), Logger: cfg.Logger,
		Ready: ready, Patience: cfg.Registries.ReadWait(), Hang: cfg.Registries.WorkerHang(),
		Prepare: func() error {
			follow()
			at, err := os.Stat(cfg.Root)
			if err == nil && !os.SameFile(at, root) {
				err = os.ErrNotExist
			}
			return err
		},
	})
}

// workerArgs is the command line of a worker: only its keeper tells that the
// service is ready.
func workerArgs(args []string) []string {
	i := slices.Index(args, "--ready-fd")
	if i < 0 || i+2 > len(args) {
		return args
	}
	return slices.Delete(slices.Clone(args), i, i+2)
}

// listenFile is listen for a process that accepts nothing itself.
func listenFile(root string) (*os.File, error) {
	l, err := listen(root)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	f, err := l.File()
	if err != nil {
		return nil, err
	}
	defer f.Close()
	// Not f itself: whenever somebody asked for its number, all who have this
	// socket would be made to block in it.
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("dup", err)
	}
	return os.NewFile(uintptr(fd), socketName), nil
}

// removeSockets removes the sockets of a service that has ended: that of the API
// last, since who sees it gone may look at the rest.
func removeSockets(root string) {
	for _, name := range []string{metricsName, keeper.SocketName, socketName} {
		os.Remove(filepath.Join(root, name))
	}
}

// logFollower returns a function that makes this process write to the log anew if
// its worker has begun a new one.
func logFollower(root string) func() {
	name := filepath.Join(root, logName)
	ours := func() bool {
		at, err := os.Stat(name)
		if err != nil {
			return false
		}
		st, err := os.Stderr.Stat()
		return err == nil && os.SameFile(at, st)
	}
	if !ours() {
		return func() {} // it goes elsewhere
	}
	return func() {
		if !ours() {
			_ = writeTo(name) // or it goes to the old one, which is as good
		}
	}
}
