package fusetree

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync/atomic"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/erofs"
	"github.com/shale-image/shale/mount/fusedev"
)

// MaxRead is the largest READ in bytes: the kernel's default readahead, so that
// larger ones would hardly be seen.
const MaxRead = 128 << 10

// maxBackground is how many READs of the kernel's readahead are in work at a
// time, each with a buffer of up to MaxRead.
const maxBackground = 256

// Options tunes a Server. The zero value is what is recommended.
type Options struct {
	Name        string        // of the image, for messages
	ReadTimeout time.Duration // after which a READ is answered with EIO; default 1 minute
	// OwnerOnly leaves permissions to the mount, which then must show itself
	// to one user only; otherwise the kernel checks modes and ACLs.
	OwnerOnly bool
	Logger    *slog.Logger // default slog.Default()
}

// Server serves one image over one connection. Use New.
type Server struct {
	fuse.RawFileSystem // what is not served: ENOSYS
	nodes              *erofs.Nodes
	content            fusedev.Content
	o                  Options

	ctx    context.Context // ends with the connection
	cancel context.CancelFunc
	dev    atomic.Pointer[os.File]

	hits, misses, errors atomic.Int64
	quietUntil           atomic.Int64 // Unix nanoseconds; see failed
}

// New makes a server for one connection. meta is the EROFS metadata of size
// bytes, which must stay readable until Serve has returned; c has the flat
// address space, of which only file data are read. It starts nothing.
func New(meta io.ReaderAt, size int64, c fusedev.Content, o Options) (*Server, error) {
	if o.ReadTimeout <= 0 {
		o.ReadTimeout = time.Minute
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	im, err := erofs.Open(meta, size, "metadata of "+o.Name)
	if err != nil {
		return nil, err
	}
	s := &Server{RawFileSystem: fuse.NewDefaultRawFileSystem(), nodes: im.Nodes(), content: c, o: o}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	if _, err := s.nodes.Stat(s.nodes.Root()); err != nil {
		return nil, err
	}
	return s, nil
}

// Serve answers the requests of a connection whose FUSE file system exists. It
// returns nil once the connection has ended and every call of Content has
// returned. It may be called once. The caller keeps dev and closes it
// afterwards.
func (s *Server) Serve(dev *os.File) error {
	defer s.cancel()
	if !s.dev.CompareAndSwap(nil, dev) {
		return errors.New("fuse: Serve was called twice")
	}
	fd, err := unix.FcntlInt(dev.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("fuse: duplicate /dev/fuse: %w", err)
	}
	// The library takes the descriptor over and closes it.
	server, err := fuse.NewServer(s, fmt.Sprintf("/dev/fd/%d", fd), &fuse.MountOptions{
		Name:                     "shale",
		MaxBackground:            maxBackground,
		MaxWrite:                 MaxRead, // it is the limit of READ, too
		EnableSymlinkCaching:     true,
		EnableAcl:                !s.o.OwnerOnly,
		ExplicitDataCacheControl: true,
		DisableSplice:            true, // bytes come from memory
		Logger:                   slog.NewLogLogger(s.o.Logger.Handler(), slog.LevelDebug),
	})
	if err != nil {
		return fmt.Errorf("fuse: %w", err)
	}
	server.Serve()
	return nil
}

// Abort makes reads that wait, and all later ones, fail with EIO. It does not
// end the connection.
func (s *Server) Abort() { s.cancel() }

// Stats counts READs so far.
func (s *Server) Stats() fusedev.Stats {
	return fusedev.Stats{Hits: s.hits.Load(), Misses: s.misses.Load(), Errors: s.errors.Load()}
}

// failed notes a request that is answered with EIO. It logs one a second,
// since any reader can cause as many as it likes.
func (s *Server) failed(nid uint64, what string, err error) {
	total := s.errors.Add(1)
	now, until := time.Now(), s.quietUntil.Load()
	if now.UnixNano() >= until && s.quietUntil.CompareAndSwap(until, now.Add(time.Second).UnixNano()) {
		s.o.Logger.Error("fuse: "+what+" fails", "name", s.o.Name, "inode", nid, "err", err, "errors", total)
	}
}
