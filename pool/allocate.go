package pool

import (
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/chunk"
)

// allocated are the granules of a segment that have disk space of their own, which is
// counted, before they are here: what was set aside, or was here until the disk lost a
// write. Where bytes are read as zeros tells nothing anyway: what is here is
// told by presence alone. It is of this process; a later one asks for it again.
type allocated struct{ bits atomic.Pointer[bitmap] } // replaced as a whole, with stores held for writing

func (a *allocated) all() bitmap {
	if b := a.bits.Load(); b != nil {
		return *b
	}
	return nil
}

// add adds granules.
func (a *allocated) add(granules bitmap) {
	b := slices.Clone(granules)
	for w, had := range a.all() {
		b[w] |= had
	}
	a.bits.Store(&b)
}

// drop removes granules.
func (a *allocated) drop(granules bitmap) {
	if b := slices.Clone(a.all()); b != nil {
		for w := range b {
			b[w] &^= granules[w]
		}
		a.bits.Store(&b)
	}
}

// Allocate has the disk space of all chunks that refs names and that are not here set
// aside, so that to store them cannot fail for want of space: no quota, and nobody else
// on the file system, can take it. It takes the place of what was asked for before:
// what is not named any more is given back, also what a process before has left. Without
// space for all of it the error wraps ErrNoSpace; what was set aside before stays so.
// Eviction may be needed for it: the caller sees to it that what it names is kept.
func (p *Pool) Allocate(refs *References) error {
	p.allocating.Lock()
	defer p.allocating.Unlock()
	all := p.all()
	for _, s := range all {
		if err := s.setAside(refs.segments[s.ID]); err != nil {
			return err
		}
	}
	var errs []error
	for _, s := range all {
		if err := s.giveBack(refs.segments[s.ID]); err != nil {
			if _, ok := p.Segment(s.ID); ok { // or it was removed meanwhile
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

// setAside reserves space for the named chunks.
func (s *Segment) setAside(named bitmap) error {
	if named.empty() {
		return nil
	}
	had, more := s.allocated.all(), make(bitmap, len(s.presence.live))
	var places []Entry
	var bytes int64
	for _, e := range s.table.byPlace() {
		if from, to := e.granules(); named.overlaps(from, to) && !s.presence.has(from, to) && !had.overlaps(from, to) {
			more.take(from, to)
			places = append(places, e)
			bytes += pages(int64(e.Size))
		}
	}
	if len(places) == 0 {
		return nil
	}
	if s.leftovers() { // it is there, and counted
		bytes = 0
	}
	if err := s.quota.take(bytes); err != nil {
		return err
	}
	s.stores.Lock()
	defer s.stores.Unlock()
	if s.sealed.Load() {
		s.quota.give(bytes)
		return s.refuse()
	}
	before := s.disk()
	err := s.reserve(places)
	s.quota.give(bytes - (s.disk() - before))
	s.allocated.add(more) // also if it is a part only: then giveBack knows it
	return err
}

// reserve makes room for chunks that are in the order of their places.
func (s *Segment) reserve(places []Entry) error {
	call := func(off, n int64) error {
		err := s.descriptor(func(fd int) error { return unix.Fallocate(fd, unix.FALLOC_FL_KEEP_SIZE, off, n) })
		if err != nil {
			return fmt.Errorf("pool: set %d bytes at offset %d of %s aside: %w", n, off, s.Path(), noSpace(err))
		}
		return nil
	}
	for i := 0; i < len(places); {
		off := places[i].Off
		end := off + pages(int64(places[i].Size))
		for i++; i < len(places) && places[i].Off == end; i++ {
			end += pages(int64(places[i].Size))
		}
		if err := call(off, end-off); err != nil {
			return err
		}
	}
	// And for the record of it.
	return descriptor(s.presence.file, func(fd int) error {
		err := unix.Fallocate(fd, 0, 0, presenceSize(s.Size/chunk.Block))
		if errors.Is(err, unix.EOPNOTSUPP) {
			return nil
		}
		return noSpace(err)
	})
}

// giveBack frees what was set aside, by whichever process, and is neither named nor here.
func (s *Segment) giveBack(named bitmap) error {
	had, left := s.allocated.all(), s.leftovers()
	if had.empty() && !left {
		return nil
	}
	s.stores.Lock()
	defer s.stores.Unlock()
	if s.sealed.Load() { // what is above what is here is the file system's
		return nil
	}
	word := func(b bitmap, w int) uint64 {
		if w < len(b) {
			return b[w]
		}
		return 0
	}
	n := s.Size / chunk.Block
	free := make(bitmap, words(n))
	for w := range free {
		set := word(had, w)
		if left {
			set = mask(int64(w), 0, n)
		}
		free[w] = set &^ word(named, w) &^ s.presence.live[w].Load()
	}
	before := s.disk()
	err := s.punch(free)
	s.quota.give(before - s.disk())
	return err
}

// leftovers tells whether a segment takes more disk than what is in it, and what this
// process has set aside.
func (s *Segment) leftovers() bool {
	const slack = 1 << 20 // what the file system needs for itself
	here, had := int64(0), s.allocated.all()
	for w := range s.presence.live {
		b := s.presence.live[w].Load()
		if w < len(had) {
			b |= had[w]
		}
		here += int64(bits.OnesCount64(b))
	}
	return s.disk() > here*chunk.Block+slack
}
