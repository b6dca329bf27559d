package link

import (
	"cmp"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sort"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// The map says, for each chunk of a linked image, where its bytes come from.
// It is mapped, not read, so that a node's memory does not grow with its
// images; little-endian:
//
//	header   64 B   magic "SHALEMAP", version u32, count u32, zeros
//	records  64 B   x count, in order of flat address:
//	                flat u64, blob offset u64, stored length u32, size u32,
//	                blob u16, codec u8, digest algorithm u8, flags u8, zeros,
//	                digest sum [32]
const (
	mapMagic   = "SHALEMAP"
	mapVersion = 1
	mapHeader  = 64
	mapRecord  = 64

	// flagNext: this chunk continues the file that the chunk before it in the
	// map belongs to. A fetch stops at the end of a file.
	flagNext = 1
)

// Chunk is one record of the map.
type Chunk struct {
	Flat   int64 // flat address of the first byte
	Size   uint32
	Digest chunk.Digest
	Codec  chunk.Codec
	Blob   int // position in Info.Blobs
	Offset int64
	Length uint32 // stored bytes
	Next   bool   // continues the file of the record before
}

func encodeMap(t *index.Tree, places []place, flat map[uint32]int64) []byte {
	order := make([]uint32, 0, len(places))
	for i := range places {
		if places[i].used {
			order = append(order, uint32(i))
		}
	}
	addr := func(x uint32) int64 { return flat[places[x].segment] + places[x].off }
	slices.SortFunc(order, func(x, y uint32) int { return cmp.Or(cmp.Compare(addr(x), addr(y)), cmp.Compare(x, y)) })
	// Equal chunks have one address: the first copy is as good as the others.
	order = slices.CompactFunc(order, func(x, y uint32) bool { return addr(x) == addr(y) })

	le := binary.LittleEndian
	b := make([]byte, mapHeader+len(order)*mapRecord)
	copy(b, mapMagic)
	le.PutUint32(b[8:], mapVersion)
	le.PutUint32(b[12:], uint32(len(order)))
	for i, x := range order {
		c, r := &t.Chunks[x], b[mapHeader+i*mapRecord:]
		le.PutUint64(r[0:], uint64(addr(x)))
		le.PutUint64(r[8:], c.Offset)
		le.PutUint32(r[16:], c.Length)
		le.PutUint32(r[20:], c.Size)
		le.PutUint16(r[24:], uint16(c.Blob))
		r[26] = byte(c.Codec)
		r[27] = byte(c.Digest.Algorithm)
		if places[x].next {
			r[28] = flagNext
		}
		copy(r[32:], c.Digest.Sum[:])
	}
	return b
}

// Image is a linked image, opened. It is safe for concurrent use.
type Image struct {
	Info
	Dir     string
	meta    *os.File
	mapped  []byte
	records []byte
}

// Open opens a linked image.
func Open(dir string) (*Image, error) {
	js, err := os.ReadFile(filepath.Join(dir, "info"))
	if err != nil {
		return nil, err
	}
	im := &Image{Dir: dir}
	if err := json.Unmarshal(js, &im.Info); err != nil {
		return nil, fmt.Errorf("%s/info: %w: %v", dir, chunk.ErrCorrupt, err)
	}
	if im.Version != infoVersion {
		return nil, fmt.Errorf("%s/info: %w: version %d, this program knows %d", dir, index.ErrUnsupported, im.Version, infoVersion)
	}
	if im.meta, err = os.Open(filepath.Join(dir, "meta")); err != nil {
		return nil, err
	}
	if err := im.openMap(filepath.Join(dir, "map")); err != nil {
		im.meta.Close()
		return nil, err
	}
	return im, nil
}

func (im *Image) openMap(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if st.Size() < mapHeader {
		return index.Errorf(index.ErrCorrupt, path, 0, "%d bytes, want at least %d", st.Size(), mapHeader)
	}
	b, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map %s: %w", path, err)
	}
	le := binary.LittleEndian
	n := int64(le.Uint32(b[12:]))
	switch {
	case string(b[:8]) != mapMagic:
		err = index.Errorf(index.ErrCorrupt, path, 0, "magic is %q, want %q", b[:8], mapMagic)
	case le.Uint32(b[8:]) != mapVersion:
		err = index.Errorf(index.ErrUnsupported, path, 8, "version %d, this program knows %d", le.Uint32(b[8:]), mapVersion)
	case st.Size() != mapHeader+n*mapRecord:
		err = index.Errorf(index.ErrCorrupt, path, 12, "%d records make %d bytes, file has %d", n, mapHeader+n*mapRecord, st.Size())
	}
	if err != nil {
		unix.Munmap(b)
		return err
	}
	im.mapped, im.records = b, b[mapHeader:]
	return nil
}

// Close releases the image. No other method may be in use or used afterwards.
func (im *Image) Close() error {
	err := im.meta.Close()
	if e := unix.Munmap(im.mapped); err == nil {
		err = e
	}
	return err
}

// Meta is the EROFS metadata, Info.MetaSize bytes.
func (im *Image) Meta() io.ReaderAt { return im.meta }

// Chunks is the number of records in the map.
func (im *Image) Chunks() int { return len(im.records) / mapRecord }

// Chunk returns record i of the map.
func (im *Image) Chunk(i int) Chunk {
	le := binary.LittleEndian
	r := im.records[i*mapRecord : (i+1)*mapRecord]
	return Chunk{
		Flat:   int64(le.Uint64(r[0:])),
		Offset: int64(le.Uint64(r[8:])),
		Length: le.Uint32(r[16:]),
		Size:   le.Uint32(r[20:]),
		Blob:   int(le.Uint16(r[24:])),
		Codec:  chunk.Codec(r[26]),
		Digest: chunk.Digest{Algorithm: chunk.Algorithm(r[27]), Sum: [32]byte(r[32:])},
		Next:   r[28]&flagNext != 0,
	}
}

// Find returns the first record whose chunk ends behind the flat address;
// Chunks() if there is none.
func (im *Image) Find(flat int64) int {
	le := binary.LittleEndian
	n := im.Chunks()
	i := sort.Search(n, func(i int) bool {
		return int64(le.Uint64(im.records[i*mapRecord:])) > flat
	})
	if i > 0 {
		if c := im.Chunk(i - 1); c.Flat+int64(c.Size) > flat {
			return i - 1
		}
	}
	return i
}
