package fill

import (
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/link"
	"github.com/shale-image/shale/trace"
)

// maxTouches bounds what is recorded of one image: 2 GiB of blocks in 3 MiB.
const maxTouches = 1 << 17

// record notes which blocks are read, in order of their first read. It is always
// on: what was read before costs one load of a bit.
type record struct {
	start time.Time
	seen  []atomic.Pointer[page] // bits, by block

	mu      sync.Mutex
	touches []touch
	lost    bool // there were more than maxTouches
}

// page is the bits of 1 GiB: images share segments, so that what one reads may
// lie far apart.
type page [1024]atomic.Uint64

const pageBlocks = 64 * int64(len(page{}))

type touch struct {
	block    uint32
	at, wait uint32 // in units of 10 µs
}

const tick = 10 * time.Microsecond

func newRecord(flatSize int64) *record {
	return &record{start: time.Now(), seen: make([]atomic.Pointer[page], flatSize/chunk.Block/pageBlocks+1)}
}

// note records a read of the flat addresses [off, end).
func (r *record) note(off, end int64, wait time.Duration) {
	first, last := off/chunk.Block, (end-1)/chunk.Block
	for b := first; b <= last; b++ {
		p := r.seen[b/pageBlocks].Load()
		if p == nil || p[b%pageBlocks/64].Load()&(1<<(b%64)) == 0 {
			r.add(b, last, wait)
			return
		}
	}
}

// has tells whether any block of the flat addresses [off, end) was read.
func (r *record) has(off, end int64) bool {
	for b := off / chunk.Block; b*chunk.Block < end; b++ {
		if p := r.seen[b/pageBlocks].Load(); p != nil && p[b%pageBlocks/64].Load()&(1<<(b%64)) != 0 {
			return true
		}
	}
	return false
}

func (r *record) add(first, last int64, wait time.Duration) {
	now := time.Since(r.start)
	r.mu.Lock()
	defer r.mu.Unlock()
	for b := first; b <= last; b++ {
		at := &r.seen[b/pageBlocks]
		p := at.Load()
		if p == nil {
			p = new(page)
			at.Store(p)
		}
		bit := uint64(1) << (b % 64)
		if p[b%pageBlocks/64].Or(bit)&bit != 0 {
			continue
		}
		if len(r.touches) == maxTouches {
			r.lost = true
			continue
		}
		r.touches = append(r.touches, touch{uint32(b), ticks(now - wait), ticks(wait)})
	}
}

// ticks saturates: after 11.9 hours all is as late.
func ticks(d time.Duration) uint32 { return uint32(min(max(0, d/tick), math.MaxUint32)) }

// Linked is the linked image, whose flat addresses those of Touched are. It ends with the
// Image.
func (im *Image) Linked() *link.Image { return im.linked }

// Touched lists the blocks of files that were read so far, in the order of their
// first reads, and whether there were more than are recorded. A block that is
// read along with others by the kernel's readahead counts as read.
func (im *Image) Touched() (all []trace.Touch, lost bool) {
	r := im.record
	if r == nil {
		return nil, false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	all = make([]trace.Touch, 0, len(r.touches))
	for _, t := range r.touches {
		all = append(all, trace.Touch{Flat: int64(t.block) * chunk.Block, At: time.Duration(t.at) * tick, Wait: time.Duration(t.wait) * tick})
	}
	return all, r.lost
}
