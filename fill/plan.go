package fill

import (
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/link"
)

// Which bytes that nobody wants, or that edges keep, a request may pass over to reach others:
// maxGap for what is waited for, since over gaps of up to 64 KiB merging costs 13% more bytes and
// saves a round trip each; spareGap for what comes along, which may be in vain: 16 KiB fetch 1% to
// 3% less than 64 and take no longer, at 5 ms a request and at 50.
const (
	maxGap   = 64 << 10
	spareGap = 16 << 10
)

// Requests of Complete: readers share the link with it, and may have to wait
// for the last chunk of one.
const (
	completeRequest  = 1 << 20
	completeRequests = 4
)

// unit is what a round trip is worth where Options.Window and Neighbours are
// right as they are: 5 ms at 100 Mbit/s.
const unit = 64 << 10

// reach returns how much one request may bring of the file that was read, and
// of the files behind it. Neighbours are a worse guess than the rest of a file
// and grow half as fast: as fast, print(1) took 20% longer at 5 ms and 30% at
// 20 ms; not at all, numpy took 20% longer at 20 ms and 45% at 50 ms.
func (im *Image) reach() (window, beyond int64) {
	o := &im.engine.opt
	f := min(im.worth.bytes()/unit, o.Growth)
	return int64(float64(o.Window) * max(1, f)), int64(float64(o.Neighbours) * max(1, f/2))
}

// plan lists chunk i, which is missing, and those behind it that one request
// should bring: missing chunks of the same file, then of the files behind it;
// and, if they lie near enough, all those before hi. Who is told what will be read brings that.
// e.mu is held.
func (im *Image) plan(i, hi int) []want {
	if t := im.told.Load(); t != nil && (*t)[i] {
		_, end := im.run(i, *t)
		return im.collect(i, max(hi, end), 0, 0)
	}
	window, beyond := im.reach()
	if window <= 2*im.engine.opt.Window { // else round trips count more
		if n, ok := im.loads.window(i); ok {
			return im.collect(i, hi, n, 0)
		}
	}
	if s, _ := im.linked.Span(im.linked.Chunk(i).Span); s.Codec == chunk.ZstdBlocks {
		window *= 2 // at both ends are blocks of which a part is needed, and a fifth are states
	}
	return im.collect(i, hi, window, beyond)
}

// collect lists chunk i, if it is missing, and missing chunks that can come by
// the same request: all that the spans decode to which must be fetched anyway,
// and as much more as window stored bytes allow, and beyond bytes behind the end
// of the file that was read. For chunks before hi, which are being read, there
// is no such limit, but for the spans that a request holds: index.MaxSpans. e.mu is held.
func (im *Image) collect(i, hi int, window, beyond int64) (wants []want) {
	first := im.linked.Chunk(i)
	if im.here(first) {
		return nil
	}
	all := im.linked.Stored(first) // to be fetched so far
	k := i
	for next := first; k > 0; k-- {
		c := im.linked.Chunk(k - 1)
		if c.Blob != first.Blob || !all.Has(c) || c.End() > next.Offset {
			break
		}
		next = c
	}
	var (
		own   = true // still in the file that was read
		mine  int64  // stored bytes of that file, about
		bytes = all.Length + im.states(all.First, all.Last)

		_, kept = im.kept(0, all.First, all.Last) // stored bytes at the end that need not come
	)
	for ; k < im.linked.Chunks(); k++ {
		c := im.linked.Chunk(k)
		if c.Blob != first.Blob || len(wants) > 0 && c.Offset < wants[len(wants)-1].chunk.End() {
			break
		}
		if own && k > i && k >= hi && !c.Next {
			own, window = false, min(window, mine+beyond)
		}
		if !all.Has(c) {
			more := im.linked.Stored(c)
			end := all.Offset + all.Length
			gap := int64(maxGap)
			if k >= hi {
				gap = spareGap
			}
			if more.Offset-end > gap || more.Last-all.First >= index.MaxSpans {
				break
			}
			over, run := im.kept(kept, all.Last+1, more.Last)
			if over > gap {
				break // with those that are kept, which cost nothing at the end of a request
			}
			length := more.Offset + more.Length - max(end, more.Offset) + im.states(all.Last+1, more.Last)
			if k >= hi && bytes+length > window {
				break
			}
			if im.comes(c, k, i) {
				continue // a gap, perhaps
			}
			bytes, kept = bytes+length, run
			all.Extend(more)
		} else if im.here(c) { // what decoding yields anyway need not come otherwise
			continue
		}
		if own && k >= i {
			mine += im.linked.StoredShare(c)
		}
		s, at := im.address(c)
		wants = append(wants, want{index: k, chunk: c, segment: s, at: at})
	}
	return wants
}

// kept goes on with a run of spans that edges keep, of so many bytes with their states, from one
// span to another. It returns the longest run that has spans behind it that must come, and the
// one at the end. e.mu is held; the lock of edges is taken under it, and no other under that.
func (im *Image) kept(run int64, from, to int) (over, end int64) {
	for i := from; i <= to; i++ {
		if !im.edges.has(i) {
			over, run = max(over, run), 0
			continue
		}
		s, _ := im.linked.Span(i)
		run += s.Length + im.states(i, i)
	}
	return over, run
}

// states is how many bytes the states take of spans from one to another, the last included.
func (im *Image) states(first, last int) (n int64) {
	for i := first; i <= last; i++ {
		if s, _ := im.linked.Span(i); s.Codec == chunk.ZstdBlocks {
			n += int64(s.Window.Length)
		}
	}
	return n
}

// here tells whether a chunk is here, is being fetched, or cannot be. e.mu is
// held.
func (im *Image) here(c link.Chunk) bool {
	s, at := im.address(c)
	return s == nil || im.flying(at) != nil || s.present(at, c)
}

// comes tells whether chunk c, number k, need not come along with chunk i: it is
// here, or comes by another way. e.mu is held.
func (im *Image) comes(c link.Chunk, k, i int) bool {
	if im.here(c) {
		return true
	}
	l := im.landing.Load()
	return k != i && l != nil && l.brings(c.Flat, c.Size)
}

// background claims missing chunks from chunk i on for one request that no
// reader waits for, of at most limit stored bytes and none at or behind the
// flat address end. It returns where to go on.
func (im *Image) background(i int, end, limit int64) ([]want, int) {
	e := im.engine
	for ; i < im.linked.Chunks(); i++ {
		c := im.linked.Chunk(i)
		if c.Flat >= end {
			break
		}
		s, at := im.address(c)
		if s == nil || s.present(at, c) {
			continue
		}
		e.mu.Lock()
		wants := im.collect(i, i, limit, limit)
		for n := len(wants); n > 0 && wants[n-1].chunk.Flat >= end; n-- {
			wants = wants[:n-1]
		}
		e.claim(im, wants, 0, 0)
		e.mu.Unlock()
		if n := len(wants); n > 0 {
			return wants, wants[n-1].index + 1
		}
	}
	return nil, i
}
