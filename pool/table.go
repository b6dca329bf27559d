package pool

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"
	"lukechampine.com/blake3"

	"github.com/shale-image/shale/chunk"
)

// The table of a segment says which chunk lies where. It is written once and
// mapped; little-endian:
//
//	header    64 B   magic "SHALESEG", version u32, count u32, size u64
//	                 (of the data, bytes), zeros
//	records   48 B   x count, in order of address:
//	                 sum [32], granule u32 (address / 16 KiB), size u32,
//	                 algorithm u8, zeros
//	order     4 B    x count: record numbers in order of sum
//	checksum  32 B   BLAKE3 of all of the above
//
// Digests are uniformly distributed, so a digest is found by interpolation in
// the order: two or three probes, whatever the size.
const (
	tableMagic   = "SHALESEG"
	tableVersion = 1
	headerSize   = 64
	recordSize   = 48
	sumSize      = 32
)

// Entry is a chunk's place in a segment.
type Entry struct {
	Digest chunk.Digest
	Size   uint32 // bytes
	Off    int64  // address in the segment, a multiple of chunk.Block
}

type table struct {
	mapped  []byte // the whole file
	records []byte
	order   []byte
	count   int
	size    int64
}

func encodeTable(entries []Entry, size int64) []byte {
	le := binary.LittleEndian
	n := len(entries)
	b := make([]byte, headerSize+n*(recordSize+4), headerSize+n*(recordSize+4)+sumSize)
	copy(b, tableMagic)
	le.PutUint32(b[8:], tableVersion)
	le.PutUint32(b[12:], uint32(n))
	le.PutUint64(b[16:], uint64(size))
	order := make([]uint32, n)
	for i, e := range entries {
		r := b[headerSize+i*recordSize:]
		copy(r, e.Digest.Sum[:])
		le.PutUint32(r[32:], uint32(e.Off/chunk.Block))
		le.PutUint32(r[36:], e.Size)
		r[40] = byte(e.Digest.Algorithm)
		order[i] = uint32(i)
	}
	slices.SortFunc(order, func(x, y uint32) int {
		return bytes.Compare(entries[x].Digest.Sum[:], entries[y].Digest.Sum[:])
	})
	for i, x := range order {
		le.PutUint32(b[headerSize+n*recordSize+4*i:], x)
	}
	sum := blake3.Sum256(b)
	return append(b, sum[:]...)
}

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
	bad := func(off int64, format string, args ...any) error {
		return fmt.Errorf("%s: at offset %d: %w: %s", path, off, chunk.ErrCorrupt, fmt.Sprintf(format, args...))
	}
	if st.Size() < headerSize+sumSize {
		return nil, bad(0, "%d bytes, want at least %d", st.Size(), headerSize+sumSize)
	}
	b, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map %s: %w", path, err)
	}
	t, err := parseTable(b, bad)
	if err != nil {
		unix.Munmap(b)
		return nil, err
	}
	return t, nil
}

func parseTable(b []byte, bad func(int64, string, ...any) error) (*table, error) {
	le := binary.LittleEndian
	if len(b) < headerSize+sumSize || string(b[:8]) != tableMagic {
		return nil, bad(0, "magic is %q, want %q", b[:min(8, len(b))], tableMagic)
	}
	if v := le.Uint32(b[8:]); v != tableVersion {
		return nil, bad(8, "segment format version %d, this program knows %d", v, tableVersion)
	}
	n := int64(le.Uint32(b[12:]))
	if want := headerSize + n*(recordSize+4) + sumSize; int64(len(b)) != want {
		return nil, bad(12, "%d chunks make %d bytes, file has %d", n, want, len(b))
	}
	body := b[:len(b)-sumSize]
	if blake3.Sum256(body) != [32]byte(b[len(body):]) {
		return nil, bad(int64(len(body)), "checksum does not match")
	}
	// From here on the bytes are what encodeTable wrote.
	return &table{
		mapped:  b,
		records: b[headerSize : headerSize+n*recordSize],
		order:   body[headerSize+n*recordSize:],
		count:   int(n),
		size:    int64(le.Uint64(b[16:])),
	}, nil
}

func (t *table) close() error { return unix.Munmap(t.mapped) }

// entry returns record i, in order of address.
func (t *table) entry(i int) Entry {
	le := binary.LittleEndian
	r := t.records[i*recordSize:]
	return Entry{
		Digest: chunk.Digest{Algorithm: chunk.Algorithm(r[40]), Sum: [32]byte(r[:32])},
		Off:    int64(le.Uint32(r[32:])) * chunk.Block,
		Size:   le.Uint32(r[36:]),
	}
}

func (t *table) sorted(i int) []byte {
	x := int(binary.LittleEndian.Uint32(t.order[4*i:]))
	return t.records[x*recordSize : x*recordSize+recordSize]
}

// find looks a digest up: a few steps of interpolation, then bisection, since
// an index may have been made to cluster.
func (t *table) find(d chunk.Digest) (Entry, bool) {
	be := binary.BigEndian
	key := be.Uint64(d.Sum[:])
	lo, hi := 0, t.count // the answer, if any, is in [lo, hi)
	for step := 0; lo < hi; step++ {
		mid := int(uint(lo+hi) / 2)
		if step < 4 && hi-lo > 8 {
			first, last := be.Uint64(t.sorted(lo)), be.Uint64(t.sorted(hi-1))
			if key < first || key > last {
				return Entry{}, false
			}
			if last > first {
				mid = lo + int(float64(key-first)/float64(last-first)*float64(hi-1-lo))
				mid = min(max(mid, lo), hi-1)
			}
		}
		switch r := t.sorted(mid); bytes.Compare(r[:32], d.Sum[:]) {
		case 0:
			e := t.entry(int(binary.LittleEndian.Uint32(t.order[4*mid:])))
			return e, e.Digest.Algorithm == d.Algorithm
		case -1:
			lo = mid + 1
		default:
			hi = mid
		}
	}
	return Entry{}, false
}
