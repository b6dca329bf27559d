package daemon

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/link"
	"github.com/shale-image/shale/pool"
	"github.com/shale-image/shale/reader"
)

// An index is read and linked in a process of its own, and so are layers that
// have none. That takes the memory of the whole tree, which the service, that
// stays, need not have; and whatever hostile bytes do to it, the service's
// mounts live on (child.go).

// order is what to link where.
type order struct {
	Raw  reader.Raw `json:"raw"`
	Pool string     `json:"pool"` // directory
	Dir  string     `json:"dir"`  // to link into
}

// readOrder reads an order about a file, and opens the pool, which the caller closes.
func readOrder(fd int) (o order, p *pool.Pool, err error) {
	if err = json.NewDecoder(os.Stdin).Decode(&o); err != nil {
		return o, nil, err
	}
	o.Raw.File = os.NewFile(uintptr(fd), o.Raw.Name)
	p, err = pool.OpenTables(o.Pool)
	return o, p, err
}

// readTree reads the index of an order. What of the content has come with it goes
// into the pool.
func (o *order) readTree(p *pool.Pool) (*index.Tree, error) {
	if o.Raw.Kind != reader.SOCI {
		return o.Raw.Tree()
	}
	b, err := p.Build()
	if err != nil {
		return nil, err
	}
	o.Raw.Keep = b.Add
	t, err := o.Raw.Tree()
	if err != nil {
		return nil, errors.Join(err, b.Abort())
	}
	_, err = b.Commit()
	return t, err
}

func linker() (err error) {
	warm()
	fd, err := takeFile()
	if err != nil {
		return err
	}
	o, p, err := readOrder(fd)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.Close()) }()
	t, err := o.readTree(p)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if err := keepData(filepath.Join(filepath.Dir(o.Dir), sideDir), t); err != nil {
		return err
	}
	return link.Link(ctx, t, p, o.Dir)
}

// keepData keeps what a tree has of blobs that no repository has.
func keepData(dir string, t *index.Tree) error {
	for i := range t.Blobs {
		if b := &t.Blobs[i]; b.Data != nil {
			if err := keepBeside(dir, b.Digest, bytes.NewReader(b.Data)); err != nil {
				return err
			}
		}
	}
	return nil
}

// linkProcess is a linker that waits for its order. To start one takes 5 ms, in which the
// index is on its way.
type linkProcess struct {
	to    *os.File // a socket, the other end is its standard input; nil once it has its order
	ended chan error
}

// firstHeap is what a linker has of memory before its order comes, in bytes, and when its
// collector begins: an image of 10,000 files takes 16 MiB. On a virtual machine that saves
// 12 of the 30 ms of linking it, most of them page faults.
const firstHeap = 32 << 20

// warm readies this process for its order while it has nothing else to do.
func warm() {
	limit := debug.SetMemoryLimit(-1)
	p := make([]byte, min(firstHeap, limit/4))
	_ = unix.Madvise(p, unix.MADV_POPULATE_WRITE)
	runtime.GC() // what is free now is the process' still
	percent := debug.SetGCPercent(-1)
	debug.SetMemoryLimit(min(firstHeap, limit))
	runtime.SetFinalizer(new([64]byte), func(*[64]byte) { // when the collector has begun
		debug.SetGCPercent(percent)
		debug.SetMemoryLimit(limit)
	})
}

// startLinker starts one. The caller closes it.
func (s *store) startLinker(ctx context.Context) (*linkProcess, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	in := os.NewFile(uintptr(fds[1]), "orders")
	l := &linkProcess{os.NewFile(uintptr(fds[0]), "orders"), make(chan error, 1)}
	go func() {
		_, err := s.run(ctx, "shale-linker", in)
		in.Close()
		l.ended <- err
	}()
	return l, nil
}

// close ends a linker, if there is one, that has had no order.
func (l *linkProcess) close() {
	if l != nil && l.to != nil {
		l.to.Close()
		l.to = nil
		<-l.ended
	}
}

// run gives a linker its order, with the file that it is about.
func (l *linkProcess) run(o order, f *os.File) error {
	return errors.Join(l.give(o, f), <-l.ended)
}

func (l *linkProcess) give(o order, f *os.File) error {
	to := l.to
	l.to = nil
	defer to.Close()
	js, err := json.Marshal(o)
	if err != nil {
		return err
	}
	if err := unix.Sendmsg(int(to.Fd()), []byte{' '}, unix.UnixRights(int(f.Fd())), nil, unix.MSG_NOSIGNAL); err != nil {
		return os.NewSyscallError("sendmsg", err)
	}
	_, err = to.Write(js)
	return err
}

// takeFile takes the file that an order is about, which comes before it.
func takeFile() (fd int, err error) {
	space, oob := make([]byte, 1), make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(int(os.Stdin.Fd()), space, oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return 0, os.NewSyscallError("recvmsg", err)
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) != 1 {
		return 0, errors.New("no order has come")
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return 0, errors.New("an order has come without a file")
	}
	return fds[0], nil
}

// linkRaw has an index read and linked into dir, by a linker that waits, if there is one.
// It appears whole or not at all.
func (s *store) linkRaw(ctx context.Context, l *linkProcess, raw *reader.Raw, dir string) error {
	defer s.pool.Exclusive()()
	if err := ctx.Err(); err != nil {
		return err
	}
	if l == nil || l.to == nil {
		var err error
		if l, err = s.startLinker(ctx); err != nil {
			return err
		}
	}
	err := l.run(order{Raw: *raw, Pool: s.poolDir, Dir: dir}, raw.File)
	// What a process made that was killed is the pool's too: the next link of
	// the image refers to it, or the next removal frees it.
	loaded := s.pool.Load()
	if err != nil {
		return fmt.Errorf("link %s: %w", raw.Name, err)
	}
	return loaded
}
