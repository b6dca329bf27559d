package mount

import (
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// attachLoop makes a read-only loop device of f and opens it. The device goes
// away with its last user: the returned file, or a mount.
func attachLoop(f *os.File, directIO bool) (*os.File, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if info.Size()%512 != 0 {
		return nil, fmt.Errorf("loop device on %s: size %d is not a multiple of 512", f.Name(), info.Size())
	}
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("loop device: %w", err)
	}
	defer control.Close()
	config := unix.LoopConfig{Fd: uint32(f.Fd())}
	config.Info.Flags = unix.LO_FLAGS_READ_ONLY | unix.LO_FLAGS_AUTOCLEAR
	if directIO {
		config.Info.Flags |= unix.LO_FLAGS_DIRECT_IO // dropped by the kernel if f cannot
	}
	copy(config.Info.File_name[:len(config.Info.File_name)-1], f.Name())
	for range 100 { // another process may take the free one first
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("loop device: find a free one: %w", err)
		}
		loop, err := os.OpenFile("/dev/loop"+strconv.Itoa(n), os.O_RDONLY, 0)
		if err != nil {
			return nil, fmt.Errorf("loop device: %w", err)
		}
		err = retryEINTR(func() error { return unix.IoctlLoopConfigure(int(loop.Fd()), &config) })
		if err == nil {
			return loop, nil
		}
		_ = loop.Close()
		if err != unix.EBUSY {
			return nil, fmt.Errorf("loop device: attach %s to %s: %w", f.Name(), loop.Name(), err)
		}
	}
	return nil, fmt.Errorf("loop device: attach %s: every free device was taken by others", f.Name())
}
