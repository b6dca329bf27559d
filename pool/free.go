package pool

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/chunk"
)

// References is a set of addresses that are in use. The zero value is the
// empty set. It takes a bit for 16 KiB of address space.
type References struct {
	segments map[uint32]bitmap
}

// Add adds the granules that [off, off+n) touches.
func (r *References) Add(segment uint32, off, n int64) error {
	if off < 0 || n <= 0 || off > MaxSegment || n > MaxSegment-off {
		return fmt.Errorf("pool: %w: no %d bytes at offset %d in a segment", chunk.ErrCorrupt, n, off)
	}
	from, to := off/chunk.Block, align(off+n)/chunk.Block
	b := r.segments[segment]
	if short := words(to) - int64(len(b)); short > 0 {
		b = append(b, make(bitmap, short)...)
		if r.segments == nil {
			r.segments = map[uint32]bitmap{}
		}
		r.segments[segment] = b
	}
	b.take(from, to)
	return nil
}

// Has tells whether the granule at off is in the set.
func (r *References) Has(segment uint32, off int64) bool {
	g := off / chunk.Block
	return r.segments[segment].overlaps(g, g+1)
}

// Freed is what Free did.
type Freed struct {
	Segments int   `json:"segments"`   // deleted
	Disk     int64 `json:"disk_bytes"` // given back to the file system
}

// Free gives the disk space of all addresses back that are not in use;
// segments that have none in use are deleted. What is freed stays addressable:
// it is fetched again if somebody wants it.
//
// The caller holds Exclusive since before it looked for what is in use. What it
// does not name may be in nobody's use while Free runs: a reader could see
// zeros. After an error less is freed than could be, and nothing is wrong.
func (p *Pool) Free(inUse *References) (Freed, error) {
	p.freeing.Lock()
	defer p.freeing.Unlock()
	var (
		freed Freed
		errs  []error
	)
	for _, s := range p.all() {
		if used := inUse.segments[s.ID]; !used.empty() {
			gone, err := s.free(used)
			freed.Disk += gone
			p.quota.give(gone)
			errs = append(errs, err)
			continue
		}
		before := s.disk() + s.overhead()
		if err := p.Remove(s); err != nil {
			errs = append(errs, err)
			continue
		}
		freed.Segments++
		freed.Disk += before
	}
	bad, err := filepath.Glob(filepath.Join(p.dir, "*"+badSuffix))
	errs = append(errs, err)
	for _, dir := range bad {
		errs = append(errs, os.RemoveAll(dir))
	}
	return freed, errors.Join(errs...)
}

// free gives back what is not used.
func (s *Segment) free(used bitmap) (disk int64, err error) {
	n := s.Size / chunk.Block
	unused := make(bitmap, words(n))
	for g := used.next(0, n, false); g < n; g = used.next(g, n, false) {
		end := used.next(g, n, true)
		unused.take(g, end)
		g = end
	}
	return s.discard(unused)
}

// discard makes granules vanish. First it is durable that the bytes are not
// here, then they are punched: after a power cut between the two they are only
// forgotten. Read sees by the epoch that its bytes may have been among them.
//
// It returns the bytes of disk that came back: of a sealed segment all or none, then they
// come with Unseal.
func (s *Segment) discard(granules bitmap) (disk int64, err error) {
	defer s.interrupt()()
	s.syncing.Lock()
	defer s.syncing.Unlock()
	s.stores.Lock()
	defer s.stores.Unlock()
	if err := s.presence.drop(granules); err != nil {
		return 0, fmt.Errorf("free in %s: %w", s.dir, err)
	}
	s.epoch.Add(1)
	before := s.disk()
	switch {
	case !s.Sealed():
		err = s.punch(granules)
	case s.presence.count() == 0:
		var f *os.File
		if f, err = s.beside(); err == nil {
			err = s.replace(f)
		}
	}
	return before - s.disk(), err
}

// punch gives the disk space of granules back. stores is held for writing.
func (s *Segment) punch(granules bitmap) error {
	n := s.Size / chunk.Block
	for g := granules.next(0, n, true); g < n; g = granules.next(g, n, true) {
		end := granules.next(g, n, false)
		off, size := g*chunk.Block, (end-g)*chunk.Block
		g = end
		err := s.descriptor(func(fd int) error {
			return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, size)
		})
		if err != nil {
			return fmt.Errorf("free %d bytes at offset %d of %s: %w", size, off, s.Path(), err)
		}
	}
	s.allocated.drop(granules)
	return nil
}
