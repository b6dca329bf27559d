package fill

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/pool"
)

// rescuePause is how long after a rescue there is no other.
const rescuePause = 30 * time.Second

// A rescue may take for ever, at a place that dribbles, and what made it necessary may
// be over: a registry that ignored ranges for a while. So who waits for one asks as the
// index says again when it has taken twice as long as the last time: after 3 s, 6 s,
// 12 s, and from then on each 15 s.
const (
	rescueLook    = 3 * time.Second
	rescueLookMax = 15 * time.Second
)

// errAgain ends the flights of chunks for which a rescue takes long: who waits for one
// asks for it once more.
var errAgain = errors.New("all of the image is being read, which takes long")

// rescue is the way out where an index does not tell where chunks are: whoever
// opened the image brings all of its content into the pool.
type rescue struct {
	all func(context.Context) error // nil: Whole, where there are no ranges

	// identify returns the digest of what has an origin, once that is known.
	identify func(chunk.Digest) (chunk.Digest, bool)

	mu      sync.Mutex
	running chan struct{} // closed when it ends; nil if none runs
	begun   time.Time     // that one
	done    bool
	next    time.Time // not before
}

// errNoWindow says that a layer is served, and what lies beside it is not.
var errNoWindow = errors.New("what a layer is decoded with cannot be had")

// windowTime is how long a window may take when what it is for is here, if the image can
// be had in another way: until it has been.
const windowTime = 20 * time.Second

// patience is how long to wait for a window.
func (r *rescue) patience() time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.done {
		return time.Second
	}
	return windowTime
}

// OnWrongIndex sets what brings all of the image's content into the pool, by
// another way than the index. It is called if what the index says cannot be
// fetched or is not what it should be; readers wait meanwhile. Without, the index is
// all there is to go by, and where parts of blobs cannot be had Whole is called. Call it
// before the image is read.
func (im *Image) OnWrongIndex(all func(context.Context) error) { im.rescue.all = all }

// OnOrigin sets what tells, after all of an image was read, the digest of content of
// which the index has told the origin only. Call it before the image is read.
func (im *Image) OnOrigin(identify func(chunk.Digest) (chunk.Digest, bool)) {
	im.rescue.identify = identify
}

// rescued brings a chunk that could not be fetched because of err from another
// place in the pool. It returns nil if the chunk is here now, errAgain if that takes
// long, and else err.
func (im *Image) rescued(w want, err error) error {
	all := im.rescue.all
	if all == nil && errors.Is(err, blob.ErrRange) {
		all = func(ctx context.Context) error { return im.Whole(ctx, nil) }
	}
	if all == nil || im.ctx.Err() != nil {
		return err
	}
	wrong := errors.Is(err, chunk.ErrCorrupt) || errors.Is(err, blob.ErrRange) || errors.Is(err, blob.ErrNotFound) || errors.Is(err, errNoWindow)
	// What it has brought may have been evicted since: then once more.
	for again := false; ; again = true {
		done, ended := im.readAll(all, wrong, again)
		switch {
		case !ended:
			return errAgain
		case !done:
			return err
		case im.elsewhere(w):
			return nil
		case again:
			return err
		}
	}
}

// readAll waits for the rescue that runs; it begins one if that is due. done says that
// one has succeeded, now or earlier. Where one runs that takes long, ended is false.
func (im *Image) readAll(all func(context.Context) error, wrong, again bool) (done, ended bool) {
	r := &im.rescue
	r.mu.Lock()
	if r.running == nil && wrong && (again || !r.done) && !time.Now().Before(r.next) {
		r.running, r.begun = make(chan struct{}), time.Now()
		im.requests.Go(func() {
			err := all(im.ctx)
			if err != nil {
				im.engine.opt.Logger.Error("an image could not be read as a whole", "err", err)
			}
			r.mu.Lock()
			defer r.mu.Unlock()
			r.done, r.next = r.done || err == nil, time.Now().Add(rescuePause)
			close(r.running)
			r.running = nil
		})
	}
	running, since := r.running, r.begun
	r.mu.Unlock()
	if running != nil {
		look := time.NewTimer(min(max(time.Since(since), rescueLook), rescueLookMax))
		defer look.Stop()
		select {
		case <-running:
		case <-look.C:
			return false, false
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.done, true
}

// elsewhere stores a chunk that the pool has at another place, or whose content is
// known without.
func (im *Image) elsewhere(w want) bool {
	if w.segment.present(w.at, w.chunk) {
		return true
	}
	r := &im.rescue
	d := w.chunk.Digest
	if d.Algorithm == chunk.Origin && r.identify != nil {
		if known, ok := r.identify(d); ok {
			d = known
		}
	}
	if zeros := make([]byte, w.chunk.Size); d.Verify(zeros) == nil { // no pool has them
		return w.segment.pool.Store(w.at.off, zeros) == nil
	}
	at := []pool.Entry{{Digest: d, Size: w.chunk.Size}}
	s := im.engine.pool.Lookup(at)[0]
	if s == nil || !s.Present(at[0].Off, int64(w.chunk.Size)) {
		return false
	}
	data := make([]byte, w.chunk.Size)
	return s.ReadAt(data, at[0].Off) == nil && d.Verify(data) == nil && w.segment.pool.Store(w.at.off, data) == nil
}
