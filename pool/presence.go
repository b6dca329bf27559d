package pool

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"os"
	"strings"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/chunk"
)

// Presence records which granules of a segment are here. The file is mapped
// and shared, so that what is recorded outlives the process at once; whether
// it outlives the machine is another question, and so there are two bitmaps:
//
//	header   4096 B   magic "SHALEPRE", version u32, granules u32, boot id [36]
//	live     1 bit a granule, padded to 4096 B: the bytes were written
//	durable  likewise: the bytes were written AND synced to disk before
//
// Within one boot (the boot id is this boot's) live is the truth: a killed
// process loses nothing. After another boot durable is, and what only live
// says may be torn: it is checked against its digests before it is believed.
// Bits are little-endian 64-bit words, granule g is bit g%64 of word g/64.
const (
	presenceMagic   = "SHALEPRE"
	presenceVersion = 1
	pageSize        = 4096
)

type presence struct {
	mapped   []byte
	live     []atomic.Uint64
	durable  []atomic.Uint64
	granules int64
	dirty    atomic.Bool // live has bits that durable may lack
}

func bitmapBytes(granules int64) int64 {
	return ((granules+7)/8 + pageSize - 1) &^ (pageSize - 1)
}

// createPresence writes a file of explicit zeros: a hole in a mapped file
// would be SIGBUS on a full disk.
func createPresence(path string, granules int64) error {
	b := make([]byte, pageSize+2*bitmapBytes(granules))
	copy(b, presenceMagic)
	binary.LittleEndian.PutUint32(b[8:], presenceVersion)
	binary.LittleEndian.PutUint32(b[12:], uint32(granules))
	return writeSynced(path, b)
}

func openPresence(path string, granules int64) (*presence, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	size := pageSize + 2*bitmapBytes(granules)
	if st.Size() != size {
		return nil, fmt.Errorf("%s: %w: %d bytes, want %d", path, chunk.ErrCorrupt, st.Size(), size)
	}
	b, err := unix.Mmap(int(f.Fd()), 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map %s: %w", path, err)
	}
	le := binary.LittleEndian
	if string(b[:8]) != presenceMagic || le.Uint32(b[8:]) != presenceVersion || int64(le.Uint32(b[12:])) != granules {
		unix.Munmap(b)
		return nil, fmt.Errorf("%s: at offset 0: %w: not the presence record of a segment of %d granules", path, chunk.ErrCorrupt, granules)
	}
	words := func(b []byte) []atomic.Uint64 {
		if len(b) == 0 {
			return nil
		}
		return unsafe.Slice((*atomic.Uint64)(unsafe.Pointer(&b[0])), len(b)/8)
	}
	n := bitmapBytes(granules)
	return &presence{
		mapped:   b,
		live:     words(b[pageSize : pageSize+n]),
		durable:  words(b[pageSize+n:]),
		granules: granules,
	}, nil
}

func (p *presence) close() error { return unix.Munmap(p.mapped) }

// has tells whether all granules in [from, to) are here.
func (p *presence) has(from, to int64) bool {
	for g := from; g < to; {
		w, mask, next := word(g, to)
		if p.live[w].Load()&mask != mask {
			return false
		}
		g = next
	}
	return true
}

// set records the granules in [from, to) as here.
func (p *presence) set(from, to int64) {
	for g := from; g < to; {
		w, mask, next := word(g, to)
		p.live[w].Or(mask)
		g = next
	}
	p.dirty.Store(true)
}

// clear forgets the granules in [from, to).
func (p *presence) clear(from, to int64) {
	for g := from; g < to; {
		w, mask, next := word(g, to)
		p.live[w].And(^mask)
		p.durable[w].And(^mask)
		g = next
	}
}

// word gives the word that holds granule g, the bits in it of [g, to), and the
// first granule behind them.
func word(g, to int64) (w int64, mask uint64, next int64) {
	w = g / 64
	next = min(to, (w+1)*64)
	mask = ^uint64(0) >> (64 - uint(next-g)) << uint(g%64)
	return w, mask, next
}

func (p *presence) count() (n int64) {
	for i := range p.live {
		n += int64(bits.OnesCount64(p.live[i].Load()))
	}
	return n
}

// sync makes durable what is live: first the data, then the record of it.
func (p *presence) sync(data *os.File) error {
	if !p.dirty.Swap(false) {
		return nil
	}
	snapshot := make([]uint64, len(p.live))
	for i := range p.live {
		snapshot[i] = p.live[i].Load()
	}
	if err := unix.Fdatasync(int(data.Fd())); err != nil {
		p.dirty.Store(true)
		return fmt.Errorf("sync %s: %w", data.Name(), err)
	}
	for i, bits := range snapshot {
		p.durable[i].Or(bits)
	}
	if err := unix.Msync(p.mapped, unix.MS_SYNC); err != nil {
		p.dirty.Store(true)
		return fmt.Errorf("sync presence of %s: %w", data.Name(), err)
	}
	return nil
}

// recover is called once after opening. If the record is from another boot,
// chunks that are live but not durable are read and kept only if their digest
// says that they are whole.
func (p *presence) recover(s *Segment) error {
	boot, err := bootID()
	if err != nil {
		return err
	}
	if string(p.mapped[16:16+len(boot)]) == boot {
		p.dirty.Store(true) // a killed process may have left bits that were never synced
		return nil
	}
	for i := range s.table.count {
		e := s.table.entry(i)
		from, to := e.Off/chunk.Block, align(e.Off+int64(e.Size))/chunk.Block
		if !p.any(from, to) || p.hasDurable(from, to) {
			continue
		}
		if p.has(from, to) && s.verify(e) == nil {
			p.dirty.Store(true)
			continue
		}
		p.clear(from, to)
	}
	copy(p.mapped[16:], boot)
	return unix.Msync(p.mapped, unix.MS_SYNC)
}

func (p *presence) any(from, to int64) bool {
	for g := from; g < to; {
		w, mask, next := word(g, to)
		if p.live[w].Load()&mask != 0 {
			return true
		}
		g = next
	}
	return false
}

func (p *presence) hasDurable(from, to int64) bool {
	for g := from; g < to; {
		w, mask, next := word(g, to)
		if p.durable[w].Load()&mask != mask {
			return false
		}
		g = next
	}
	return true
}

// bootID returns the kernel's name for this boot, 36 characters. Tests
// replace it to play a reboot.
var bootID = func() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}
