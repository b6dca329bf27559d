package pool

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/chunk"
)

// Segment is a sparse file with places for chunks. Its methods are safe for
// concurrent use.
type Segment struct {
	ID   uint32
	Size int64 // bytes of address space, a multiple of chunk.Block

	dir      string
	chunks   int // of table, also when that is closed
	table    *table
	data     atomic.Pointer[os.File] // read-only while sealed; replaced with syncing and stores held
	presence *presence

	syncing sync.Mutex   // held while something becomes durable, or is freed; taken before stores
	stores  sync.RWMutex // held for reading by Store, for writing by what makes bytes vanish

	epoch     atomic.Uint64 // counted up between the end of presence and that of bytes
	allocated allocated
	quota     *quota // of the pool
	use       use
	rot       *atomic.Pointer[func(Problem)] // of the pool

	sealed  atomic.Bool // the data cannot change; seal.go
	sealing atomic.Bool // or is just being sealed
	turn    turn
}

// createSegment writes a segment beside its final name, syncs it and renames
// it there.
func createSegment(dir string, table []byte, size int64, id uint32) (err error) {
	tmp := dir + newSuffix
	if err := os.RemoveAll(tmp); err != nil {
		return err
	}
	if err := os.Mkdir(tmp, 0o700); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(tmp))
		}
	}()
	granules := size / chunk.Block
	var files errgroup.Group // a disk syncs three in hardly more time than one
	for _, f := range []struct {
		name string
		head []byte
		size int64
	}{
		{"table", table, int64(len(table))},
		{"present", presenceHeader(id, granules, ""), presenceSize(granules)},
		{"data", nil, size},
	} {
		files.Go(func() error { return writeSynced(filepath.Join(tmp, f.name), f.head, f.size) })
	}
	if err := files.Wait(); err != nil {
		return err
	}
	if err := syncDir(tmp); err != nil {
		return err
	}
	if err := os.Rename(tmp, dir); err != nil {
		return err
	}
	if err := syncDir(filepath.Dir(dir)); err != nil {
		return errors.Join(err, os.RemoveAll(dir))
	}
	return nil
}

// deleteSegment makes a segment vanish at once, and then its files.
func deleteSegment(dir string) error {
	gone := dir + deletedSuffix
	if err := os.RemoveAll(gone); err != nil {
		return err
	}
	if err := os.Rename(dir, gone); err != nil {
		return err
	}
	// In this order also after a power cut: no segment lacks a file.
	if err := syncDir(filepath.Dir(dir)); err != nil {
		return err
	}
	return os.RemoveAll(gone)
}

func openSegment(dir string, id uint32) (*Segment, error) { return openSegmentWith(dir, id, nil) }

func openSegmentWith(dir string, id uint32, data *os.File) (_ *Segment, err error) {
	s := &Segment{ID: id, dir: dir}
	if s.table, err = openTable(filepath.Join(dir, "table")); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	if s.table.id != id {
		return nil, fmt.Errorf("%s: %w: this is the table of segment %08x", dir, chunk.ErrCorrupt, s.table.id)
	}
	s.Size, s.chunks = s.table.size, s.table.count
	s.use.open(dir, s.Size)
	// Of a process that was killed while it unsealed.
	if err := os.Remove(filepath.Join(dir, newData)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	boot, err := session(dir)
	if err != nil {
		return nil, fmt.Errorf("which boot is this: %v", err) // not ErrNotExist: the segment is not to blame
	}
	f, sealed, err := openData(filepath.Join(dir, "data"), data)
	if err != nil {
		return nil, err
	}
	s.data.Store(f)
	s.sealed.Store(sealed)
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if st.Size() != s.Size {
		return nil, fmt.Errorf("%s: %w: %d bytes, want %d", s.Path(), chunk.ErrCorrupt, st.Size(), s.Size)
	}
	var (
		doubt bitmap
		ok    bool
	)
	if s.presence, doubt, ok, err = openPresence(filepath.Join(dir, "present"), id, s.Size/chunk.Block, boot); err != nil {
		return nil, err
	}
	if !ok {
		err = s.recover(doubt, boot)
	}
	return s, err
}

// openData opens a data file, and tells whether it is sealed; same, if it is that file,
// stands for it.
func openData(path string, same *os.File) (_ *os.File, sealed bool, err error) {
	if same == nil {
		return openSealed(path)
	}
	at, err := os.Stat(path)
	if err != nil {
		return nil, false, err
	}
	if st, err := same.Stat(); err != nil || !os.SameFile(at, st) {
		return nil, false, fmt.Errorf("%s is another file than the one that is in use: %v", path, err)
	}
	fd, err := unix.FcntlInt(same.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, false, os.NewSyscallError("dup", err)
	}
	return os.NewFile(uintptr(fd), path), isSealed(path), nil
}

// Path is the segment's data file, for faces that mount it directly.
func (s *Segment) Path() string { return filepath.Join(s.dir, "data") }

// File is that file as the pool has it open. It is the segment's own, and may be closed
// when it is sealed or unsealed.
func (s *Segment) File() *os.File { return s.data.Load() }

// Present tells whether all of [off, off+n) is here. What is not in the
// segment is not.
func (s *Segment) Present(off, n int64) bool {
	return off >= 0 && n >= 0 && off <= s.Size && n <= s.Size-off &&
		s.presence.has(off/chunk.Block, align(off+n)/chunk.Block)
}

// Read reads exactly len(p) bytes at off if all of them are here, and returns
// false otherwise; p then has anything. Bytes that are evicted meanwhile are not
// here. It takes no lock: between the moment at which bytes are not present any
// more and the moment at which they vanish the epoch changes, and nothing is
// stored until they have. So what was present at an epoch that is still the same
// after it was read was there all the time.
//
// What a sealed segment's file system will not read has rotted, and is not here any more.
func (s *Segment) Read(p []byte, off int64) (bool, error) {
	ok, err := s.readHere(p, off)
	if err == nil || !s.sealed.Load() || !errors.Is(err, unix.EIO) {
		return ok, err
	}
	return false, s.forgetRotten(off, int64(len(p)), err)
}

// readHere is Read that does not mind why bytes cannot be read.
func (s *Segment) readHere(p []byte, off int64) (bool, error) {
	for {
		epoch := s.epoch.Load()
		if !s.Present(off, int64(len(p))) {
			return false, nil
		}
		if err := s.ReadAt(p, off); err != nil {
			return false, err
		}
		if s.epoch.Load() == epoch {
			s.use.touch(off, int64(len(p)))
			return true, nil
		}
	}
}

// ReadAt reads exactly len(p) bytes at off. What is not present, or evicted
// meanwhile, reads as anything: the caller verifies what it gets.
func (s *Segment) ReadAt(p []byte, off int64) error {
	err := s.with(func(f *os.File) error {
		_, err := f.ReadAt(p, off)
		return err
	})
	if err != nil {
		return fmt.Errorf("pool: %w", err)
	}
	return nil
}

// with calls fn with the data file, again if that was replaced and closed meanwhile.
func (s *Segment) with(fn func(*os.File) error) error {
	for {
		f := s.data.Load()
		if err := fn(f); !errors.Is(err, os.ErrClosed) || s.data.Load() == f {
			return err
		}
	}
}

// descriptor calls fn with the descriptor of the data file.
func (s *Segment) descriptor(fn func(fd int) error) error {
	return s.with(func(f *os.File) error { return descriptor(f, fn) })
}

var zeros [pageSize]byte

// Store writes a chunk's bytes, which the caller has verified, at the address
// it has in this segment, and then records them as present. Zeros follow up to
// the end of the last 4 KiB block. Two stores of the same chunk may run at
// once: they write the same bytes.
//
// If the disk, or the quota, is full and nothing can be evicted, the error wraps
// ErrNoSpace, and nothing is recorded.
func (s *Segment) Store(off int64, p []byte) error {
	n := int64(len(p))
	if off < 0 || off%chunk.Block != 0 || n == 0 || n > s.Size || off > s.Size-align(n) {
		return fmt.Errorf("pool: %w: no chunk of %d bytes at offset %d of segment %08x (%d bytes)", chunk.ErrCorrupt, n, off, s.ID, s.Size)
	}
	var room int64
	for g := off / chunk.Block; g < align(off+n)/chunk.Block; g++ {
		if !s.presence.has(g, g+1) {
			room += s.room(g, off+n)
		}
	}
	if s.sealed.Load() && room > 0 {
		return s.refuse()
	}
	if err := s.quota.take(room); err != nil {
		return err
	}
	took, err := s.write(off, p)
	if errors.Is(err, ErrNoSpace) && s.quota.makeRoom(room) {
		took, err = s.write(off, p)
	}
	s.quota.give(room - took) // another store may have come before this one, or eviction
	if err != nil {
		return fmt.Errorf("pool: %w", err)
	}
	s.use.touch(off, n)
	return nil
}

// pages is the disk that n bytes take.
func pages(n int64) int64 { return (n + pageSize - 1) &^ (pageSize - 1) }

// room is the disk that granule g of a chunk that ends at end takes: none where it was set
// aside.
func (s *Segment) room(g, end int64) int64 {
	if s.allocated.all().overlaps(g, g+1) {
		return 0
	}
	return pages(min(chunk.Block, end-g*chunk.Block))
}

// write is Store when there ought to be room. It returns the disk that was taken.
func (s *Segment) write(off int64, p []byte) (took int64, err error) {
	n := int64(len(p))
	s.stores.RLock()
	defer s.stores.RUnlock()
	if s.sealed.Load() {
		if s.Present(off, n) {
			return 0, nil
		}
		return 0, s.refuse()
	}
	data := s.data.Load() // nobody replaces it meanwhile
	_, err = data.WriteAt(p, off)
	if pad := -n & (pageSize - 1); err == nil && pad > 0 {
		_, err = data.WriteAt(zeros[:pad], off+n)
	}
	if err != nil {
		return 0, noSpace(err)
	}
	err = s.presence.set(off/chunk.Block, align(off+n)/chunk.Block, func(g int64) { took += s.room(g, off+n) })
	if err != nil {
		took = 0
	}
	return took, err
}

// sync makes durable what is live: first the data, then the record of it.
func (s *Segment) sync() error {
	s.syncing.Lock()
	defer s.syncing.Unlock()
	live := s.presence.snapshot()
	if live == nil {
		return nil
	}
	err := s.descriptor(unix.Fdatasync)
	if err == nil {
		err = s.presence.promote(live)
	} else if !errors.Is(err, os.ErrClosed) {
		// The kernel reports a failed write once, and may then drop the bytes
		// from its cache as if they had been written.
		s.stores.Lock()
		forgotten, e := s.presence.distrust()
		err = errors.Join(err, e)
		s.allocated.add(forgotten) // who reads them may be the kernel: their bytes stay
		s.epoch.Add(1)
		s.stores.Unlock()
	}
	if err != nil {
		return fmt.Errorf("sync %s: %w", s.dir, noSpace(err))
	}
	return nil
}

func (s *Segment) close() error {
	errs := []error{s.table.close()}
	if f := s.data.Load(); f != nil {
		errs = append(errs, f.Close())
	}
	if s.presence != nil && s.presence.file != nil {
		errs = append(errs, s.presence.file.Close())
	}
	return errors.Join(errs...)
}

// disk returns the bytes that the file system charges for the data.
func (s *Segment) disk() int64 {
	var st unix.Stat_t
	if s.descriptor(func(fd int) error { return unix.Fstat(fd, &st) }) != nil {
		return 0
	}
	return st.Blocks * 512
}

// overhead returns the most that the files beside the data take.
func (s *Segment) overhead() int64 {
	return pages(int64(headerSize+s.chunks*recordSize+sumSize)) + pages(presenceSize(s.Size/chunk.Block)) + pages(int64(4*len(s.use.last)))
}

// descriptor calls fn with f's descriptor, which stays open meanwhile.
func descriptor(f *os.File, fn func(fd int) error) error {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var ferr error
	if err := c.Control(func(fd uintptr) {
		for {
			if ferr = fn(int(fd)); ferr != unix.EINTR {
				return
			}
		}
	}); err != nil {
		return err
	}
	return ferr
}

func datasync(f *os.File) error { return descriptor(f, unix.Fdatasync) }
