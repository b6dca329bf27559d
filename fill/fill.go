// Package fill makes bytes appear when they are first read: an address that
// is not present becomes a chunk, the chunk a ranged request (merged with its
// neighbours, once for all who wait), its bytes are decoded, verified, stored
// in the pool and recorded, and only then shown to the reader.
//
// It knows linked images, the pool and sources of bytes; it knows no registry
// and no kernel.
package fill

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/link"
	"github.com/shale-image/shale/pool"
)

// Options tune an Engine. Zero values mean the defaults.
type Options struct {
	// Window is how many stored bytes one request fetches from the file that
	// was read (default 512 KiB): of eight measured container starts, smaller
	// windows cost more round trips, larger ones more bytes, than they save.
	Window int64
	// MaxWindow is what Window grows to when a file is read in sequence
	// (default 4 MiB).
	MaxWindow int64
	// Neighbours is how many stored bytes of the files behind the one that was
	// read come along in the same request (default 64 KiB).
	Neighbours int64
	// Requests bounds the requests in flight (default 16).
	Requests int
	// Timeout bounds one request, retries included (default 60 s): nobody
	// waits for ever.
	Timeout time.Duration
	Logger  *slog.Logger
}

func (o *Options) defaults() {
	def := func(p *int64, v int64) {
		if *p == 0 {
			*p = v
		}
	}
	def(&o.Window, 512<<10)
	def(&o.MaxWindow, 4<<20)
	def(&o.Neighbours, 64<<10)
	if o.Requests == 0 {
		o.Requests = 16
	}
	if o.Timeout == 0 {
		o.Timeout = time.Minute
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
}

// Engine fetches for all images of a pool, so that a chunk two images share is
// fetched once even if both want it now. It is safe for concurrent use.
type Engine struct {
	pool  *pool.Pool
	opt   Options
	slots chan struct{} // one for each request in flight

	mu      sync.Mutex
	flights map[address]*flight
}

// address is where a chunk lies in the pool.
type address struct {
	segment uint32
	off     int64
}

// flight is a chunk that is being fetched. After done is closed, err says
// whether that failed; data holds the bytes if the pool could not store them
// and nil otherwise.
type flight struct {
	done chan struct{}
	err  error
	data []byte
}

// New makes an engine over a pool.
func New(p *pool.Pool, o Options) *Engine {
	o.defaults()
	return &Engine{pool: p, opt: o, slots: make(chan struct{}, o.Requests), flights: map[address]*flight{}}
}

// Image is a linked image whose bytes come from a source. It implements what
// a face shows (mount/fusedev.Content). It is safe for concurrent use.
type Image struct {
	linked   *link.Image
	engine   *Engine
	source   blob.Source
	segments []segment
	stats    stats
	wg       sync.WaitGroup // requests in flight

	mu       sync.Mutex
	streams  [4]stream // the last few sequential readers
	nextSlot int
}

type segment struct {
	link.Segment
	pool *pool.Segment
}

// Open binds a linked image to the source its own repository is: what an image
// reads is asked of the image's own source with the image's own credentials.
// The linked image is the Image's from now on, also if Open fails.
func (e *Engine) Open(l *link.Image, s blob.Source) (*Image, error) {
	im := &Image{linked: l, engine: e, source: s}
	for _, ls := range l.Segments {
		ps, ok := e.pool.Segment(ls.ID)
		if !ok || ps.Size != ls.Size {
			l.Close()
			return nil, fmt.Errorf("%s: segment %08x: %w", l.Dir, ls.ID, ErrStale)
		}
		im.segments = append(im.segments, segment{ls, ps})
	}
	return im, nil
}

// ErrStale says that a linked image refers to a segment that the pool does not
// have. Linking the image again mends it.
var ErrStale = errors.New("the linked image does not fit the pool")

// Close waits for the image's requests in flight, which others may be waiting
// for too, and releases it. No other method may be in use or used afterwards.
func (im *Image) Close() error {
	im.wg.Wait()
	return im.linked.Close()
}

// Size is the size of the flat address space in bytes.
func (im *Image) Size() int64 { return im.linked.FlatSize }

// TryReadAt fills p from the flat address off if all of it is on the node,
// and returns false otherwise. It never waits for a network.
func (im *Image) TryReadAt(p []byte, off int64) (bool, error) {
	ok := true
	err := im.split(p, off, func(s *segment, q []byte, at int64) error {
		if s != nil {
			ok = ok && s.pool.Present(at, int64(len(q)))
		}
		return nil
	})
	if !ok || err != nil {
		return false, err
	}
	return true, im.read(p, off)
}

// read copies what is present.
func (im *Image) read(p []byte, off int64) error {
	im.stats.read(len(p))
	return im.split(p, off, func(s *segment, q []byte, at int64) error {
		switch {
		case s != nil:
			return s.pool.ReadAt(q, at)
		case at < im.linked.MetaSize:
			_, err := im.linked.Meta().ReadAt(q, at)
			return err
		}
		clear(q) // padding between the metadata and the segments
		return nil
	})
}

// split cuts [off, off+len(p)) at the boundaries of the metadata and the
// segments. fn gets nil and a flat address for what is in no segment, and an
// address in the segment otherwise.
func (im *Image) split(p []byte, off int64, fn func(*segment, []byte, int64) error) error {
	if off < 0 || off+int64(len(p)) > im.Size() {
		return fmt.Errorf("fill: read of %d bytes at %d is outside the image of %d bytes", len(p), off, im.Size())
	}
	for len(p) > 0 {
		var (
			n = im.linked.MetaSize - off // if positive: bytes of metadata
			s *segment
		)
		for i := range im.segments {
			x := &im.segments[i]
			if n > 0 {
				break
			}
			if off < x.Flat {
				n = x.Flat - off
			} else if off < x.Flat+x.Size {
				s, n = x, x.Flat+x.Size-off
			}
		}
		n = min(n, int64(len(p)))
		at := off
		if s != nil {
			at -= s.Flat
		}
		if err := fn(s, p[:n], at); err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

// ReadAt fills p from the flat address off, fetching what is not on the node.
// It returns an error rather than a byte that is not verified. Cancelling ctx
// gives up waiting; the fetch goes on for others.
func (im *Image) ReadAt(ctx context.Context, p []byte, off int64) error {
	var held []held
	for i := im.linked.Find(off); i < im.linked.Chunks(); i++ {
		c := im.linked.Chunk(i)
		if c.Flat >= off+int64(len(p)) {
			break
		}
		data, err := im.need(ctx, i, c)
		if err != nil {
			return err
		}
		if data != nil {
			held = append(held, struct {
				flat int64
				data []byte
			}{c.Flat, data})
		}
	}
	if err := im.read(p, off); err != nil {
		return err
	}
	for _, h := range held { // bytes that the pool had no room for
		if d := h.flat - off; d >= 0 {
			copy(p[d:], h.data)
		} else if -d < int64(len(h.data)) {
			copy(p, h.data[-d:])
		}
	}
	return nil
}

// held is a chunk's content that is only in memory.
type held = struct {
	flat int64
	data []byte
}

// address returns where a chunk of the map lies in the pool.
func (im *Image) address(c link.Chunk) (*segment, address) {
	for i := range im.segments {
		s := &im.segments[i]
		if c.Flat >= s.Flat && c.Flat < s.Flat+s.Size {
			return s, address{s.ID, c.Flat - s.Flat}
		}
	}
	return nil, address{}
}

// need returns when chunk i is on the node. It returns the bytes if they are
// here but could not be stored.
func (im *Image) need(ctx context.Context, i int, c link.Chunk) ([]byte, error) {
	s, at := im.address(c)
	if s == nil {
		return nil, fmt.Errorf("fill: chunk %d at flat address %d: %w", i, c.Flat, ErrStale)
	}
	// A chunk that came along in another reader's request fails with that
	// request; then it deserves one of its own.
	for own := false; ; {
		if s.pool.Present(at.off, int64(c.Size)) {
			return nil, nil
		}
		f, mine := im.engine.join(im, i, at)
		own = own || mine
		select {
		case <-f.done:
		case <-ctx.Done():
			return nil, fmt.Errorf("fill: waiting for chunk %s: %w", c.Digest, ctx.Err())
		}
		if f.err == nil && f.data != nil {
			return f.data, nil
		}
		if f.err != nil && own {
			return nil, f.err
		}
	}
}
