package mount

import (
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/mount/fusedev"
)

// server answers a FUSE connection. It has no other user, and keeps what it
// serves in use until Serve returns.
type server interface {
	Serve(dev *os.File) error
	Stats() fusedev.Stats
}

// conn is a FUSE connection that is being served: a detached FUSE mount, or one
// that fusermount3 attached.
type conn struct {
	server server
	dev    *os.File      // /dev/fuse
	root   *os.File      // the mount (O_PATH); nil if it is attached
	abort  *os.File      // the connection's "abort" file in fusectl; nil if not to be had
	number uint64        // of the FUSE super block: st_dev
	done   chan struct{} // closed when serving has ended and dev is closed
	err    error         // of Serve; valid after done
}

// superOptions are those of a FUSE super block.
type superOptions struct {
	source, subtype string
	maxRead         int
	attr            int  // MOUNT_ATTR_*
	shared          bool // for all users, with the kernel checking permissions
}

// connect opens /dev/fuse, makes a super block for it and starts to serve.
//
// The kernel queues INIT while the super block is made and sends every other
// request only after its answer. Reading /dev/fuse before is an error, so the
// server starts right after; nothing here waits for an answer before that.
func connect(server server, o superOptions) (_ *conn, err error) {
	dev, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("mount fuse: %w", err)
	}
	defer closeOnError(&err, dev)

	fs := openContext("fuse")
	defer fs.close()
	fs.set("source", o.source)
	if o.subtype != "" {
		fs.set("subtype", o.subtype)
	}
	fs.set("fd", strconv.Itoa(int(dev.Fd())))
	fs.set("rootmode", "40000") // octal: a directory
	fs.set("user_id", "0")
	fs.set("group_id", "0")
	fs.set("max_read", strconv.Itoa(o.maxRead))
	if o.shared {
		fs.flag("allow_other")
		fs.flag("default_permissions")
	}
	if err := fs.create(); err != nil {
		return nil, err
	}
	root, err := fs.mount(unix.MOUNT_ATTR_RDONLY | o.attr)
	if err != nil {
		return nil, err
	}
	defer closeOnError(&err, root)
	k := &conn{server: server, dev: dev, root: root, done: make(chan struct{})}
	if k.number, err = device(int(root.Fd()), ""); err != nil {
		return nil, err
	}
	if k.abort, err = openAbort(k.number); err != nil {
		return nil, err
	}
	go k.serve()
	return k, nil
}

// bdi is the name of the FUSE super block's backing device, "0:52".
func (k *conn) bdi() string {
	return fmt.Sprintf("%d:%d", unix.Major(k.number), unix.Minor(k.number))
}

func (k *conn) serve() {
	k.err = k.server.Serve(k.dev)
	_ = k.dev.Close()
	if k.abort != nil {
		_ = k.abort.Close()
	}
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
	if k.abort == nil {
		return nil
	}
	if _, err := k.abort.Write([]byte("1")); err != nil && !errors.Is(err, os.ErrClosed) {
		select {
		case <-k.done:
		default:
			return fmt.Errorf("abort FUSE connection: %w", err)
		}
	}
	return nil
}

// openAbort opens fusectl's file by which a connection is aborted. Fusectl
// need not be mounted at /sys/fs/fuse/connections: a detached mount will do.
func openAbort(number uint64) (*os.File, error) {
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
	name := abortName(number)
	fd, err := unix.Openat(int(root.Fd()), name, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open fusectl %s: %w", name, err)
	}
	return os.NewFile(uintptr(fd), "fusectl "+name), nil
}

// abortName is the file's path in fusectl: a connection's name there is the
// device number of its super block, as the kernel keeps it.
func abortName(number uint64) string {
	return strconv.FormatUint(uint64(unix.Major(number))<<20|uint64(unix.Minor(number)), 10) + "/abort"
}

// device returns st_dev of a path at dir without asking the file system.
func device(dir int, path string) (uint64, error) {
	var st unix.Statx_t
	err := unix.Statx(dir, path, unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC|unix.AT_NO_AUTOMOUNT, unix.STATX_TYPE, &st)
	if err != nil {
		return 0, &os.PathError{Op: "statx", Path: path, Err: err}
	}
	return unix.Mkdev(st.Dev_major, st.Dev_minor), nil
}

func closeOnError(err *error, f *os.File) {
	if *err != nil {
		_ = f.Close()
	}
}
