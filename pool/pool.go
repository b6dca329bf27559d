// Package pool keeps chunks on the node: one content-addressed store for all
// images, made of sparse segment files.
//
// A chunk gets an address in a segment before its bytes are here; the bytes
// arrive later, verified by the caller, and their presence is recorded by
// granules of 16 KiB. The package knows digests and addresses; it knows
// nothing of images, files or where bytes come from.
//
// On disk, under the pool's directory:
//
//	segments/<8 hex digits>/table    what lies where; never changes (table.go)
//	                        data     the bytes; sparse
//	                        present  which granules are here (presence.go)
package pool

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"syscall"

	"github.com/shale-image/shale/chunk"
)

// ErrNoSpace is wrapped by errors of Store and Create when the disk is full.
var ErrNoSpace = errors.New("no space left in the pool")

// Pool is a node's chunk store. Its methods are safe for concurrent use. Only
// one process may have a pool open; the caller sees to that with a lock.
type Pool struct {
	dir string

	mu       sync.RWMutex
	segments map[uint32]*Segment
	order    []uint32 // ids, ascending
}

// Open opens the pool in dir and makes it if it is not there. What a crash of
// the machine may have torn is checked against its digests before Open
// returns (see presence.go).
func Open(dir string) (*Pool, error) {
	root := filepath.Join(dir, "segments")
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, err
	}
	names, err := os.ReadDir(root)
	if err != nil {
		return nil, err
	}
	p := &Pool{dir: root, segments: map[uint32]*Segment{}}
	for _, de := range names {
		id, err := strconv.ParseUint(de.Name(), 16, 32)
		if err != nil || len(de.Name()) != 8 {
			// Left behind by a Create that did not come to its end.
			if err := os.RemoveAll(filepath.Join(root, de.Name())); err != nil {
				return nil, err
			}
			continue
		}
		s, err := openSegment(filepath.Join(root, de.Name()), uint32(id))
		if err != nil {
			p.Close()
			return nil, err
		}
		p.add(s)
	}
	return p, nil
}

func (p *Pool) add(s *Segment) {
	p.segments[s.ID] = s
	at, _ := slices.BinarySearch(p.order, s.ID)
	p.order = slices.Insert(p.order, at, s.ID)
}

// Close writes everything back and closes the pool. No Segment of it may be
// used afterwards.
func (p *Pool) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var errs []error
	for _, s := range p.segments {
		errs = append(errs, s.close())
	}
	p.segments, p.order = map[uint32]*Segment{}, nil
	return errors.Join(errs...)
}

// Sync makes what is present now survive a power cut. It is cheap when
// nothing changed since the last call.
func (p *Pool) Sync() error {
	p.mu.RLock()
	defer p.mu.RUnlock()
	var errs []error
	for _, s := range p.segments {
		errs = append(errs, s.sync())
	}
	return errors.Join(errs...)
}

// Segment returns the segment with the given id.
func (p *Pool) Segment(id uint32) (*Segment, bool) {
	p.mu.RLock()
	defer p.mu.RUnlock()
	s, ok := p.segments[id]
	return s, ok
}

// Lookup finds the address of a chunk that some segment has a place for,
// whether its bytes are here yet or not. A chunk whose size differs from what
// the caller knows is another chunk: one of the two indexes lied.
func (p *Pool) Lookup(d chunk.Digest, size uint32) (s *Segment, off int64, ok bool) {
	p.mu.RLock()
	defer p.mu.RUnlock()
	for _, id := range p.order {
		s := p.segments[id]
		if e, ok := s.table.find(d); ok && e.Size == size {
			return s, e.Off, true
		}
	}
	return nil, 0, false
}

// Create makes a segment with a place for each of the entries, in their
// order, and sets their Off. Digests must be different from each other. The
// segment is durable when Create returns.
func (p *Pool) Create(entries []Entry) (*Segment, error) {
	var off int64
	for i := range entries {
		e := &entries[i]
		if e.Size == 0 || e.Size > chunk.MaxSize {
			return nil, fmt.Errorf("pool: chunk %s has size %d, want 1 to %d", e.Digest, e.Size, chunk.MaxSize)
		}
		e.Off = off
		off += align(int64(e.Size))
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	id := uint32(1)
	if n := len(p.order); n > 0 {
		id = p.order[n-1] + 1
	}
	dir := filepath.Join(p.dir, fmt.Sprintf("%08x", id))
	if err := createSegment(dir, entries, off); err != nil {
		return nil, noSpace(err)
	}
	s, err := openSegment(dir, id)
	if err != nil {
		return nil, err
	}
	p.add(s)
	return s, nil
}

// Usage is what a pool holds, in bytes.
type Usage struct {
	Segments int   `json:"segments"`
	Address  int64 `json:"address_bytes"` // address space given to chunks
	Present  int64 `json:"present_bytes"` // of it, how much is here
	Disk     int64 `json:"disk_bytes"`    // what the file system charges for it
}

// Usage adds up the pool's segments.
func (p *Pool) Usage() Usage {
	p.mu.RLock()
	defer p.mu.RUnlock()
	u := Usage{Segments: len(p.segments)}
	for _, s := range p.segments {
		u.Address += s.Size
		u.Present += s.presence.count() * chunk.Block
		var st syscall.Stat_t
		if syscall.Fstat(int(s.data.Fd()), &st) == nil {
			u.Disk += st.Blocks * 512
		}
	}
	return u
}

func align(n int64) int64 { return (n + chunk.Block - 1) &^ (chunk.Block - 1) }

func noSpace(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%w: %w", ErrNoSpace, err)
	}
	return err
}
