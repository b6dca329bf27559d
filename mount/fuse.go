package mount

import (
	"cmp"
	"context"
	"errors"
	"os"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/mount/fusedev"
	"github.com/shale-image/shale/mount/fusetree"
)

// ErrNeedsDir says that a face can only mount at a directory it is told of.
var ErrNeedsDir = errors.New("without root the image can only be mounted at a directory, not handed out")

// Fuse shows the image whose EROFS metadata is the file meta, and whose flat
// address space c provides, through FUSE alone. As root the mount is detached
// and for all users, who have the rights that modes and ACLs say; otherwise
// fusermount3 attaches it at Options.Dir, for the calling user only, who may
// read everything, and set-user-ID bits and device nodes are without effect.
//
// c is read during the call, and from then on until Done is closed. If ctx
// ends first the call fails; later ctx has no effect.
func Fuse(ctx context.Context, meta string, c fusedev.Content, o Options) (_ *Mounted, err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	root := os.Geteuid() == 0
	if !root && o.Dir == "" {
		return nil, ErrNeedsDir
	}
	f, err := os.Open(meta)
	if err != nil {
		return nil, err
	}
	defer closeOnError(&err, f)
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	tree, err := fusetree.New(f, info.Size(), c, fusetree.Options{
		Name: o.Name, ReadTimeout: o.ReadTimeout, OwnerOnly: !root, Logger: o.Logger,
	})
	if err != nil {
		return nil, err
	}
	source := o.Name
	if source == "" {
		source = "shale"
	}
	var k *conn
	if root {
		k, err = connect(treeServer{tree, f}, superOptions{source: source, subtype: "shale", maxRead: fusetree.MaxRead, shared: true})
	} else {
		k, err = connectAt(treeServer{tree, f}, o.Dir, source)
	}
	if err != nil {
		return nil, err
	}
	if root {
		settle(int(k.root.Fd()), ".")
	} else {
		settle(unix.AT_FDCWD, o.Dir)
	}
	setReadAhead(k.bdi(), cmp.Or(o.ReadAheadKiB, ReadAhead))
	return &Mounted{fd: k.root, dev: k.number, bdi: k.bdi(), done: k.done, conn: k, stop: tree.Abort}, nil
}

// settle makes the kernel learn that files are always ready to be read, which it
// asks about once a connection. If a file that this process opens were the
// first, the question would come from within the Go runtime, which then cannot
// answer it: the process would hang for ever. The library knows a file for
// this, in the root.
func settle(dir int, path string) {
	fd, err := unix.Openat(dir, path+"/.go-fuse-epoll-hack", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return // the connection has ended; that is told elsewhere
	}
	_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
	_ = unix.Close(fd)
}

// treeServer closes the metadata when nobody needs it any longer.
type treeServer struct {
	*fusetree.Server
	meta *os.File
}

func (s treeServer) Serve(dev *os.File) error {
	defer s.meta.Close()
	return s.Server.Serve(dev)
}
