// Package fill makes bytes appear when they are first read: an address that
// is not present becomes a chunk, the chunk a ranged request (merged with its
// neighbours, once for all who wait), its bytes are decoded, verified, stored
// in the pool and recorded, and only then shown to the reader.
//
//	read.go      a read of flat addresses becomes chunks
//	bring.go     the same where the kernel reads itself
//	record.go    which blocks were read, and when
//	flight.go    who waits for which chunk; each is fetched once
//	plan.go      which chunks one request brings
//	ahead.go     fetching ahead of sequential readers
//	prefetch.go  what is known, or told, to be read first
//	loads.go     programs, and the libraries that come with them
//	libraries.go where those are
//	expect.go    what is guessed to be read
//	request.go   one request: decode, verify, store
//	ends.go      what requests beside each other share
//	edges.go     which is kept for a while
//	landing.go   a start pack: what will be read comes before it is asked for
//	credit.go    for how long it is waited for
//	failed.go    failures that stand for a moment
//	rescue.go    where the index is wrong
//	complete.go  all that is missing
//	slowly.go    all that is missing, in the time that readers leave
//
// What comes along with a chunk is chosen by measurement. A start of python3
// and of numpy at 5 ms and 100 Mbit/s, in seconds / MB / requests, by the
// window and the neighbours (Options), in KiB; docs/BENCHMARKS.md has more:
//
//	 nothing   0.73 / 3.7 / 141   3.29 / 11.2 / 524
//	128,  64   0.51 / 4.9 /  61   1.93 / 15.2 / 206
//	256,  64   0.45 / 5.0 /  43   1.78 / 15.5 / 163   the default
//	256, 128   0.48 / 5.8 /  42   1.76 / 17.2 / 144
//	512,  64   0.49 / 5.6 /  31   1.85 / 16.6 / 145
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
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/link"
	"github.com/shale-image/shale/pool"
)

// Options tune an Engine. Zero values mean the defaults, which are measured:
// docs/BENCHMARKS.md, "Fetch policy". Byte counts are of stored bytes but for Ahead.
type Options struct {
	// Window is how much of the file that was read one miss fetches (default
	// 256 KiB).
	Window int64
	// Neighbours is how much of the files behind that one comes along in the
	// same request (default 64 KiB).
	Neighbours int64
	// Growth is how many times Window grows at most, and twice Neighbours,
	// where round trips are worth more than at 5 ms and 100 Mbit/s (default 8;
	// 1 is no growth).
	Growth float64
	// Ahead bounds how far a sequential reader is fetched ahead for, in
	// uncompressed bytes (default 16 MiB).
	Ahead int64
	// Requests bounds the requests in flight of one image: so many for its
	// readers, as many to fetch ahead of them, and as many for what programs load
	// (default 16).
	Requests int
	// Timeout is how long a request may bring nothing, retries included,
	// before it fails (default 1 minute): nobody waits for ever.
	Timeout time.Duration
	// ZstdWindow is the largest window of a zstd frame: index.Limits.Window.
	ZstdWindow int64
	// Unrecorded has no note taken of what is read; Image.Touched has nothing.
	Unrecorded bool
	Logger     *slog.Logger
}

func (o *Options) defaults() {
	def := func(p *int64, v int64) {
		if *p <= 0 {
			*p = v
		}
	}
	def(&o.Window, 256<<10)
	def(&o.Neighbours, 64<<10)
	def(&o.Ahead, 16<<20)
	if o.Growth <= 0 {
		o.Growth = 8
	}
	if o.Requests <= 0 {
		o.Requests = 16
	}
	if o.Timeout <= 0 {
		o.Timeout = time.Minute
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
}

// Engine fetches for all images of a pool, so that a chunk two images share is
// fetched once even if both want it now. It is safe for concurrent use.
type Engine struct {
	pool *pool.Pool
	opt  Options

	mu      sync.Mutex
	flights map[address]*flight
	held    []address // of flights that keep their data, oldest first
	heldLen int64     // bytes of that data

	waiting atomic.Int64 // readers
	waited  atomic.Int64 // when one ended waiting last, Unix time in ns

	full atomic.Bool // a chunk could not be stored, and none could since
}

// New makes an engine over a pool.
func New(p *pool.Pool, o Options) *Engine {
	o.defaults()
	return &Engine{pool: p, opt: o, flights: map[address]*flight{}}
}

// imageMemory bounds the chunks an image has in memory at one time, stored and
// decoded: 512 of the usual 64 KiB, or two of the largest.
const imageMemory = 64 << 20

// guessMemory is imageMemory of what is fetched by what is guessed: readers do not wait
// for it.
const guessMemory = imageMemory / 4

// Image is a linked image whose bytes come from a source. It implements what
// a face shows (mount/fusedev.Content). It is safe for concurrent use.
type Image struct {
	linked   *link.Image
	engine   *Engine
	source   blob.Source
	segments []segment
	stats    stats

	// A slow image has requests, slots and memory of its own: others do not
	// wait for it.
	demand, ahead, guesses chan struct{} // one for each request in flight
	memory, guessMemory    *semaphore.Weighted
	requests               sync.WaitGroup
	ctx                    context.Context // ends with Close
	cancel                 context.CancelFunc

	streams  streams
	failures failures
	worth    worth
	edges    edges
	loads    loads
	rescue   rescue
	told     atomic.Pointer[told] // while they are fetched
	record   *record
	landing  atomic.Pointer[landing] // the start pack that is arriving, if one is
	landed   atomic.Bool             // one is here, or on its way
}

type segment struct {
	link.Segment
	pool *pool.Segment
}

// Open binds a linked image to the source its own repository is: what an image
// reads is asked of the image's own source with the image's own credentials.
// The linked image is the Image's from now on, also if Open fails.
func (e *Engine) Open(l *link.Image, s blob.Source) (*Image, error) {
	im := &Image{
		linked: l, engine: e, source: s,
		demand:  make(chan struct{}, e.opt.Requests),
		ahead:   make(chan struct{}, e.opt.Requests),
		guesses: make(chan struct{}, e.opt.Requests),
		memory:  semaphore.NewWeighted(imageMemory), guessMemory: semaphore.NewWeighted(guessMemory),
	}
	im.loads.im = im
	if !e.opt.Unrecorded {
		im.record = newRecord(l.FlatSize)
	}
	for _, ls := range l.Segments {
		ps, ok := e.pool.Segment(ls.ID)
		if !ok || ps.Size != ls.Size {
			l.Close()
			return nil, fmt.Errorf("%s: segment %08x: %w", l.Dir, ls.ID, ErrStale)
		}
		im.segments = append(im.segments, segment{ls, ps})
	}
	im.ctx, im.cancel = context.WithCancel(context.Background())
	return im, nil
}

// ErrStale says that a linked image refers to a segment that the pool does not
// have. Linking the image again mends it.
var ErrStale = errors.New("the linked image does not fit the pool")

// errClosed ends the requests of an image that is closed. Readers of other
// images that waited for one make their own.
var errClosed = errors.New("the image was closed")

// Close breaks the image's requests off and releases it. No other method may
// be in use or used afterwards.
func (im *Image) Close() error {
	im.cancel()
	im.requests.Wait()
	im.edges.clear()
	return im.linked.Close()
}

// Size is the size of the flat address space in bytes.
func (im *Image) Size() int64 { return im.linked.FlatSize }

// address is where a chunk lies in the pool.
type address struct {
	segment uint32
	off     int64
}

// address returns where a chunk of the map lies in the pool, nil if nowhere.
func (im *Image) address(c link.Chunk) (*segment, address) {
	s, off := im.segmentAt(c.Flat)
	if s == nil || off+int64(c.Size) > s.Size {
		return nil, address{}
	}
	return s, address{s.ID, off}
}

// Touch says that all of the image is in use, by a face that reads without us.
func (im *Image) Touch() {
	for i := range im.linked.Chunks() {
		c := im.linked.Chunk(i)
		if s, at := im.address(c); s != nil {
			s.pool.Touch(at.off, int64(c.Size))
		}
	}
}

// Full tells whether what is fetched cannot be stored now, so that readers are
// served from memory.
func (e *Engine) Full() bool { return e.full.Load() }

// present tells whether chunk c, which lies at an address of s, is here.
func (s *segment) present(at address, c link.Chunk) bool {
	return s.pool.Present(at.off, int64(c.Size))
}
