package mount

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// fsContext configures a file system before it is mounted (fsopen(2)). Errors
// carry what the kernel said about them. After the first error all calls but
// close do nothing, and mount returns that error.
type fsContext struct {
	fs  string
	fd  int
	err error
}

func openContext(fs string) *fsContext {
	fd, err := unix.Fsopen(fs, unix.FSOPEN_CLOEXEC)
	c := &fsContext{fs: fs, fd: fd}
	if err != nil {
		c.fd = -1
		c.fail("fsopen", err)
	}
	return c
}

func (c *fsContext) close() {
	if c.fd >= 0 {
		_ = unix.Close(c.fd)
	}
}

func (c *fsContext) set(key, value string) {
	if c.err == nil {
		if err := unix.FsconfigSetString(c.fd, key, value); err != nil {
			c.fail("option "+key+"="+value, err)
		}
	}
}

// flag sets an option without a value, and tells whether the kernel knows it.
// An unknown one is no error.
func (c *fsContext) flag(key string) bool {
	if c.err != nil {
		return false
	}
	if err := unix.FsconfigSetFlag(c.fd, key); err != nil {
		c.messages() // of an unknown option: not to appear in a later error
		return false
	}
	return true
}

// create makes the super block. It may read from the source, and so block.
func (c *fsContext) create() error {
	if c.err == nil {
		if err := retryEINTR(func() error { return unix.FsconfigCreate(c.fd) }); err != nil {
			c.fail("create super block", err)
		}
	}
	return c.err
}

// mount creates the super block, unless that is done, and returns a detached
// mount of it, with MOUNT_ATTR_* attributes.
func (c *fsContext) mount(attr int) (*os.File, error) {
	if c.err != nil {
		return nil, c.err
	}
	fd, err := unix.Fsmount(c.fd, unix.FSMOUNT_CLOEXEC, attr)
	if err != nil {
		c.fail("fsmount", err)
		return nil, c.err
	}
	return os.NewFile(uintptr(fd), c.fs+" mount"), nil
}

func (c *fsContext) fail(what string, err error) {
	if errors.Is(err, unix.EPERM) && os.Geteuid() != 0 {
		err = fmt.Errorf("%w (needs root)", err)
	}
	if errors.Is(err, unix.ENODEV) && what == "fsopen" {
		err = fmt.Errorf("%w (the kernel has no %s, or its module is not loaded)", err, c.fs)
	}
	if said := c.messages(); said != "" {
		err = fmt.Errorf("%w (kernel: %s)", err, said)
	}
	c.err = fmt.Errorf("mount %s: %s: %w", c.fs, what, err)
}

// messages reads what the kernel has to say: one message a read, each with its
// level, "e " for an error, before it.
func (c *fsContext) messages() string {
	if c.fd < 0 {
		return ""
	}
	var all []string
	buf := make([]byte, 4096)
	for range 32 { // the kernel keeps 8
		n, err := unix.Read(c.fd, buf)
		if err != nil || n <= 0 {
			break
		}
		_, text, ok := strings.Cut(strings.TrimSpace(string(buf[:n])), " ")
		if ok {
			all = append(all, text)
		}
	}
	return strings.Join(all, "; ")
}

// retryEINTR calls f again while a signal interrupts it; the Go runtime sends
// signals to its own threads.
func retryEINTR(f func() error) error {
	for {
		if err := f(); err != unix.EINTR {
			return err
		}
	}
}

// Attach mounts a detached mount on directory dir of the caller's mount
// namespace. A detached mount can be attached once; afterwards f refers to the
// attached mount and keeps it busy for umount(8) until it is closed.
func Attach(f *os.File, dir string) error {
	err := unix.MoveMount(int(f.Fd()), "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH)
	if err != nil {
		return &os.PathError{Op: "attach mount", Path: dir, Err: err}
	}
	return nil
}
