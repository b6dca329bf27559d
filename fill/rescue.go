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
	// What it has brought may have been evicted since: then once more.
	for again := false; ; again = true {
		r.mu.Lock()
		if wrong && (again || !r.done) && !time.Now().Before(r.next) {
			e := r.all(im.ctx)
			if e != nil {
				im.engine.opt.Logger.Error("an image could not be read as a whole", "err", e)
			}
			r.done, r.next = r.done || e == nil, time.Now().Add(rescuePause)
		}
		done := r.done
		r.mu.Unlock()
		if !done {
			return false
		}
		if im.elsewhere(w) {
			return true
		}
		if again {
			return false
		}
	}
}

// elsewhere stores a chunk that the pool has at another place, or whose content is
// known without.
func (im *Image) elsewhere(w want) bool {
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
