package fusedev

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Content is the bytes of the served file. Its methods are called from many
// goroutines at a time, never with an empty p or one larger than MaxRead, and
// always with [off, off+len(p)) inside [0, Size()). They must not keep p.
type Content interface {
	// Size is the file's length in bytes; it must not change.
	Size() int64
	// TryReadAt fills p from off and returns true if every byte is at hand
	// on the node. It returns false, and may have written to p, if that
	// would mean to wait, say for a network. An error is told to the reader
	// as EIO.
	TryReadAt(p []byte, off int64) (bool, error)
	// ReadAt fills p from off completely or returns an error. It may wait
	// until ctx ends, and must return soon after: until it does, the
	// connection's end is not reported.
	ReadAt(ctx context.Context, p []byte, off int64) error
}

// Options tunes a Server. The zero value is what is recommended.
type Options struct {
	Name        string        // the file's name in the root directory; default "image"
	Threads     int           // OS threads that read requests and answer hits; default 2
	MaxInflight int           // misses in work at a time, each with a buffer of up to 1 MiB; default 64
	ReadTimeout time.Duration // after which a miss is answered with EIO; default 1 minute
	DirectIO    bool          // FOPEN_DIRECT_IO: reads by others than the page cache itself bypass it
	Logger      *slog.Logger  // default slog.Default()
	// Around, if not nil, has the kernel given what lies around a READ and is at
	// hand: readahead without waiting. The file has to be read through its page cache
	// (not DirectIO), and without the kernel's readahead, for that to be of use.
	Around Around
}

// Around knows what whoever reads some bytes may want next.
type Around interface {
	// Extent returns which part of [from, to), which has off, belongs together with
	// what is at off.
	Extent(off, from, to int64) (int64, int64)
	// Peek fills p from off and returns true if all of it is at hand, as TryReadAt
	// does, but for nobody who reads.
	Peek(p []byte, off int64) bool
}

// maxBackground is how many asynchronous requests (readahead, direct reads of
// EROFS) the kernel sends before it makes further ones wait, hits too. So it
// must exceed any plausible number of misses that wait for a slow network.
const maxBackground = 4096

// Server serves one Content over one connection. Use New.
type Server struct {
	content     Content
	size        int64
	name        string
	threads     int
	maxInflight int
	timeout     time.Duration
	openFlags   uint32
	log         *slog.Logger

	ctx    context.Context // ends with the connection
	cancel context.CancelFunc
	queue  missQueue
	push   *pusher // nil without Options.Around

	conn struct { // guards the descriptor against use after Serve, when its number may be another file's
		sync.RWMutex
		fd int // -1: not serving
	}
	served               atomic.Bool
	hits, misses, errors atomic.Int64
	quietUntil           atomic.Int64 // Unix nanoseconds; see failed
}

// New makes a server for one connection. It starts nothing.
func New(c Content, o Options) (*Server, error) {
	if o.Name == "" {
		o.Name = "image"
	}
	if len(o.Name) > 255 || strings.ContainsAny(o.Name, "/\x00") || o.Name == "." || o.Name == ".." {
		return nil, fmt.Errorf("fuse: %q is not a file name", o.Name)
	}
	if c.Size() < 0 {
		return nil, fmt.Errorf("fuse: size of %s is %d", o.Name, c.Size())
	}
	if o.Threads <= 0 {
		o.Threads = 2
	}
	if o.MaxInflight <= 0 {
		o.MaxInflight = 64
	}
	if o.ReadTimeout <= 0 {
		o.ReadTimeout = time.Minute
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	s := &Server{
		content:     c,
		size:        c.Size(),
		name:        o.Name,
		threads:     o.Threads,
		maxInflight: o.MaxInflight,
		timeout:     o.ReadTimeout,
		openFlags:   openKeepCache | openNoFlush,
		log:         o.Logger,
	}
	if o.DirectIO {
		s.openFlags |= openDirectIO
	}
	s.conn.fd = -1
	s.ctx, s.cancel = context.WithCancel(context.Background())
	if o.Around != nil {
		s.push = &pusher{server: s, around: o.Around, queue: make(chan int64, pushQueue)}
	}
	return s, nil
}

// Steady says that a start is over: Options.Around goes on to be used as readahead is, and
// what the kernel has of the file is given back from time to time, since who reads it has a
// copy.
func (s *Server) Steady() {
	if s.push != nil {
		s.push.steady.Store(true)
	}
}

// Name returns the file's name in the root directory of the connection.
func (s *Server) Name() string { return s.name }

// Serve answers the requests of a connection whose FUSE file system exists
// (before that, reading /dev/fuse is an error). It returns nil once the
// connection has ended, by the last unmount or an abort, and every call of
// Content has returned; it returns an error if dev cannot be read. It may be
// called once. The caller keeps dev and closes it afterwards.
func (s *Server) Serve(dev *os.File) error {
	if s.served.Swap(true) {
		return errors.New("fuse: Serve was called twice")
	}
	fd := int(dev.Fd())
	s.conn.Lock()
	s.conn.fd = fd
	s.conn.Unlock()
	if s.push != nil {
		s.queue.workers.Go(s.push.run)
	}
	errs := make([]error, s.threads)
	var wg sync.WaitGroup
	for i := range errs {
		wg.Go(func() { errs[i] = s.loop(fd) })
	}
	wg.Wait()
	s.conn.Lock()
	s.conn.fd = -1
	s.conn.Unlock()
	s.cancel()
	s.queue.workers.Wait()
	runtime.KeepAlive(dev)
	return errors.Join(errs...)
}

// loop reads requests and answers them until the connection ends. It owns its
// OS thread: a 4 KiB read through EROFS took 17 us so, and 19 us without.
func (s *Server) loop(fd int) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	in, err := mapPages(requestSize)
	if err != nil {
		return err
	}
	defer unix.Munmap(in)
	// Every page has to be there before the kernel copies to it. One that is not costs
	// a reader EIO if we are killed just then: the kernel has taken its request off the
	// queue and gives up a page fault of whoever is to die.
	clear(in)
	_ = unix.Mlock(in) // so that it stays; not all may
	for {
		n, err := unix.Read(fd, in)
		switch err {
		case nil:
			s.serve(in[:n])
		case unix.ENODEV, unix.ECONNABORTED:
			return nil // unmounted, aborted
		case unix.EINTR, unix.EAGAIN, unix.ENOENT: // ENOENT: the request was given up while we read it
		case unix.EPERM, unix.EINVAL, unix.EBADF:
			return fmt.Errorf("fuse: read /dev/fuse: %w", err) // not a connection
		default:
			// Short of memory, say. To stop would hang every reader.
			s.log.Error("fuse: read /dev/fuse", "err", err)
			time.Sleep(10 * time.Millisecond)
		}
	}
}

// serve answers one request. Its buffer is the thread's for that time only: of many
// connections few are busy at a time.
func (s *Server) serve(raw []byte) {
	b, err := getBuffer()
	if err != nil { // no memory; never leave a reader hung
		s.log.Error("fuse: answer", "err", err)
		if r, ok := parse(raw); ok && r.op != opForget && r.op != opBatchForget && r.op != opNotifyReply {
			s.send(errorReply(r.unique, syscall.EIO))
		}
		return
	}
	defer putBuffer(b)
	if out := s.handle(raw, b); out != nil {
		s.send(out)
	}
}

// send writes one answer. It does nothing once the connection has ended.
func (s *Server) send(p []byte) {
	s.conn.RLock()
	defer s.conn.RUnlock()
	if s.conn.fd < 0 {
		return
	}
	_, err := unix.Write(s.conn.fd, p)
	for err == unix.EINTR {
		_, err = unix.Write(s.conn.fd, p)
	}
	switch err {
	case nil, unix.ENOENT, unix.ENODEV: // ENOENT: its reader is gone, or it was resent to a successor
		return
	}
	unique := ne.Uint64(p[8:])
	s.log.Error("fuse: answer", "bytes", len(p), "err", err)
	// The kernel may still wait for the answer: never leave a reader hung.
	_, _ = unix.Write(s.conn.fd, errorReply(unique, syscall.EIO))
}

// failed notes a READ that is answered with EIO. It logs one a second, since
// any reader can cause as many as it likes.
func (s *Server) failed(off int64, n int, err error) {
	total := s.errors.Add(1)
	now, until := time.Now(), s.quietUntil.Load()
	if now.UnixNano() >= until && s.quietUntil.CompareAndSwap(until, now.Add(time.Second).UnixNano()) {
		s.log.Error("fuse: read fails", "name", s.name, "offset", off, "bytes", n, "err", err, "errors", total)
	}
}

// Stats counts what a Server did since New.
type Stats struct {
	Hits   int64 // READs answered at once
	Misses int64 // READs that had to wait for ReadAt
	Errors int64 // READs answered with EIO
}

// Stats returns the counts so far.
func (s *Server) Stats() Stats {
	return Stats{s.hits.Load(), s.misses.Load(), s.errors.Load()}
}

// Resend asks the kernel to send again every request of the connection that
// was read and not answered. A process that takes a connection over calls it
// before Serve: what its predecessor had read would otherwise never be
// answered. Needs Linux 6.9; older kernels return an error (EINVAL).
func Resend(dev *os.File) error {
	var p [outHeaderSize]byte
	putNotification(p[:], notifyResend)
	conn, err := dev.SyscallConn()
	if err == nil {
		cerr := conn.Control(func(fd uintptr) { _, err = unix.Write(int(fd), p[:]) })
		err = cmp.Or(cerr, err)
	}
	if err != nil {
		return fmt.Errorf("fuse: resend: %w", err)
	}
	return nil
}
