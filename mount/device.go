package mount

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/mount/fusedev"
)

// Backing is what lies between EROFS and a file.
type Backing uint8

// The backings.
const (
	Auto Backing = iota // File, and Loop if the kernel cannot (before Linux 6.12)
	File                // EROFS reads the file itself
	Loop                // a loop device, which goes away with the mount
)

// Options tunes a mount. The zero value is what is recommended.
type Options struct {
	fusedev.Options         // for Device; Name also becomes the source shown in mount tables
	Backing         Backing // how EROFS gets at files
	ReadAheadKiB    int     // of EROFS and FUSE; 0 leaves the kernel's 128. No effect with Loop, nor if /sys is read-only
	Buffered        bool    // for Device: cache data in the FUSE file too, not only in EROFS: 1.4 instead of 1.8 GB/s, and twice the memory
}

// Mounted is an EROFS mount whose bytes this process serves.
type Mounted struct {
	fd   *os.File
	conn *conn
}

// Device mounts the EROFS image whose flat address space c provides, read-only
// and detached. c is read during the call, and from then on until Done is
// closed. If ctx ends first the call fails; later ctx has no effect.
//
// The mount shows device nodes and honours set-user-ID bits; whoever attaches
// it restricts that (mount_setattr(2)).
func Device(ctx context.Context, c fusedev.Content, o Options) (_ *Mounted, err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	k, err := connect(c, o.Options)
	if err != nil {
		return nil, err
	}
	unwatch := context.AfterFunc(ctx, func() { _ = k.stop() })
	fd, err := k.mountImage(o)
	_ = k.root.Close()
	if !unwatch() {
		err = errors.Join(ctx.Err(), err)
	}
	if err != nil {
		if fd != nil {
			_ = fd.Close()
		}
		_ = k.stop()
		<-k.done
		return nil, err
	}
	return &Mounted{fd, k}, nil
}

// mountImage mounts EROFS from the served file. No lock is held but, if a
// readahead is asked for, readAheadMu: the kernel reads the super block and
// the root directory from our own server meanwhile.
func (k *conn) mountImage(o Options) (*os.File, error) {
	setReadAhead(k.bdi, o.ReadAheadKiB)
	// A path through the mount's descriptor, which the kernel shows as the
	// mount's source: end it in the image's name.
	path := fmt.Sprintf("/proc/self/fd/%d/%s", k.root.Fd(), k.server.Name())
	if o.Backing != Loop {
		fd, err := mountFile(path, nil, !o.Buffered, o.ReadAheadKiB)
		if o.Backing == File || !errors.Is(err, unix.ENOTBLK) {
			return fd, err
		}
	}
	image, err := k.openImage()
	if err != nil {
		return nil, err
	}
	defer image.Close()
	loop, err := attachLoop(image, !o.Buffered)
	if err != nil {
		return nil, err
	}
	defer loop.Close() // the mount holds the device now, or nobody does
	return mountFile(loop.Name(), nil, false, 0)
}

// FD returns the detached mount, for Attach or to pass to another process. It
// is m's own: Close closes it.
func (m *Mounted) FD() *os.File { return m.fd }

// Close gives up FD. A mount that was attached, and readers in it, live on and
// are served; otherwise Done is soon closed. Until Close, FD keeps the mount
// busy for umount(8). It may be called more than once.
func (m *Mounted) Close() error {
	if err := m.fd.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}

// Done is closed when the connection has ended and Content is no longer used:
// the last reference to the mount is gone, wherever it was (FD, mounts in any
// namespace, open files, mappings), or after Abort.
func (m *Mounted) Done() <-chan struct{} { return m.conn.done }

// Err returns nil before Done is closed, and then why serving ended, nil
// unless /dev/fuse could not be read.
func (m *Mounted) Err() error {
	select {
	case <-m.conn.done:
		return m.conn.err
	default:
		return nil
	}
}

// Abort makes every read that waits, and every later one of what the kernel
// has not cached, fail with an error (EIO, SIGBUS for mappings). It does not
// wait for Content, but Done does. The mount stays where it is attached.
func (m *Mounted) Abort() error { return m.conn.stop() }

// Stats counts the requests of the kernel so far.
func (m *Mounted) Stats() fusedev.Stats { return m.conn.server.Stats() }

// Direct mounts the EROFS metadata file meta, whose data lies in the files
// devices in the order of its device slots, read-only and detached. The files
// must be complete, and must not change while the mount lives: nobody stands
// between them and the readers.
func Direct(meta string, devices []string, o Options) (*os.File, error) {
	if o.Backing != Loop {
		fd, err := mountFile(meta, devices, false, o.ReadAheadKiB)
		if o.Backing == File || !errors.Is(err, unix.ENOTBLK) {
			return fd, err
		}
	}
	loops := make([]string, 0, 1+len(devices))
	for _, path := range append([]string{meta}, devices...) {
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		loop, err := attachLoop(f, false)
		_ = f.Close()
		if err != nil {
			return nil, err
		}
		defer loop.Close()
		loops = append(loops, loop.Name())
	}
	return mountFile(loops[0], loops[1:], false, 0)
}

// maxValue is the longest value that fsconfig(2) takes.
const maxValue = 255

// mountFile mounts EROFS from a file or block device.
func mountFile(source string, devices []string, directIO bool, readAheadKiB int) (*os.File, error) {
	fs := openContext("erofs")
	defer fs.close()
	setPath := func(key, path string) *os.File {
		if len(path) <= maxValue {
			fs.set(key, path)
			return nil
		}
		f, err := os.OpenFile(path, unix.O_PATH, 0)
		if err != nil {
			fs.fail(key, err)
			return nil
		}
		fs.set(key, "/proc/self/fd/"+strconv.Itoa(int(f.Fd())))
		return f
	}
	// The kernel opens the paths when it creates the super block. Close of a
	// nil file is harmless.
	defer setPath("source", source).Close()
	for _, d := range devices {
		defer setPath("device", d).Close()
	}
	fs.flag("ro") // or a read-only block device is refused
	if directIO {
		fs.flag("directio") // before 6.15 or so there is none: correct all the same, but caches data twice
	}
	if err := createWithReadAhead(fs, readAheadKiB); err != nil {
		return nil, err
	}
	return fs.mount(unix.MOUNT_ATTR_RDONLY)
}
