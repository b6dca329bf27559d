package link

import (
	"bufio"
	"cmp"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"slices"

	"lukechampine.com/blake3"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// The map says, for each chunk of a linked image, where its bytes come from.
// It is mapped, not read, so that a node's memory does not grow with its
// images; little-endian:
//
//	header    64 B   magic "SHALEMAP", count u32, zeros [20],
//	                 BLAKE3 of the file info [32]
//	records   64 B   x count, in order of flat address:
//	                 flat u64, blob offset u64, stored length u32, size u32,
//	                 blob u16, codec u8, digest algorithm u8, flags u8, zeros,
//	                 digest sum [32]
//	checksum  32 B   BLAKE3 of all of the above
const (
	mapMagic  = "SHALEMAP"
	mapHeader = 64
	mapRecord = 64
	mapSum    = 32
	infoSumAt = 32

	// flagNext: this chunk continues the file that the chunk before it in the
	// map belongs to. A fetch stops at the end of a file.
	flagNext = 1

	maxBlobs = 1 << 16 // a record has 16 bits for the blob

	// maxLength bounds the stored bytes of a chunk. The worst that zstd and LZ4
	// make of 16 MiB is 64 KiB more.
	maxLength = chunk.MaxSize + chunk.MaxSize/64
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

// checkStored refuses chunks that nobody could fetch or decode.
func checkStored(d chunk.Digest, codec chunk.Codec, size, length uint32, offset uint64) error {
	switch {
	case d.Algorithm != chunk.BLAKE3 && d.Algorithm != chunk.SHA256:
		return fmt.Errorf("%w: digest %s", index.ErrCorrupt, d)
	case codec > chunk.LZ4:
		return fmt.Errorf("%w: %s", index.ErrCorrupt, codec)
	case size == 0 || size > chunk.MaxSize:
		return fmt.Errorf("%w: size %d, want 1 to %d", index.ErrCorrupt, size, chunk.MaxSize)
	case length == 0 || length > maxLength:
		return fmt.Errorf("%w: %d stored bytes, want 1 to %d", index.ErrCorrupt, length, maxLength)
	case offset > math.MaxInt64-maxLength:
		return fmt.Errorf("%w: blob offset %d", index.ErrCorrupt, offset)
	}
	return nil
}

// order returns the used chunks by flat address, of equal chunks one, and the
// records that continue the file of the record before them.
func (pl *placement) order(flat map[uint32]int64) (order []uint32, next []bool) {
	type item struct {
		at int64
		x  uint32
	}
	var items []item
	for i, at := range pl.places {
		if at.used {
			items = append(items, item{flat[at.segment] + at.off, uint32(i)})
		}
	}
	slices.SortFunc(items, func(a, b item) int { return cmp.Or(cmp.Compare(a.at, b.at), cmp.Compare(a.x, b.x)) })
	rank := make([]int32, len(pl.places)) // chunk -> record
	for i, it := range items {
		// Equal chunks have one address: the first copy is as good as the others.
		if i == 0 || it.at != items[i-1].at {
			order = append(order, it.x)
		}
		rank[it.x] = int32(len(order) - 1)
	}
	next = make([]bool, len(order))
	for _, f := range pl.files {
		for i := 1; i < len(f.Extents); i++ {
			if r := rank[f.Extents[i].Chunk]; rank[f.Extents[i-1].Chunk] == r-1 {
				next[r] = true
			}
		}
	}
	return order, next
}

func (pl *placement) writeMap(f io.Writer, t *index.Tree, flat map[uint32]int64, infoSum [32]byte) error {
	order, next := pl.order(flat)
	sum := blake3.New(mapSum, nil)
	w := bufio.NewWriterSize(io.MultiWriter(f, sum), 256<<10)
	le := binary.LittleEndian
	var head [mapHeader]byte
	copy(head[:], mapMagic)
	le.PutUint32(head[8:], uint32(len(order)))
	copy(head[infoSumAt:], infoSum[:])
	w.Write(head[:]) // an error comes back from Flush
	for i, x := range order {
		var (
			c  = &t.Chunks[x]
			at = pl.places[x]
			r  [mapRecord]byte
		)
		le.PutUint64(r[0:], uint64(flat[at.segment]+at.off))
		le.PutUint64(r[8:], c.Offset)
		le.PutUint32(r[16:], c.Length)
		le.PutUint32(r[20:], c.Size)
		le.PutUint16(r[24:], uint16(c.Blob))
		r[26] = byte(c.Codec)
		r[27] = byte(c.Digest.Algorithm)
		if next[i] {
			r[28] = flagNext
		}
		copy(r[32:], c.Digest.Sum[:])
		w.Write(r[:])
	}
	if err := w.Flush(); err != nil {
		return err
	}
	_, err := f.Write(sum.Sum(nil))
	return err
}

// parseMap checks a map against its checksum and its info, which have to agree,
// and everything that later use relies on. It returns the records.
func parseMap(b []byte, info *Info, infoSum [32]byte) ([]byte, error) {
	bad := func(off int64, format string, args ...any) error {
		return index.Errorf(index.ErrCorrupt, "map", off, format, args...)
	}
	if len(b) < mapHeader+mapSum || string(b[:8]) != mapMagic {
		return nil, bad(0, "not a map %q", mapMagic)
	}
	body := b[:len(b)-mapSum]
	if blake3.Sum256(body) != [32]byte(b[len(body):]) {
		return nil, bad(int64(len(body)), "checksum does not match")
	}
	if [32]byte(b[infoSumAt:]) != infoSum {
		return nil, bad(infoSumAt, "it belongs to another info file")
	}
	n := int64(binary.LittleEndian.Uint32(b[8:]))
	if want := mapHeader + n*mapRecord + mapSum; want != int64(len(b)) {
		return nil, bad(8, "%d records make %d bytes, file has %d", n, want, len(b))
	}
	var (
		records  = body[mapHeader:]
		end      int64 // of the chunk before, rounded up to granules
		segments = info.Segments
	)
	for i := range n {
		off := mapHeader + i*mapRecord
		r := records[i*mapRecord : (i+1)*mapRecord]
		flat := binary.LittleEndian.Uint64(r)
		c := decodeChunk(r)
		if err := checkStored(c.Digest, c.Codec, c.Size, c.Length, uint64(c.Offset)); err != nil {
			return nil, &index.Error{Name: "map", Offset: off, Err: err}
		}
		if c.Blob >= len(info.Blobs) {
			return nil, bad(off+24, "chunk in blob %d of %d", c.Blob, len(info.Blobs))
		}
		if flat > uint64(info.FlatSize) || c.Flat < end || c.Flat%chunk.Block != 0 {
			return nil, bad(off, "chunk at flat address %d, after %d of %d", flat, end, info.FlatSize)
		}
		end = c.Flat + (int64(c.Size)+chunk.Block-1)&^(chunk.Block-1)
		for len(segments) > 0 && c.Flat >= segments[0].Flat+segments[0].Size {
			segments = segments[1:]
		}
		if len(segments) == 0 || c.Flat < segments[0].Flat || end > segments[0].Flat+segments[0].Size {
			return nil, bad(off, "chunk at flat addresses %d to %d is in no segment", c.Flat, end)
		}
	}
	return records, nil
}

func decodeChunk(r []byte) Chunk {
	le := binary.LittleEndian
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
