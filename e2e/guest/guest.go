// Package guest begins the first process of a test's virtual machine: the commands of
// e2e/powercut and e2e/sealed. It knows nothing of what they show.
package guest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// SetUp mounts what programs expect of a system, loads what drives the disk, from /modules
// in the order of the files' names, and mounts the disk, an ext4.
func SetUp(disk string) error {
	for _, m := range []struct{ what, where, kind string }{
		{"proc", "/proc", "proc"}, {"dev", "/dev", "devtmpfs"}, {"sys", "/sys", "sysfs"}, {"run", "/run", "tmpfs"}, {"tmp", "/tmp", "tmpfs"},
	} {
		if err := os.MkdirAll(m.where, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.what, m.where, m.kind, 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s: %w", m.where, err)
		}
	}
	modules, err := filepath.Glob("/modules/*.ko")
	if err != nil {
		return err
	}
	for _, path := range modules {
		if err := load(path); err != nil {
			return fmt.Errorf("load %s: %w", path, err)
		}
	}
	if err := os.MkdirAll(disk, 0o755); err != nil {
		return err
	}
	for tries := 0; ; tries++ {
		err := unix.Mount("/dev/vda", disk, "ext4", 0, "")
		if err == nil || tries == 100 || !errors.Is(err, unix.ENOENT) {
			return err // the disk is found at once, or a moment later
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func load(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.ENODEV) {
		return err
	}
	return nil
}

// Stay never returns: the kernel would panic without its first process.
func Stay() {
	for {
		time.Sleep(time.Hour)
	}
}
