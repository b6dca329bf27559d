package fill

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/pack"
	"github.com/shale-image/shale/pool"
)

// patience is how far behind the place where a pack is now a block may stand for
// a reader to wait for it, in bytes of content: a few dozen milliseconds at 100
// Mbit/s. Runs of the workload that the pack is of read nearly in its order;
// others may want its end first.
const patience = 2 << 20

// landing is a start pack whose blocks come into the pool while the image is
// read. Who reads a block that is due soon waits for it, and nobody asks for it
// otherwise.
type landing struct {
	im     *Image
	pack   *pack.Reader
	table  *pack.Table
	places []place // by chunk of the table
	offset []int64 // by run: bytes of content in front of it

	mu      sync.Mutex
	due     map[int64]int // by flat address of a block: its run
	pos     int           // runs that have landed
	over    bool
	credit  credit
	changed chan struct{} // closed when pos or over has changed; nil if nobody waits
}

// place is where a chunk of a pack lies, nowhere if segment is nil.
type place struct {
	segment *segment
	at      address
	flat    int64
}

// Land reads a start pack into the pool, and returns when it has ended or ctx
// does. known, if not nil, is called once what the pack has is known, or it is
// known to be of no use: from then on readers wait for what is due. The pack need
// not be trusted: each block is proved against the digest of a chunk that the
// image has, and others are passed over; a pack most of which is no content of the
// image is refused. An error says why the rest of the pack was not used; what is wrong
// with the pack wraps index.ErrCorrupt, ErrLimit or ErrUnsupported. The caller sees to it that Land has returned before Close.
func (im *Image) Land(ctx context.Context, p *pack.Reader, known func()) (err error) {
	l := &landing{im: im, pack: p, credit: credit{left: mostCredit}}
	missing, err := l.open()
	if err == nil && missing > 0 {
		im.landing.Store(l)
	}
	im.landed.Store(err == nil)
	if known != nil {
		known()
	}
	if err != nil || missing == 0 {
		return err
	}
	defer func() {
		im.landing.Store(nil)
		l.move(func() { l.over = true })
	}()
	p.Progress = func(n int) {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.credit.earn(time.Now(), n, im.worth.pace())
	}
	for l.pos < len(l.table.Runs) {
		if err := l.yield(ctx); err != nil {
			return err
		}
		n, data, err := p.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := l.store(l.table.Runs[n], data); err != nil {
			return err
		}
		l.move(func() { l.pos = n + 1 })
	}
	return nil
}

// open reads the table, and returns how many blocks of it are not here.
func (l *landing) open() (missing int, err error) {
	if l.table, err = l.pack.Table(); err != nil {
		return 0, err
	}
	t := l.table
	wanted := make([]pool.Entry, len(t.Chunks))
	for i, c := range t.Chunks {
		wanted[i] = pool.Entry{Digest: c.Digest, Size: c.Size}
	}
	im := l.im
	l.places = make([]place, len(t.Chunks))
	for i, s := range im.engine.pool.Lookup(wanted) {
		if s != nil {
			l.places[i] = im.place(s.ID, wanted[i])
		}
	}
	l.due = map[int64]int{}
	l.offset = make([]int64, len(t.Runs))
	var all, content int64 // bytes, and those that are content of the image
	wants, until := make([]bool, len(t.Chunks)), 0
	for n, r := range t.Runs {
		l.offset[n] = all
		all += t.Bytes(r)
		p := l.places[r.Chunk]
		if p.segment == nil {
			continue
		}
		content += t.Bytes(r)
		for k := int64(r.First); k < int64(r.First+r.Count); k++ {
			if off := k * chunk.Block; !p.segment.pool.Present(p.at.off+off, 1) {
				l.due[p.flat+off] = n
				wants[r.Chunk], until = true, n+1
			}
		}
	}
	if content < all/2 {
		return 0, fmt.Errorf("%w: a start pack of which %d bytes of %d are content of the image", index.ErrCorrupt, content, all)
	}
	l.pack.Want(wants, until)
	return len(l.due), nil
}

// place finds a chunk that lies in the pool among those of the image.
func (im *Image) place(segment uint32, e pool.Entry) place {
	for i := range im.segments {
		s := &im.segments[i]
		if s.ID != segment {
			continue
		}
		flat := s.Flat + e.Off
		n := im.linked.Find(flat)
		if n == im.linked.Chunks() {
			break
		}
		if c := im.linked.Chunk(n); c.Flat == flat && c.Digest == e.Digest && c.Size == e.Size {
			return place{s, address{s.ID, e.Off}, flat}
		}
	}
	return place{}
}

// led tells whether a start pack knows better what will be read than sequences do:
// it arrives, or has come and nobody had to wait for anything else yet.
func (im *Image) led() bool {
	if l := im.landing.Load(); l != nil {
		return !l.late()
	}
	return im.landed.Load() && im.stats.stalls.Load() == 0
}

// Landed says that a start pack of what will be read has come before.
func (im *Image) Landed() { im.landed.Store(true) }

func (l *landing) store(r pack.Run, data []byte) error {
	p := l.places[r.Chunk]
	off := int64(r.First) * chunk.Block
	if p.segment == nil || p.segment.pool.Present(p.at.off+off, int64(len(data))) {
		return nil
	}
	err := l.im.engine.store(p.segment.pool, p.at.off+off, data)
	if err == nil {
		l.im.stats.landed(int64(len(data)))
	}
	return err
}

func (l *landing) move(change func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	change()
	if l.changed != nil {
		close(l.changed)
		l.changed = nil
	}
}

// yield lets requests of readers go first, unless a reader waits for the pack: it
// shares the link with them, and a pack that is of another workload than this
// brings little.
func (l *landing) yield(ctx context.Context) error {
	const look = 2 * time.Millisecond
	for {
		if err := errors.Join(ctx.Err(), l.im.ctx.Err()); err != nil {
			return err
		}
		l.mu.Lock()
		waiting := l.credit.waiting
		l.mu.Unlock()
		if waiting > 0 || len(l.im.demand) == 0 {
			return nil
		}
		time.Sleep(look)
	}
}

// late tells whether the pack hangs, or comes too slowly to be waited for.
func (l *landing) late() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.credit.spend(time.Now())
	return l.credit.late
}

// wait returns when the blocks of the flat addresses [off, end) that are due soon
// are here, or will not come, or not in time. It tells whether it waited.
func (l *landing) wait(ctx context.Context, off, end int64) (waited bool, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for {
		last := -1
		for b := off &^ (chunk.Block - 1); b < end; b += chunk.Block {
			if n, ok := l.due[b]; ok && n >= l.pos {
				last = max(last, n)
			}
		}
		l.credit.spend(time.Now())
		if l.over || l.credit.late || last < 0 || l.offset[last]-l.offset[l.pos] > patience {
			return waited, nil
		}
		if l.changed == nil {
			l.changed = make(chan struct{})
		}
		changed, enough := l.changed, time.NewTimer(l.credit.left)
		l.credit.waiting++
		waited = true
		l.mu.Unlock()
		select {
		case <-changed:
		case <-enough.C:
		case <-ctx.Done():
			err = fmt.Errorf("fill: waiting for the start pack: %w", context.Cause(ctx))
		}
		enough.Stop()
		l.mu.Lock()
		l.credit.spend(time.Now())
		l.credit.waiting--
		if err != nil {
			return waited, err
		}
	}
}

// brings tells whether blocks of a chunk are still to come.
func (l *landing) brings(flat int64, size uint32) bool {
	if l.late() {
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for b := flat; b < flat+int64(size); b += chunk.Block {
		if n, ok := l.due[b]; ok && n >= l.pos && !l.over {
			return true
		}
	}
	return false
}
