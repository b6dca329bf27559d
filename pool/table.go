package pool

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"sort"

	"golang.org/x/sys/unix"
	"lukechampine.com/blake3"

	"github.com/shale-image/shale/chunk"
)

// The table of a segment says which chunk lies where. It is written once and
// mapped, so that a node's memory does not grow with its pool; little-endian:
//
//	header    64 B   magic "SHALESG1", count u32, salt u32, size u64 (of the
//	                 data, bytes), zeros
//	records   44 B   x count, in order of sum, then algorithm:
//	                 sum [32], algorithm u8, zeros [3], size u32,
//	                 granule u32 (address / 16 KiB)
//	checksum  32 B   BLAKE3 of all of the above; its first four bytes, as the
//	                 hex digits they are, name the segment
const (
	tableMagic = "SHALESG1"
	headerSize = 64
	recordSize = 44
	keySize    = 33 // sum and algorithm
	sumSize    = 32
)

// Entry is a chunk's place in a segment.
type Entry struct {
	Digest chunk.Digest
	Size   uint32 // bytes
	Off    int64  // address in the segment, a multiple of chunk.Block
}

// key returns what digests are sorted by.
func (e *Entry) key() (k [keySize]byte) {
	copy(k[:], e.Digest.Sum[:])
	k[32] = byte(e.Digest.Algorithm)
	return k
}

// byDigest returns the positions of the entries in the order of their digests.
// Nearly always the first eight bytes decide; they are kept beside the position
// so that comparing does not go through it.
func byDigest(entries []Entry) []uint32 {
	type item struct {
		prefix uint64
		at     uint32
	}
	items := make([]item, len(entries))
	for i := range entries {
		items[i] = item{binary.BigEndian.Uint64(entries[i].Digest.Sum[:]), uint32(i)}
	}
	slices.SortFunc(items, func(x, y item) int {
		if x.prefix != y.prefix {
			return cmp.Compare(x.prefix, y.prefix)
		}
		a, b := &entries[x.at].Digest, &entries[y.at].Digest
		return cmp.Or(bytes.Compare(a.Sum[:], b.Sum[:]), cmp.Compare(a.Algorithm, b.Algorithm))
	})
	order := make([]uint32, len(entries))
	for i, it := range items {
		order[i] = it.at
	}
	return order
}

// table is a parsed table.
type table struct {
	mapped  []byte // the whole file, if it is one
	records []byte
	count   int
	size    int64
	id      uint32
}

// encodeTable fails if two entries have the same digest.
func encodeTable(entries []Entry, size int64, salt uint32) ([]byte, error) {
	le := binary.LittleEndian
	order := byDigest(entries)
	n := headerSize + len(entries)*recordSize
	b := make([]byte, n, n+sumSize)
	copy(b, tableMagic)
	le.PutUint32(b[8:], uint32(len(entries)))
	le.PutUint32(b[12:], salt)
	le.PutUint64(b[16:], uint64(size))
	for i, x := range order {
		e := &entries[x]
		if i > 0 && entries[order[i-1]].Digest == e.Digest {
			return nil, fmt.Errorf("chunk %s is there twice", e.Digest)
		}
		r := b[headerSize+i*recordSize:]
		copy(r, e.Digest.Sum[:])
		r[32] = byte(e.Digest.Algorithm)
		le.PutUint32(r[36:], e.Size)
		le.PutUint32(r[40:], uint32(e.Off/chunk.Block))
	}
	sum := blake3.Sum256(b)
	return append(b, sum[:]...), nil
}

// tableID returns the name that an encoded table gives its segment.
func tableID(b []byte) uint32 { return binary.BigEndian.Uint32(b[len(b)-sumSize:]) }

func openTable(path string) (*table, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if st.Size() < headerSize+sumSize || st.Size() > headerSize+MaxSegment/chunk.Block*recordSize+sumSize {
		return nil, fmt.Errorf("%s: %w: a table cannot have %d bytes", path, chunk.ErrCorrupt, st.Size())
	}
	b, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map %s: %w", path, err)
	}
	t, err := parseTable(b)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", path, err), unix.Munmap(b))
	}
	t.mapped = b
	return t, nil
}

// close unmaps the table. Only Lookup uses one after its segment was opened, and
// nobody closes a segment that Lookup can still meet.
func (t *table) close() error {
	if t.mapped == nil {
		return nil
	}
	err := unix.Munmap(t.mapped)
	*t = table{}
	return err
}

// parseTable checks everything that later use relies on, although only
// encodeTable writes what has the right checksum.
func parseTable(b []byte) (*table, error) {
	bad := func(off int, format string, args ...any) error {
		return fmt.Errorf("at offset %d: %w: %s", off, chunk.ErrCorrupt, fmt.Sprintf(format, args...))
	}
	le := binary.LittleEndian
	if len(b) < headerSize+sumSize || string(b[:8]) != tableMagic {
		return nil, bad(0, "not a table %q", tableMagic)
	}
	body := b[:len(b)-sumSize]
	if blake3.Sum256(body) != [32]byte(b[len(body):]) {
		return nil, bad(len(body), "checksum does not match")
	}
	n := int64(le.Uint32(b[8:]))
	if want := headerSize + n*recordSize + sumSize; n == 0 || int64(len(b)) != want {
		return nil, bad(8, "%d chunks make %d bytes, file has %d", n, want, len(b))
	}
	t := &table{records: body[headerSize:], count: int(n), size: int64(le.Uint64(b[16:])), id: tableID(b)}
	if t.size <= 0 || t.size > MaxSegment || t.size%chunk.Block != 0 || t.size > n*chunk.MaxSize {
		return nil, bad(16, "%d chunks cannot have %d bytes of addresses", n, t.size)
	}
	taken := make(bitmap, words(t.size/chunk.Block))
	for i := range t.count {
		off, e := headerSize+i*recordSize, t.entry(i)
		switch {
		case i > 0 && bytes.Compare(t.key(i-1), t.key(i)) >= 0:
			return nil, bad(off, "chunk %s is out of order", e.Digest)
		case !e.Digest.Algorithm.Known():
			return nil, bad(off+32, "digest algorithm %d", e.Digest.Algorithm)
		case e.Size == 0 || e.Size > chunk.MaxSize:
			return nil, bad(off+36, "chunk %s has size %d", e.Digest, e.Size)
		case e.Off+align(int64(e.Size)) > t.size:
			return nil, bad(off+40, "chunk %s ends at %d of %d", e.Digest, e.Off+int64(e.Size), t.size)
		}
		if from, to := e.granules(); !taken.take(from, to) {
			return nil, bad(off+40, "chunk %s lies on another", e.Digest)
		}
	}
	return t, nil
}

// granules returns the first granule of the entry and the one behind its last.
func (e Entry) granules() (from, to int64) {
	return e.Off / chunk.Block, (e.Off + align(int64(e.Size))) / chunk.Block
}

func (t *table) key(i int) []byte { return t.records[i*recordSize : i*recordSize+keySize] }

// entry returns record i, in order of digest.
func (t *table) entry(i int) Entry {
	le := binary.LittleEndian
	r := t.records[i*recordSize : (i+1)*recordSize]
	return Entry{
		Digest: chunk.Digest{Algorithm: chunk.Algorithm(r[32]), Sum: [32]byte(r[:32])},
		Size:   le.Uint32(r[36:]),
		Off:    int64(le.Uint32(r[40:])) * chunk.Block,
	}
}

// find returns the record of a digest, and where to go on for a greater one.
// The step doubles from `from` on until it is too long, then the rest is
// bisected: few neighbouring records are touched where a sorted list of digests
// is looked up, and at most 2 log2(count), whatever the digests.
func (t *table) find(wanted *Entry, from int) (e Entry, ok bool, next int) {
	want := wanted.key()
	less := func(i int) bool { return bytes.Compare(t.key(i), want[:]) < 0 }
	lo, step := from, 1 // what lies before lo is less
	for lo+step <= t.count && less(lo+step-1) {
		lo, step = lo+step, 2*step
	}
	hi := min(lo+step-1, t.count) // what lies from hi on is not
	lo += sort.Search(hi-lo, func(i int) bool { return !less(lo + i) })
	if lo < t.count && bytes.Equal(t.key(lo), want[:]) {
		return t.entry(lo), true, lo
	}
	return Entry{}, false, lo
}
