package mount

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
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
	fusedev.Options         // for Device and Fuse; Name also becomes the source shown in mount tables
	Dir             string  // for Fuse without root: an absolute path, where to attach the mount
	Backing         Backing // how EROFS gets at files
	// ReadAheadKiB is the kernel's readahead, of EROFS and FUSE; 0 is ReadAhead where we serve
	// the mount, else the kernel's 128. With Buffered FUSE has none. No effect with Loop, nor
	// if /sys is read-only.
	ReadAheadKiB int
	// Keep, if not nil, is called for Device when there is a connection, and before
	// anything waits for it. An error fails the mount.
	Keep func(Connection) error
	// Watch is called for Fanotify before there is a mount; see there. Nil is refused.
	Watch func(Watching) error
	// Buffered, for Device, has data cached in the FUSE file too, not only in EROFS: 1.4
	// instead of 1.8 GB/s, and twice the memory. Options.Around needs it. Neither is done
	// where the kernel would show zeros for what cannot be had (Capabilities.TellsErrors).
	Buffered bool
}

// ReadAhead is the kernel's readahead of a mount that we serve, in KiB: what it reads and
// nobody asked for may have to be fetched. Of what is here as much is read in a second with
// it as with 128.
const ReadAhead = 32

func (o *Options) logger() *slog.Logger {
	if o.Logger == nil {
		return slog.Default()
	}
	return o.Logger
}

// Device mounts the EROFS image whose flat address space c provides, read-only
// and detached. c is read during the call, and from then on until Done is
// closed. If ctx ends first the call fails; later ctx has no effect.
//
// The mount shows device nodes and honours set-user-ID bits; whoever attaches
// it restricts that (mount_setattr(2)).
func Device(ctx context.Context, c fusedev.Content, o Options) (*Mounted, error) {
	if o.Buffered && o.Backing != Loop && tellsErrors() != nil {
		o.Buffered, o.Around = false, nil
	}
	o.ReadAheadKiB = cmp.Or(o.ReadAheadKiB, ReadAhead)
	return makeDevice(ctx, c, o)
}

func makeDevice(ctx context.Context, c fusedev.Content, o Options) (_ *Mounted, err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	server, err := fusedev.New(c, o.Options)
	if err != nil {
		return nil, err
	}
	k, err := connect(server, superOptions{
		source: "shale", maxRead: fusedev.MaxRead,
		attr: unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC,
	})
	if err != nil {
		return nil, err
	}
	unwatch := context.AfterFunc(ctx, func() { _ = k.stop() })
	var fd *os.File
	var bdi string
	if o.Keep != nil {
		err = o.Keep(Connection{Dev: k.dev, Abort: k.abort, Number: k.number})
	}
	if err == nil {
		fd, bdi, err = k.mountImage(server.Name(), o)
	}
	_ = k.root.Close()
	if !unwatch() {
		err = errors.Join(ctx.Err(), err)
	}
	var m *Mounted
	if err == nil {
		m, err = newMounted(fd, k, bdi)
	}
	if err != nil {
		if fd != nil {
			_ = fd.Close()
		}
		_ = k.stop()
		<-k.done
		return nil, err
	}
	return m, nil
}

// mountImage mounts EROFS from the served file. No lock is held but that of
// lockDevices: the kernel reads the super block and the root directory from our own
// server meanwhile.
func (k *conn) mountImage(name string, o Options) (fd *os.File, bdi string, err error) {
	switch {
	case o.ReadAheadKiB > 0 && o.Buffered:
		// With any, the kernel reads on behind what EROFS has asked for once it takes that
		// for a stream: other files, which nobody reads.
		setReadAhead(k.bdi(), 0)
	case o.ReadAheadKiB > 0:
		setReadAhead(k.bdi(), o.ReadAheadKiB)
	}
	// A path through the mount's descriptor, which the kernel shows as the
	// mount's source: end it in the image's name.
	path := fmt.Sprintf("/proc/self/fd/%d/%s", k.root.Fd(), name)
	if o.Backing != Loop {
		fd, bdi, err := mountFile(path, nil, !o.Buffered, o.ReadAheadKiB)
		if o.Backing == File || !errors.Is(err, unix.ENOTBLK) {
			return fd, bdi, err
		}
	}
	image, err := k.openImage(name)
	if err != nil {
		return nil, "", err
	}
	defer image.Close()
	loop, err := attachLoop(image, !o.Buffered)
	if err != nil {
		return nil, "", err
	}
	defer loop.Close() // the mount holds the device now, or nobody does
	return mountFile(loop.Name(), nil, false, 0)
}

// openImage opens the served file.
func (k *conn) openImage(name string) (*os.File, error) {
	var fd int
	err := retryEINTR(func() (err error) {
		fd, err = unix.Openat(int(k.root.Fd()), name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open the image's FUSE file: %w", err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// maxValue is the longest value that fsconfig(2) takes.
const maxValue = 255

// mountFile mounts EROFS from a file or block device. It returns the backing
// device whose readahead was set, "" if none was.
func mountFile(source string, devices []string, directIO bool, readAheadKiB int) (fd *os.File, bdi string, err error) {
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
	if bdi, err = createWithReadAhead(fs, readAheadKiB); err != nil {
		return nil, "", err
	}
	fd, err = fs.mount(unix.MOUNT_ATTR_RDONLY)
	return fd, bdi, err
}
