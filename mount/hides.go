package mount

import (
	"context"
	"errors"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// EROFS reads a file of which a block cannot be had. If it goes through that file's page
// cache the blocks before it are read, and what comes back is less than it has asked for.
// Some kernels take that for the end of the file, and show zeros: Linux 6.12.43, 6.16.12
// and 6.17.13 do, 6.12.117 and 6.18.44 do not. Reads that bypass the page cache, and loop
// devices, tell of the error in all of them.

var errHidden = errors.New("EROFS shows zeros where the file it reads has an error")

// Try is how this process finds that out, TryKernel by default. To try it is to serve a
// mount and to read it: a process that is killed meanwhile waits for itself, and is never
// quite dead. Who may be killed at any moment has another process try. Set it before all
// mounts.
var Try = TryKernel

// tellsErrors returns nil if this kernel was seen to tell of such an error, when it was
// tried for the first time.
var tellsErrors = sync.OnceValue(func() error { return Try() })

// Ready finds out what mounts need to know of the kernel, once. That takes some 5 ms,
// or 20 if another process has to, which the first mount would take; nobody has to call it.
func Ready() { _ = tellsErrors() }

// TryKernel tries whether the kernel tells of errors, and returns nil if it does.
func TryKernel() error {
	m, err := makeDevice(context.Background(), badBlock{probeImage()}, Options{Options: probeOptions, Backing: File, Buffered: true})
	if err != nil {
		return err
	}
	n, err := readProbe(m)
	err = errors.Join(err, m.Close())
	<-m.Done()
	if err == nil && n == probeBlocks*4096 {
		return errHidden
	}
	return err
}

// readProbe returns how much of the file there is to read.
func readProbe(m *Mounted) (int, error) {
	fd, err := unix.Openat(int(m.FD().Fd()), probeFile, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, &os.PathError{Op: "open", Path: probeFile, Err: err}
	}
	defer unix.Close(fd)
	n, err := unix.Pread(fd, make([]byte, probeBlocks*4096), 0)
	if err == unix.EIO {
		return 0, nil
	}
	return n, err
}

// badBlock is an image whose last block cannot be had.
type badBlock struct{ bytesContent }

func (b badBlock) has(p []byte, off int64) bool { return off+int64(len(p)) <= b.Size()-4096 }

func (b badBlock) TryReadAt(p []byte, off int64) (bool, error) {
	if !b.has(p, off) {
		return false, nil
	}
	return b.bytesContent.TryReadAt(p, off)
}

func (b badBlock) ReadAt(context.Context, []byte, int64) error { return errHidden }
