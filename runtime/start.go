package runtime

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"
)

// Container is one container on its way from Start to the end of Run. Its
// methods must not be called concurrently.
type Container struct {
	ID  string // 16 hex digits
	Dir string // below Options.StateDir

	o        Options
	lock     *os.File
	socket   *os.File // our end; nil once the order is given
	cmd      *exec.Cmd
	signals  signals       // caught from Run to Close
	done     chan struct{} // closed when init, or what it became, has ended
	filtered bool          // init is in a cgroup with the device filter
	keep     bool          // the container ran and what it wrote is to be kept
}

// Start makes a state directory and starts init, which then waits for Run.
// Call it as early as possible, and Close in any case.
func Start(o Options) (*Container, error) {
	if o.Runtime == "" {
		return nil, errors.New("no OCI runtime given")
	}
	dir, err := filepath.Abs(o.StateDir)
	if err != nil {
		return nil, err
	}
	o.StateDir = dir
	o.Mounts = slices.Clone(o.Mounts)
	for i, m := range o.Mounts { // init may let go of what a link lies on
		if real, err := filepath.EvalSymlinks(m.Source); err == nil {
			o.Mounts[i].Source = real
		}
	}
	c := &Container{o: o}
	if c.ID, c.Dir, c.lock, err = newStateDir(o.StateDir, !o.Remove); err != nil {
		return nil, fmt.Errorf("container state: %w", err)
	}
	if err := c.startInit(); err != nil {
		c.Close()
		return nil, fmt.Errorf("start container init: %w", err)
	}
	return c, nil
}

func (c *Container) startInit() error {
	if !initCalled {
		return errors.New("runtime.Init was not called in main")
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	c.socket = os.NewFile(uintptr(pair[0]), "container init")
	theirs := os.NewFile(uintptr(pair[1]), "container init")
	defer theirs.Close()
	cmd := &exec.Cmd{
		Path: "/proc/self/exe",
		Args: []string{initName, c.Dir, c.o.Runtime},
		// Init lives for a few milliseconds: no garbage collection, and no
		// threads to start for it.
		Env: []string{"PATH=" + os.Getenv("PATH"), "GOGC=off", "GOMAXPROCS=1"},
		// The lock goes along, so that the state stays locked as long as
		// the runtime lives. It lets no container have it.
		ExtraFiles: []*os.File{theirs, c.lock},
		SysProcAttr: &syscall.SysProcAttr{
			Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID,
			Pdeathsig:  syscall.SIGKILL,
		},
	}
	for _, m := range c.o.Mounts {
		cmd.Args = append(cmd.Args, m.Source)
	}
	// Without the filter the OCI runtime must make a cgroup of its own.
	if cgroup, err := deviceCgroup(c.ID); err == nil {
		defer cgroup.Close()
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(cgroup.Fd())
		c.filtered = true
	}
	// A nil *os.File must not become a non-nil interface.
	if c.o.Stdin != nil {
		cmd.Stdin = c.o.Stdin
	}
	if c.o.Stdout != nil {
		cmd.Stdout = c.o.Stdout
	}
	if c.o.Stderr != nil {
		cmd.Stderr = c.o.Stderr
	}
	started := make(chan error)
	done := make(chan struct{})
	go func() {
		// The kernel sends Pdeathsig when the thread that forked ends, so
		// that thread waits here.
		goruntime.LockOSThread()
		defer goruntime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // ProcessState tells
			close(done)
		}
	}()
	if err := <-started; err != nil {
		return err
	}
	c.cmd, c.done = cmd, done
	return nil
}

// command tells init what to become, and returns once it is that.
func (c *Container) command(o *order, lower *os.File) error {
	msg, err := json.Marshal(o)
	if err != nil {
		return err
	}
	if len(msg) > maxOrder {
		return fmt.Errorf("the path of %s is too long", c.Dir)
	}
	socket := c.socket
	c.socket = nil
	defer socket.Close()
	root, err := detach(lower)
	if err != nil {
		return err
	}
	err = unix.Sendmsg(int(socket.Fd()), msg, unix.UnixRights(int(root.Fd())), nil, unix.MSG_NOSIGNAL)
	root.Close()
	if err != nil {
		return fmt.Errorf("container init is gone: %w", err)
	}
	answer, err := io.ReadAll(io.LimitReader(socket, maxOrder)) // EOF is success: closed on exec
	if err != nil && !errors.Is(err, unix.ECONNRESET) {
		return err
	}
	if len(answer) > 0 {
		return errors.New(string(answer))
	}
	return nil
}

// detach returns a mount of lower's directory that is attached nowhere.
func detach(lower *os.File) (*os.File, error) {
	fd, err := unix.OpenTree(int(lower.Fd()), "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
	if errors.Is(err, unix.EINVAL) {
		// Before Linux 6.15 a detached mount cannot be cloned; it is one
		// already.
		fd, err = unix.FcntlInt(lower.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	}
	if err != nil {
		return nil, fmt.Errorf("clone the image's root: %w", err)
	}
	return os.NewFile(uintptr(fd), "lower"), nil
}

// Close ends a container whose Run was not called, and releases its state. It
// may be called again, and after Run.
func (c *Container) Close() error {
	if c.socket != nil {
		c.socket.Close()
		c.socket = nil
	}
	if c.done != nil {
		select {
		case <-c.done:
		default:
			_ = c.cmd.Process.Kill()
			<-c.done
		}
		c.done = nil
	}
	if c.lock == nil {
		return nil
	}
	if c.signals != nil {
		defer c.signals.release()
	}
	err := tidy(c.Dir, c.ID, c.keep)
	c.lock.Close()
	c.lock = nil
	return err
}

// isTerminal tells whether f is a terminal.
func isTerminal(f *os.File) bool {
	if f == nil {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
