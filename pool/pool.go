// Package pool keeps chunks on the node: one content-addressed store for all
// images, made of sparse segment files.
//
// A chunk gets an address in a segment before its bytes are here; the bytes
// arrive later, verified by the caller, and their presence is recorded by
// granules of 16 KiB. The package knows digests and addresses; it knows
// nothing of images, files or where bytes come from.
//
// On disk, under the pool's directory (docs/formats/pool.md):
//
//	format                           the version of all of this (format.go)
//	segments/<8 hex digits>/table    what lies where; never changes (table.go)
//	                        data     the bytes; sparse
//	                        present  which granules are here (presence.go)
package pool

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// ErrNoSpace is wrapped by errors of Store and Create when the disk is full.
var ErrNoSpace = errors.New("no space left in the pool")

// MaxSegment bounds the address space of a segment in bytes: 4 TiB, which is
// 2^28 granules and 64 MiB of memory for what is present.
const MaxSegment = 4 << 40

// Pool is a node's chunk store. Its methods are safe for concurrent use. Only
// one process may have a pool open; the caller sees to that with a lock.
type Pool struct {
	dir        string // of the segments
	tablesOnly bool   // see OpenTables

	exclusive  sync.Mutex // see Exclusive
	creating   sync.Mutex // one Create at a time; held before mu
	freeing    sync.Mutex // held by Free and Evict
	allocating sync.Mutex // held by Allocate

	quota quota
	rot   atomic.Pointer[func(Problem)] // see OnRot

	mu       sync.RWMutex // never held while something is written
	segments map[uint32]*Segment
	order    []*Segment // by ID
	damage   []error
}

// Open opens the pool in dir and makes it if it is not there. What a crash of
// the machine may have torn is checked against its digests before Open
// returns (recover.go). A segment that is damaged beyond use is set aside, see
// Damage. A pool of a format that this program does not know is an error that
// wraps index.ErrUnsupported.
func Open(dir string) (*Pool, error) { return OpenWith(dir, nil) }

// OpenWith is Open where some segments' data are open already, by their IDs: the pool
// reads and writes through duplicates of these descriptors. Who has the kernel ask
// before a file is read needs one from before (package mount/fanotify).
func OpenWith(dir string, data map[uint32]*os.File) (*Pool, error) {
	root, err := openFormat(dir)
	if err != nil {
		return nil, err
	}
	names, err := os.ReadDir(root)
	if err != nil {
		return nil, err
	}
	p := &Pool{dir: root, segments: map[uint32]*Segment{}}
	for _, de := range names {
		path := filepath.Join(root, de.Name())
		id, suffix, ok := parseName(de.Name())
		switch {
		case ok && suffix == "":
			s, err := openSegmentWith(path, id, data[id])
			if damaged(err) {
				p.damage = append(p.damage, err)
				err = setAside(path)
			}
			if err != nil {
				return nil, errors.Join(err, p.Close())
			}
			if s != nil {
				p.add(s)
			}
		case ok && (suffix == newSuffix || suffix == deletedSuffix):
			// Left behind by a process that did not come to its end.
			if err := os.RemoveAll(path); err != nil {
				return nil, errors.Join(err, p.Close())
			}
		}
	}
	return p, nil
}

// damaged tells whether a segment that failed to open like this is of no use
// any more, as opposed to: could not be read now.
func damaged(err error) bool {
	return errors.Is(err, chunk.ErrCorrupt) || errors.Is(err, os.ErrNotExist)
}

// Damage tells which segments Open found unusable and set aside, and why.
// Images that refer to one have to be linked again; their bytes are fetched
// again. Free deletes what was set aside.
func (p *Pool) Damage() []error { return slices.Clone(p.damage) }

func (p *Pool) add(s *Segment) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s.quota, s.rot = &p.quota, &p.rot
	if !p.tablesOnly {
		p.quota.used.Add(s.disk() + s.overhead())
	}
	p.segments[s.ID] = s
	at, _ := slices.BinarySearchFunc(p.order, s.ID, func(s *Segment, id uint32) int { return cmp.Compare(s.ID, id) })
	p.order = slices.Insert(p.order, at, s)
}

// all returns the segments by ID, so that the disk can work without mu.
func (p *Pool) all() []*Segment {
	p.mu.RLock()
	defer p.mu.RUnlock()
	return slices.Clone(p.order)
}

// Close writes everything back and closes the pool. Methods of its Segments
// that need the disk fail afterwards.
func (p *Pool) Close() error {
	p.mu.Lock()
	all := p.order
	p.segments, p.order = map[uint32]*Segment{}, nil
	p.mu.Unlock()
	var errs []error
	for _, s := range all {
		if !p.tablesOnly {
			errs = append(errs, s.sync(), s.use.save(true))
		}
		errs = append(errs, s.close())
	}
	return errors.Join(errs...)
}

// Sync makes what is present now survive a power cut. It is cheap when
// nothing changed since the last call.
func (p *Pool) Sync() error {
	var errs []error
	for _, s := range p.all() {
		err := errors.Join(s.sync(), s.use.save(false))
		if now, ok := p.Segment(s.ID); ok && now == s { // not removed meanwhile
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Exclusive waits until nobody else plans with the pool's addresses, and keeps
// others from it until the caller calls release: who links an image holds it
// from the first Lookup until the image can be found, who frees holds it from
// the search for images until Free returns. Otherwise one could free what the
// other is about to refer to. Fetching and reading go on meanwhile.
func (p *Pool) Exclusive() (release func()) {
	p.exclusive.Lock()
	return p.exclusive.Unlock
}

// Segment returns the segment with the given id.
func (p *Pool) Segment(id uint32) (*Segment, bool) {
	p.mu.RLock()
	defer p.mu.RUnlock()
	s, ok := p.segments[id]
	return s, ok
}

// Lookup finds the addresses of chunks that some segment has a place for,
// whether their bytes are here yet or not: for each of wanted it sets Off and
// returns the segment, or nil if there is none. A chunk whose size differs
// from what the caller knows is another chunk: one of the two indexes lied.
// Of several places of a chunk it is the first that has the bytes, if any does.
//
// Looking up many at once is what makes it fast: they are sorted, and compared
// with each segment's table from its beginning to its end.
func (p *Pool) Lookup(wanted []Entry) []*Segment {
	found := make([]*Segment, len(wanted))
	p.mu.RLock()
	defer p.mu.RUnlock()
	if len(p.order) == 0 {
		return found
	}
	missing := byDigest(wanted)
	for _, s := range p.order {
		at, rest := 0, missing[:0]
		for _, x := range missing {
			var (
				e  Entry
				ok bool
			)
			if e, ok, at = s.table.find(&wanted[x], at); !ok || e.Size != wanted[x].Size {
				rest = append(rest, x)
				continue
			}
			here := s.Present(e.Off, int64(e.Size))
			if here || found[x] == nil {
				found[x], wanted[x].Off = s, e.Off
			}
			if !here {
				rest = append(rest, x) // perhaps another has it
			}
		}
		missing = rest
	}
	return found
}

// Create makes a segment with a place for each of the entries, in their
// order, and sets their Off. There must be an entry, and digests must be
// different from each other. The segment is durable when Create returns.
//
// Its ID is the beginning of its table's checksum: what an ID refers to never
// changes, also if the segment was deleted, or the whole pool, meanwhile.
func (p *Pool) Create(entries []Entry) (*Segment, error) {
	p.creating.Lock()
	defer p.creating.Unlock()
	size, err := place(entries)
	if err != nil {
		return nil, fmt.Errorf("pool: new segment: %w", err)
	}
	b, id, err := p.newTable(entries, size)
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(p.dir, segmentName(id))
	if err := createSegment(dir, b, size, id); err != nil {
		return nil, noSpace(err)
	}
	return p.enter(dir, id)
}

// enter opens a segment that has just been made.
func (p *Pool) enter(dir string, id uint32) (*Segment, error) {
	open := openSegment
	if p.tablesOnly {
		open = openTableOnly
	}
	s, err := open(dir, id)
	if err != nil {
		return nil, errors.Join(err, deleteSegment(dir))
	}
	p.add(s)
	return s, nil
}

// newTable encodes the table of a new segment, with an ID that no other has.
// The caller holds creating.
func (p *Pool) newTable(entries []Entry, size int64) (b []byte, id uint32, err error) {
	for salt := uint32(0); ; salt++ { // two segments may have the same 32 bits
		if b, err = encodeTable(entries, size, salt); err != nil {
			return nil, 0, fmt.Errorf("pool: new segment: %w", err)
		}
		id = tableID(b)
		_, err := os.Lstat(filepath.Join(p.dir, segmentName(id)))
		if errors.Is(err, os.ErrNotExist) {
			return b, id, nil
		}
		if err != nil {
			return nil, 0, err
		}
	}
}

// place gives the entries their addresses, one after the other, and returns
// where the last one ends.
func place(entries []Entry) (size int64, err error) {
	if len(entries) == 0 {
		return 0, errors.New("no chunks")
	}
	for i := range entries {
		e := &entries[i]
		if e.Size == 0 || e.Size > chunk.MaxSize {
			return 0, fmt.Errorf("%w: chunk %s has size %d, want 1 to %d", chunk.ErrCorrupt, e.Digest, e.Size, chunk.MaxSize)
		}
		if !e.Digest.Algorithm.Known() {
			return 0, fmt.Errorf("%w: chunk %s", chunk.ErrCorrupt, e.Digest)
		}
		e.Off = size
		if size += align(int64(e.Size)); size > MaxSegment {
			return 0, fmt.Errorf("%w: chunks need more than %d bytes of addresses", index.ErrLimit, int64(MaxSegment))
		}
	}
	return size, nil
}

// Remove deletes a segment and what is in it. The caller holds Exclusive and
// knows that no image refers to it.
func (p *Pool) Remove(s *Segment) error {
	defer s.interrupt()()
	var disk int64
	if !p.tablesOnly {
		disk = s.disk() + s.overhead()
	}
	if err := deleteSegment(s.dir); err != nil {
		return err
	}
	p.quota.give(disk)
	p.mu.Lock()
	delete(p.segments, s.ID)
	p.order = slices.DeleteFunc(p.order, func(o *Segment) bool { return o == s })
	p.mu.Unlock()
	return s.close()
}

// Usage is what a pool holds, in bytes.
type Usage struct {
	Segments int   `json:"segments"`
	Sealed   int   `json:"sealed_segments"` // that the file system verifies
	Address  int64 `json:"address_bytes"`   // address space given to chunks
	Present  int64 `json:"present_bytes"`   // of it, how much is here
	Disk     int64 `json:"disk_bytes"`      // what the file system charges for it
	Quota    int64 `json:"quota_bytes"`     // what it may; 0 is without limit
	Evicted  int64 `json:"evicted_bytes"`   // since the pool was opened
}

// Usage adds up the pool's segments.
func (p *Pool) Usage() Usage {
	u := Usage{Quota: p.quota.limit.Load(), Evicted: p.quota.evicted.Load()}
	for _, s := range p.all() {
		u.Segments++
		if s.Sealed() {
			u.Sealed++
		}
		u.Address += s.Size
		u.Present += s.presence.count() * chunk.Block
		u.Disk += s.disk() + s.overhead()
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
