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

// rescuePause is how long after a rescue that failed there is no other.
const rescuePause = 30 * time.Second

// rescue is the way out where an index does not tell where chunks are: whoever
// opened the image brings all of its content into the pool.
type rescue struct {
	all func(context.Context) error // nil if there is none

	// identify returns the digest of what has an origin, once that is known.
	identify func(chunk.Digest) (chunk.Digest, bool)

	mu   sync.Mutex // held while all runs
	done bool
	next time.Time // not before
}

// OnWrongIndex sets what brings all of the image's content into the pool, by
// another way than the index. It is called if what the index says cannot be
// fetched or is not what it should be; readers wait meanwhile. Call it before
// the image is read.
func (im *Image) OnWrongIndex(all func(context.Context) error) { im.rescue.all = all }

// OnOrigin sets what tells, after all of an image was read, the digest of content of
// which the index has told the origin only. Call it before the image is read.
func (im *Image) OnOrigin(identify func(chunk.Digest) (chunk.Digest, bool)) {
	im.rescue.identify = identify
}

// rescued brings a chunk that could not be fetched because of err from another
// place in the pool, and tells whether it is here now.
func (im *Image) rescued(w want, err error) bool {
	r := &im.rescue
	if r.all == nil || im.ctx.Err() != nil {
		return false
	}
	wrong := errors.Is(err, chunk.ErrCorrupt) || errors.Is(err, blob.ErrRange) || errors.Is(err, blob.ErrNotFound)
	r.mu.Lock()
	if wrong && !r.done && !time.Now().Before(r.next) {
		if e := r.all(im.ctx); e != nil {
			im.engine.opt.Logger.Error("an image could not be read as a whole", "err", e)
			r.next = time.Now().Add(rescuePause)
		} else {
			r.done = true
		}
	}
	done := r.done
	r.mu.Unlock()
	if !done {
		return false
	}
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
