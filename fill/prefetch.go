package fill

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/shale-image/shale/pool"
)

// maxPrefetch bounds what Prefetch asks of a blob, in stored bytes: a third of a
// second at 100 Mbit/s, for which a reader may have to wait whose chunk comes last.
// Builders of layers put whole files first, of which starts read a part.
const maxPrefetch = 4 << 20

// Prefetch begins to fetch what the makers of the image say is read first, by one
// request for each blob of which they do, and returns at once. Readers join it.
func (im *Image) Prefetch() {
	ends := slices.Clone(im.linked.First) // 0 where there is nothing to do, or it is done
	left := 0
	for _, end := range ends {
		if end > 0 {
			left++
		}
	}
	for i := 0; i < im.linked.Chunks() && left > 0; i++ {
		c := im.linked.Chunk(i)
		if c.Offset >= ends[c.Blob] {
			continue
		}
		if s, at := im.address(c); s == nil || s.present(at, c) {
			continue // without the lock, which readers need
		}
		select {
		case im.ahead <- struct{}{}:
		default:
			return
		}
		wants := im.front(i, ends[c.Blob])
		if len(wants) == 0 { // it has come, or does
			<-im.ahead
			continue
		}
		ends[c.Blob] = 0
		left--
		im.requests.Go(func() {
			defer func() { <-im.ahead }()
			im.fetch(im.ctx, wants)
		})
	}
}

// front claims chunk i, if it is missing, and those behind it that lie before an offset
// of their blob's stream.
func (im *Image) front(i int, end int64) []want {
	e := im.engine
	e.mu.Lock()
	defer e.mu.Unlock()
	wants := im.collect(i, i, maxPrefetch, maxPrefetch)
	for n := len(wants); n > 0 && wants[n-1].chunk.Offset >= end; n-- {
		wants = wants[:n-1]
	}
	e.claim(im, wants, 0, 0)
	return wants
}

// orderedRequests is how many requests of FetchInOrder are in flight: they share the
// link with what a reader may want next, and are not what it waits for.
const orderedRequests = 4

// told are the chunks, by number, of which FetchInOrder knows that they will be read.
type told map[int]bool

// FetchInOrder brings chunks, in this order, before somebody asks for them: what other
// nodes have read at such a start. Those that lie side by side come by one request, and while it
// has not returned with what a reader waits for, too. While one does only one request is in flight:
// none at all would be late where round trips are long. What it is told need not be
// true: chunks that the image does not have are passed over. It returns when the last
// request is made. The caller sees to it that it has returned before Close.
func (im *Image) FetchInOrder(ctx context.Context, wanted []pool.Entry) {
	entries := slices.Clone(wanted)
	var order []int // positions in the map
	t := told{}
	for i, s := range im.engine.pool.Lookup(entries) {
		if s == nil {
			continue
		}
		if p := im.place(s.ID, entries[i]); p.segment != nil {
			n := im.linked.Find(p.flat)
			order, t[n] = append(order, n), true
		}
	}
	im.told.Store(&t)
	defer im.told.Store(nil)
	turn := make(chan struct{}, orderedRequests)
	for _, n := range order {
		select {
		case turn <- struct{}{}:
		case <-ctx.Done():
			return
		case <-im.ctx.Done():
			return
		}
		if im.standBack(ctx, func() bool { return len(turn) == 1 }) != nil {
			return
		}
		wants := im.among(n, t)
		if len(wants) == 0 { // it is here, or on its way
			<-turn
			continue
		}
		im.requests.Go(func() {
			defer func() { <-turn }()
			im.fetch(im.ctx, wants)
		})
	}
}

// standBack returns when no reader waits for a request, or this would be the only one
// besides. An error is that of a context that has ended.
func (im *Image) standBack(ctx context.Context, only func() bool) error {
	const look = 2 * time.Millisecond
	for {
		if err := errors.Join(ctx.Err(), im.ctx.Err()); err != nil || len(im.demand) == 0 || only() {
			return err
		}
		time.Sleep(look)
	}
}

// among claims chunk n and what of those told should come with it.
func (im *Image) among(n int, t told) []want {
	e := im.engine
	e.mu.Lock()
	defer e.mu.Unlock()
	if im.here(im.linked.Chunk(n)) {
		return nil
	}
	lo, hi := im.run(n, t)
	wants := im.collect(lo, hi, 0, 0)
	e.claim(im, wants, 0, 0)
	return wants
}

// run returns the chunks [lo, hi) around chunk i that should come by one request, of which those at
// both ends are told: up to one that is here, with no more between them than a quarter of what
// a round trip is worth, and on each side no more than one request should bring. e.mu is held.
func (im *Image) run(i int, t told) (lo, hi int) {
	m := im.linked
	most, _ := im.reach()
	gap := min(maxGap, int64(im.worth.bytes()/4))
	at := m.Stored(m.Chunk(i))
	from, to := at.Offset, at.Offset+at.Length
	next := func(k int) (yes, more bool) {
		c := m.Chunk(k)
		if c.Blob != at.Blob || t[k] && im.here(c) {
			return false, false
		}
		s := m.Stored(c)
		end := s.Offset + s.Length
		if s.Offset-to > gap || from-end > gap || max(s.Offset-at.Offset, at.Offset-s.Offset) > most {
			return false, false
		}
		if t[k] {
			from, to = min(from, s.Offset), max(to, end)
		}
		return t[k], true
	}
	lo, hi = i, i+1
	for k, more := i-1, true; k >= 0 && more; k-- {
		var yes bool
		if yes, more = next(k); yes {
			lo = k
		}
	}
	for k, more := i+1, true; k < m.Chunks() && more; k++ {
		var yes bool
		if yes, more = next(k); yes {
			hi = k + 1
		}
	}
	return lo, hi
}
