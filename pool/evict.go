package pool

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/shale-image/shale/chunk"
)

// quota is how much of the disk the pool may take for data. What is stored is
// counted before it is written, so that stores at the same time do not pass it
// together.
type quota struct {
	limit   atomic.Int64 // bytes; 0: none
	used    atomic.Int64 // bytes, with what is being stored
	evicted atomic.Int64

	mu    sync.Mutex // held while room is made
	evict func(need int64) error
	vain  time.Time // when it had nothing to give

	why atomic.Pointer[error] // evict's last
}

// vainPause is how long nothing is looked for again where nothing could go.
const vainPause = time.Second

// slack is the part of a quota that is evicted at one time, so that not each
// store has to.
const slack = 32

// SetQuota bounds the bytes that the pool may take on disk; 0 is without bound.
// evict is called when a store needs room, because of the quota or of a full disk,
// and at once if the pool is larger: it is to call Evict, with what must stay. It is
// called by any Store, by one at a time.
func (p *Pool) SetQuota(bytes int64, evict func(need int64) error) error {
	q := &p.quota
	q.mu.Lock()
	defer q.mu.Unlock()
	q.limit.Store(bytes)
	q.evict, q.vain = evict, time.Time{}
	if over := q.used.Load() - bytes; bytes > 0 && over > 0 {
		return evict(over)
	}
	return nil
}

// Reserve takes room of the quota for somebody else who writes into the pool's
// directory: as much of want as there is, or can be made; without a quota all there
// is. The caller calls release
// when what was written is the pool's, or is gone.
func (p *Pool) Reserve(want int64) (got int64, release func()) {
	q := &p.quota
	limit := q.limit.Load()
	if limit == 0 {
		return math.MaxInt64, func() {}
	}
	for want = min(want, limit); want > 0; want = min(want/2, limit-q.used.Load()) {
		if q.take(want) == nil {
			return want, func() { q.give(want) }
		}
	}
	return 0, func() {}
}

// Room is how much more the pool may take of its quota without evicting anything.
func (p *Pool) Room() int64 {
	if limit := p.quota.limit.Load(); limit > 0 {
		return limit - p.quota.used.Load()
	}
	return math.MaxInt64
}

// take counts n bytes that are about to be stored.
func (q *quota) take(n int64) error {
	for tried := false; ; tried = true {
		used, limit := q.used.Add(n), q.limit.Load()
		if limit == 0 || used <= limit || n == 0 {
			return nil
		}
		q.used.Add(-n)
		if tried || !q.makeRoom(n) {
			err := fmt.Errorf("pool: %w: its quota is %d bytes, of which %d are taken", ErrNoSpace, limit, used-n)
			if why := q.why.Load(); why != nil {
				err = fmt.Errorf("%w, and nothing was evicted: %w", err, *why)
			}
			return err
		}
	}
}

func (q *quota) give(n int64) { q.used.Add(-n) }

// makeRoom has room made for n bytes, and tells whether there may be some now.
func (q *quota) makeRoom(n int64) bool {
	before := q.used.Load()
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.evict == nil || n == 0 || time.Since(q.vain) < vainPause {
		return false
	}
	if q.used.Load() <= before-n {
		return true // somebody else has
	}
	limit := q.limit.Load()
	evicted := q.evicted.Load()
	need := n + cmp.Or(limit, before)/slack
	if limit > 0 {
		need += max(0, q.used.Load()-limit) // by new segments' tables
	}
	err := q.evict(need)
	q.why.Store(nil)
	if err != nil {
		q.why.Store(&err)
	}
	if err != nil || q.evicted.Load() == evicted {
		q.vain = time.Now()
		return false
	}
	return true
}

// victim is a range of a segment that may go.
type victim struct {
	segment *Segment
	word    int64 // of presence; -1: all of it
	used    uint32
}

// Evict makes chunks vanish until need bytes of disk are free or nothing is left
// that may go: of those that keep does not name those that were used longest ago. It
// returns the bytes freed. Their addresses stay; who reads them fetches them again.
// Who reads them by other ways than Read, as the kernel does below a direct mount, is
// in keep.
func (p *Pool) Evict(keep *References, need int64) (freed int64, err error) {
	p.freeing.Lock()
	defer p.freeing.Unlock()
	var all []victim
	for _, s := range p.all() {
		if s.Sealed() {
			// All or nothing: only then there is room at once. It is as young as its youngest.
			if keep.segments[s.ID].empty() && s.presence.count() > 0 {
				all = append(all, victim{s, -1, s.use.youngest()})
			}
			continue
		}
		for w := range s.presence.live {
			if s.presence.live[w].Load() != 0 {
				all = append(all, victim{s, int64(w), s.use.last[w].Load()})
			}
		}
	}
	// Ranges of one age go from behind: what lies first is more likely read first.
	slices.SortFunc(all, func(a, b victim) int {
		return cmp.Or(cmp.Compare(a.used, b.used), cmp.Compare(a.segment.ID, b.segment.ID), cmp.Compare(b.word, a.word))
	})
	const batch = 64 // ranges that vanish by the same sync
	places := map[*Segment][]Entry{}
	for len(all) > 0 && freed < need && err == nil {
		gone, bytes, whole := map[*Segment]bitmap{}, map[*Segment]int64{}, map[*Segment]bool{}
		var planned int64
		n := 0
		for ; n < min(batch, len(all)) && freed+planned < need; n++ {
			s := all[n].segment
			if places[s] == nil {
				places[s] = s.table.byPlace()
			}
			if gone[s] == nil {
				gone[s] = make(bitmap, len(s.presence.live))
			}
			var b int64
			if all[n].word < 0 {
				gone[s].take(0, s.Size/chunk.Block)
				b, whole[s] = s.disk(), true
			} else {
				b = s.choose(all[n].word, places[s], keep.segments[s.ID], gone[s])
			}
			bytes[s] += b
			planned += b
		}
		all = all[n:]
		for s, granules := range gone {
			if granules.empty() {
				continue
			}
			disk, e := s.discard(granules)
			if e != nil {
				err = errors.Join(err, e)
				continue
			}
			if whole[s] {
				bytes[s] = disk
			}
			freed += bytes[s]
			p.quota.used.Add(-bytes[s])
			p.quota.evicted.Add(bytes[s])
		}
	}
	return freed, err
}

// choose takes those chunks that begin in a word of presence, of which something is
// here and nothing is in keep, into gone; of a chunk all goes or nothing. It returns
// the disk that they take.
func (s *Segment) choose(word int64, byPlace []Entry, keep, gone bitmap) (bytes int64) {
	from, _ := slices.BinarySearchFunc(byPlace, word*useRange, func(e Entry, off int64) int { return cmp.Compare(e.Off, off) })
	// One that only ends here goes along if its own range has nothing else: then
	// nobody else would look at it.
	for from > 0 && byPlace[from-1].Off+int64(byPlace[from-1].Size) > word*useRange {
		from--
	}
	for _, e := range byPlace[from:] {
		if e.Off >= (word+1)*useRange {
			break
		}
		first, end := e.granules()
		if keep.overlaps(first, end) || gone.any(first, end) {
			continue
		}
		var here int64
		for g := first; g < end; g++ {
			if s.presence.has(g, g+1) {
				here += pages(min(chunk.Block, int64(e.Size)-(g-first)*chunk.Block))
			}
		}
		if here > 0 {
			gone.take(first, end)
			bytes += here
		}
	}
	return bytes
}

// byPlace returns the chunks by address.
func (t *table) byPlace() []Entry {
	out := make([]Entry, t.count)
	for i := range out {
		out[i] = t.entry(i)
	}
	slices.SortFunc(out, func(a, b Entry) int { return cmp.Compare(a.Off, b.Off) })
	return out
}
