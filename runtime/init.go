package runtime

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	goruntime "runtime"

	"golang.org/x/sys/unix"
)

// initName is the argv[0] by which a program knows that it is to be init. The other
// arguments are letGo's.
const initName = "shale-container-init"

// initSocket is the descriptor of init's end of the socket.
const initSocket = 3

// order is what Run tells init, together with the lower root's descriptor.
type order struct {
	Dir      string   // the container's state directory, which is also the bundle
	Overlay  []string // overlay options to try, the best first
	Crun     bool     // what Argv is, for its peculiarities
	OwnGroup bool     // leave the caller's process group
	Argv     []string // the runtime's command line
}

// maxOrder bounds an order, in bytes.
const maxOrder = 64 << 10

// initCalled keeps a program that forgot Init from starting itself, and that
// itself, for ever.
var initCalled bool

// The main goroutine of init stays on the main thread: PR_SET_PDEATHSIG is a
// setting of one thread, and an exec from another one would lose it. Only a
// package's init function can still say so.
func init() {
	if isInit() {
		goruntime.LockOSThread()
	}
}

func isInit() bool { return len(os.Args) > 0 && os.Args[0] == initName }

// Init must be the first thing a program that uses this package does in main.
// It returns unless this process was started to be a container's init; then
// it never does.
func Init() {
	if len(os.Args) == 0 || os.Args[0] != initName {
		initCalled = true
		return
	}
	unix.CloseOnExec(initSocket)
	err := initialize()
	// Whoever started us learns from the socket; if it is gone there is
	// nobody to tell.
	_ = unix.Send(initSocket, []byte(err.Error()), unix.MSG_NOSIGNAL)
	os.Exit(ExitFailed)
}

// initialize turns this process into the OCI runtime; it returns only errors.
func initialize() error {
	// Slave, so that what the host unmounts goes away here too, while nothing
	// mounted here shows up there.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	// The runtime looks its children up in /proc by the pids it knows.
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	if err := letGo(os.Args[1:]); err != nil {
		return fmt.Errorf("let go of the host's mounts: %w", err)
	}
	o, lower, err := receive()
	if err != nil {
		return err
	}
	if err := unix.Chdir(o.Dir); err != nil {
		return fmt.Errorf("chdir %s: %w", o.Dir, err)
	}
	if err := unix.MoveMount(lower, "", unix.AT_FDCWD, "lower", unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("attach the image's root: %w", err)
	}
	unix.Close(lower)
	if err := mountOverlay(&o); err != nil {
		return err
	}
	arrangeCgroups(o.Crun)
	if o.OwnGroup {
		if err := unix.Setpgid(0, 0); err != nil {
			return fmt.Errorf("setpgid: %w", err)
		}
	}
	// Only PATH: the runtimes act on NOTIFY_SOCKET, LISTEN_FDS and others.
	err = unix.Exec(o.Argv[0], o.Argv, []string{"PATH=" + os.Getenv("PATH")})
	return &os.PathError{Op: "exec", Path: o.Argv[0], Err: err}
}

// mountOverlay mounts rootfs. The paths are relative to the state directory,
// whose own path may thus have commas and colons.
func mountOverlay(o *order) error {
	var err error
	for _, extra := range o.Overlay {
		err = unix.Mount("overlay", "rootfs", "overlay", 0, "lowerdir=lower,upperdir=upper,workdir=work"+extra)
		if !errors.Is(err, unix.EINVAL) { // an option this kernel does not know
			break
		}
	}
	if err != nil {
		return fmt.Errorf("mount overlay in %s: %w", o.Dir, err)
	}
	return nil
}

// arrangeCgroups shows the runtime cgroups as it can bear them. What fails here
// the runtime will complain about if it minds.
func arrangeCgroups(crun bool) {
	var fs unix.Statfs_t
	if unix.Statfs(cgroupRoot, &fs) != nil {
		return
	}
	switch {
	case fs.Type == unix.CGROUP2_SUPER_MAGIC:
	case fs.Type != unix.TMPFS_MAGIC: // there are none, which neither can bear
		_ = unix.Mount("cgroup2", cgroupRoot, "cgroup2", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
	case crun: // refuses version 1 if there are controllers in version 2
		_ = unix.Unmount(cgroupRoot+"/unified", unix.MNT_DETACH)
	}
}

// receive waits for the order. If the starter goes away first it ends the
// process quietly.
func receive() (order, int, error) {
	buf, oob := make([]byte, maxOrder), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := recvmsg(initSocket, buf, oob)
	if err != nil {
		return order{}, -1, fmt.Errorf("receive: %w", err)
	}
	if n == 0 {
		os.Exit(0)
	}
	var o order
	if err := json.Unmarshal(buf[:n], &o); err != nil {
		return o, -1, fmt.Errorf("receive: %w", err)
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil || len(msgs) != 1 {
		return o, -1, fmt.Errorf("receive: want one descriptor (%v)", err)
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return o, -1, fmt.Errorf("receive: want one descriptor (%v)", err)
	}
	return o, fds[0], nil
}

// recvmsg is unix.Recvmsg that lets no signal interrupt it.
func recvmsg(fd int, p, oob []byte) (n, oobn, flags int, from unix.Sockaddr, err error) {
	for {
		n, oobn, flags, from, err = unix.Recvmsg(fd, p, oob, unix.MSG_CMSG_CLOEXEC)
		if err != unix.EINTR {
			return
		}
	}
}
