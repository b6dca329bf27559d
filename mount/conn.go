package mount

import (
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/mount/fusedev"
)

// conn is a FUSE connection that is being served: a detached FUSE mount with
// one file in it.
type conn struct {
	server *fusedev.Server
	dev    *os.File      // /dev/fuse
	root   *os.File      // the mount (O_PATH); closed once EROFS holds the file
	abort  *os.File      // the connection's "abort" file in fusectl
	bdi    string        // of the FUSE super block, "0:52"
	done   chan struct{} // closed when serving has ended and dev is closed
	err    error         // of Serve; valid after done
}

// connect opens /dev/fuse, makes a super block for it and starts to serve.
//
// The kernel queues INIT while the super block is made and sends every other
// request only after its answer. Reading /dev/fuse before is an error, so the
// server starts right after; nothing here waits for an answer before that.
func connect(c fusedev.Content, o fusedev.Options) (_ *conn, err error) {
	server, err := fusedev.New(c, o)
	if err != nil {
		return nil, err
	}
	dev, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("mount fuse: %w", err)
	}
	defer closeOnError(&err, dev)

	fs := openContext("fuse")
	defer fs.close()
	fs.set("source", "shale")
	fs.set("fd", strconv.Itoa(int(dev.Fd())))
	fs.set("rootmode", "40000") // octal: a directory
	fs.set("user_id", "0")
	fs.set("group_id", "0")
	fs.set("max_read", strconv.Itoa(fusedev.MaxRead))
	if err := fs.create(); err != nil {
		return nil, err
	}
	root, err := fs.mount(unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return nil, err
	}
	defer closeOnError(&err, root)
	major, minor, err := device(root)
	if err != nil {
		return nil, err
	}
	abort, err := openAbort(major, minor)
	if err != nil {
		return nil, err
	}
	k := &conn{
		server: server, dev: dev, root: root, abort: abort,
		bdi: fmt.Sprintf("%d:%d", major, minor), done: make(chan struct{}),
	}
	go k.serve()
	return k, nil
}

func (k *conn) serve() {
	k.err = k.server.Serve(k.dev)
	_ = k.dev.Close()
	_ = k.abort.Close()
	close(k.done)
}

// stop ends the connection: requests that wait and all further ones fail. It
// does not wait, and is harmless at any time.
//
// The kernel does this too when the last descriptor of /dev/fuse is closed,
// but a thread blocked in read(2) holds one; the abort file reaches them all.
// It was opened with the connection, since its number in fusectl may be used
// again once this connection is gone.
func (k *conn) stop() error {
	if _, err := k.abort.Write([]byte("1")); err != nil && !errors.Is(err, os.ErrClosed) {
		select {
		case <-k.done:
		default:
			return fmt.Errorf("abort FUSE connection: %w", err)
		}
	}
	return nil
}

// openImage opens the served file.
func (k *conn) openImage() (*os.File, error) {
	var fd int
	err := retryEINTR(func() (err error) {
		fd, err = unix.Openat(int(k.root.Fd()), k.server.Name(), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open the image's FUSE file: %w", err)
	}
	return os.NewFile(uintptr(fd), k.server.Name()), nil
}

// openAbort opens fusectl's file by which a connection is aborted. Fusectl
// need not be mounted at /sys/fs/fuse/connections: a detached mount will do.
func openAbort(major, minor uint32) (*os.File, error) {
	fs := openContext("fusectl")
	defer fs.close()
	if err := fs.create(); err != nil {
		return nil, err
	}
	root, err := fs.mount(unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	name := strconv.FormatUint(uint64(major)<<20|uint64(minor), 10) + "/abort"
	fd, err := unix.Openat(int(root.Fd()), name, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open fusectl %s: %w", name, err)
	}
	return os.NewFile(uintptr(fd), "fusectl "+name), nil
}

// device returns st_dev of f without asking the file system.
func device(f *os.File) (major, minor uint32, err error) {
	var st unix.Statx_t
	err = unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, unix.STATX_TYPE, &st)
	if err != nil {
		return 0, 0, fmt.Errorf("statx %s: %w", f.Name(), err)
	}
	return st.Dev_major, st.Dev_minor, nil
}

func closeOnError(err *error, f *os.File) {
	if *err != nil {
		_ = f.Close()
	}
}
