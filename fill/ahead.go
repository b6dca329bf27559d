package fill

import "sync"

// A reader is sequential once it has read sequenceRun bytes, uncompressed, at
// steps of at most sequenceStep forth, or back: the kernel's readahead arrives
// page by page in any order. A library that is read as it is needed may look
// so as well: ls(1) then fetches 0.1 MB more of its C library.
const (
	sequenceRun  = 512 << 10
	sequenceStep = 256 << 10

	// aheadRequest is the most that one request ahead of a reader asks for,
	// in stored bytes. Several are in flight.
	aheadRequest = 1 << 20
)

// streams are the last few sequences in which an image was read. Addresses
// count, not files: what lies side by side in a blob does so in a segment, so
// that a tree that is read in its order, tar say, is a sequence too.
type streams struct {
	mu    sync.Mutex
	clock int64
	list  [8]sequence
}

type sequence struct {
	used int64 // clock of the last read; 0 is a free place
	pos  int64 // flat address behind the last byte read
	run  int64 // bytes read
	next int   // the first chunk that was not yet looked at for this reader
	lags bool  // something that was read was not here
}

// find returns the sequence that a read at off belongs to and true, or the one
// that is unused for longest.
func (st *streams) find(off int64) (*sequence, bool) {
	st.clock++
	oldest := &st.list[0]
	for k := range st.list {
		s := &st.list[k]
		if d := off - s.pos; s.used > 0 && d >= -sequenceStep && d <= sequenceStep {
			s.used = st.clock
			return s, true
		}
		if s.used < oldest.used {
			oldest = s
		}
	}
	return oldest, false
}

// follow notes a read of [off, end) that had to wait or not, and fetches ahead of its reader if
// that is sequential and has had to wait: as far as it has come already, Options.Ahead at most,
// so that what is fetched in vain is no more than what was read. For who finds all that it
// reads nothing is fetched: a container that starts again reads faster, and so seems to be
// sequential where it was not the first time.
func (im *Image) follow(off, end int64, waited bool) {
	if off < im.linked.MetaSize || im.led() {
		return
	}
	im.streams.mu.Lock()
	defer im.streams.mu.Unlock()
	s, ok := im.streams.find(off)
	if !ok {
		*s = sequence{used: im.streams.clock, pos: end, run: end - off, next: im.linked.Find(end), lags: waited}
		return
	}
	s.run += end - off
	s.pos = max(s.pos, end)
	if waited && !s.lags {
		s.lags, s.next = true, max(s.next, im.linked.Find(off))
	}
	if s.run < sequenceRun || !s.lags {
		return
	}
	far := min(s.run, im.engine.opt.Ahead)
	if s.next < im.linked.Chunks() && im.linked.Chunk(s.next).Flat > s.pos+far/2 {
		return // or each chunk would be a request
	}
	for {
		select {
		case im.ahead <- struct{}{}:
		default:
			return
		}
		var wants []want
		wants, s.next = im.background(s.next, s.pos+far, aheadRequest)
		if len(wants) == 0 {
			<-im.ahead
			return
		}
		im.requests.Go(func() {
			defer func() { <-im.ahead }()
			im.fetch(im.ctx, wants)
		})
	}
}
