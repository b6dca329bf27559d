package link

import (
	"bufio"
	"cmp"
	"encoding/binary"
	"io"
	"slices"

	"lukechampine.com/blake3"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// The map says, for each chunk of a linked image, where its bytes come from.
// It is mapped, not read, so that a node's memory does not grow with its
// images; little-endian:
//
//	header    64 B   magic "SHALEMAP", count u32, spans u32, proofs u32,
//	                 zeros [12], BLAKE3 of the file info [32]
//	records   64 B   x count, in order of flat address:
//	                 flat u64, stream offset u64, size u32, span u32, blob u16,
//	                 digest algorithm u8, flags u8, zeros [4], digest sum [32]
//	spans     64 B   x spans, in order of blobs and of their streams:
//	                 start u64, size u64, blob offset u64, stored length u64,
//	                 window offset u64, window length u32, blob u16,
//	                 window blob u16, codec u8, bits u8, zeros [2],
//	                 number of its proof, from 1 on, or 0 u32, zeros [8]
//	proofs    64 B   x proofs, in order of their spans, one for each that has
//	                 one: SHA-256 of the stored bytes [32], of the window [32]
//	checksum  32 B   BLAKE3 of all of the above
const (
	mapMagic  = "SHALEMAP"
	mapHeader = 64
	mapRecord = 64
	mapSpan   = 64
	mapProof  = 64
	mapSum    = 32
	infoSumAt = 32

	// flagNext: this chunk continues the file that the chunk before it in the
	// map belongs to. A fetch stops at the end of a file.
	flagNext = 1

	maxBlobs = 1 << 16 // a record has 16 bits for the blob
)

// Chunk is one record of the map.
type Chunk struct {
	Flat   int64 // flat address of the first byte
	Size   uint32
	Digest chunk.Digest
	Blob   int   // position in Info.Blobs
	Offset int64 // in the blob's stream
	Span   int   // the first that has it: Image.Span
	Next   bool  // continues the file of the record before
}

// End is the offset in the blob's stream behind the chunk.
func (c *Chunk) End() int64 { return c.Offset + int64(c.Size) }

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
	base := make([]int, len(t.Blobs)+1) // number of a blob's first span
	for i := range t.Blobs {
		base[i+1] = base[i] + len(t.Blobs[i].Spans)
	}
	spans := base[len(t.Blobs)]
	sum := blake3.New(mapSum, nil)
	w := bufio.NewWriterSize(io.MultiWriter(f, sum), 256<<10)
	le := binary.LittleEndian
	var head [mapHeader]byte
	copy(head[:], mapMagic)
	le.PutUint32(head[8:], uint32(len(order)))
	le.PutUint32(head[12:], uint32(spans))
	var proofs []*index.Proof
	for i := range t.Blobs {
		for k := range t.Blobs[i].Spans {
			if p := t.Blobs[i].Spans[k].Proof; p != nil {
				proofs = append(proofs, p)
			}
		}
	}
	le.PutUint32(head[16:], uint32(len(proofs)))
	copy(head[infoSumAt:], infoSum[:])
	w.Write(head[:]) // an error comes back from Flush
	for i, x := range order {
		var (
			c  = &t.Chunks[x]
			at = pl.places[x]
			r  [mapRecord]byte
		)
		le.PutUint64(r[0:], uint64(flat[at.segment]+at.off))
		le.PutUint64(r[8:], uint64(c.Offset))
		le.PutUint32(r[16:], c.Size)
		le.PutUint32(r[20:], uint32(base[c.Blob]+t.Blobs[c.Blob].Find(c.Offset)))
		le.PutUint16(r[24:], uint16(c.Blob))
		r[26] = byte(c.Digest.Algorithm)
		if next[i] {
			r[27] = flagNext
		}
		copy(r[32:], c.Digest.Sum[:])
		w.Write(r[:])
	}
	proof := uint32(0)
	for b := range t.Blobs {
		for _, s := range t.Blobs[b].Spans {
			var r [mapSpan]byte
			le.PutUint64(r[0:], uint64(s.Start))
			le.PutUint64(r[8:], uint64(s.Size))
			le.PutUint64(r[16:], uint64(s.Offset))
			le.PutUint64(r[24:], uint64(s.Length))
			le.PutUint64(r[32:], uint64(s.Window.Offset))
			le.PutUint32(r[40:], s.Window.Length)
			le.PutUint16(r[44:], uint16(b))
			le.PutUint16(r[46:], uint16(s.Window.Blob))
			r[48], r[49] = byte(s.Codec), s.Bits
			if s.Proof != nil {
				proof++
				le.PutUint32(r[52:], proof)
			}
			w.Write(r[:])
		}
	}
	for _, p := range proofs {
		w.Write(p.Stored[:])
		w.Write(p.Window[:])
	}
	if err := w.Flush(); err != nil {
		return err
	}
	_, err := f.Write(sum.Sum(nil))
	return err
}

// parseMap checks a map against its checksum and its info, which have to agree,
// and everything that later use relies on. It returns the records, the spans and
// the proofs.
func parseMap(b []byte, info *Info, infoSum [32]byte) (records, spans, proofs []byte, _ error) {
	bad := func(off int64, format string, args ...any) ([]byte, []byte, []byte, error) {
		return nil, nil, nil, index.Errorf(index.ErrCorrupt, "map", off, format, args...)
	}
	if len(b) < mapHeader+mapSum || string(b[:8]) != mapMagic {
		return bad(0, "not a map %q", mapMagic)
	}
	body := b[:len(b)-mapSum]
	if blake3.Sum256(body) != [32]byte(b[len(body):]) {
		return bad(int64(len(body)), "checksum does not match")
	}
	if [32]byte(b[infoSumAt:]) != infoSum {
		return bad(infoSumAt, "it belongs to another info file")
	}
	le := binary.LittleEndian
	n, m, k := int64(le.Uint32(b[8:])), int64(le.Uint32(b[12:])), int64(le.Uint32(b[16:]))
	if m > index.MaxImageSpans {
		return bad(12, "%d spans, more than %d", m, index.MaxImageSpans)
	}
	if want := mapHeader + n*mapRecord + m*mapSpan + k*mapProof + mapSum; want != int64(len(b)) {
		return bad(8, "%d records, %d spans and %d proofs make %d bytes, file has %d", n, m, k, want, len(b))
	}
	records, spans = body[mapHeader:mapHeader+n*mapRecord], body[mapHeader+n*mapRecord:]
	spans, proofs = spans[:m*mapSpan], spans[m*mapSpan:]
	t := index.Tree{Blobs: make([]index.Blob, len(info.Blobs))}
	first := make([]int, len(info.Blobs)) // number of a blob's first span
	all := make([]index.Span, m)
	var proof index.Proof // what it is does not matter here
	for i, at := range info.Blobs {
		t.Blobs[i] = index.Blob{Digest: at.Digest, Size: at.Size}
	}
	last, proved := 0, 0
	for i := range int(m) {
		r := spans[i*mapSpan:]
		if p := le.Uint32(r[52:]); p > 0 {
			if proved++; int64(p) != int64(proved) || int64(p) > k {
				return bad(mapHeader+n*mapRecord+int64(i)*mapSpan+52, "proof %d of %d, want %d", p, k, proved)
			}
			all[i].Proof = &proof
		}
		blob := decodeSpan(r, &all[i])
		if blob >= len(t.Blobs) || blob < last {
			return bad(mapHeader+n*mapRecord+int64(i)*mapSpan, "span in blob %d of %d, after one in %d", blob, len(t.Blobs), last)
		}
		if len(t.Blobs[blob].Spans) == 0 {
			first[blob] = i
		}
		last = blob
		t.Blobs[blob].Spans = all[first[blob] : i+1]
	}
	if err := t.CheckSpans(); err != nil {
		return nil, nil, nil, &index.Error{Name: "map", Offset: mapHeader + n*mapRecord, Err: err}
	}
	var (
		end      int64 // of the chunk before, rounded up to granules
		segments = info.Segments
	)
	for i := range n {
		off := mapHeader + i*mapRecord
		r := records[i*mapRecord : (i+1)*mapRecord]
		flat := le.Uint64(r)
		c := decodeChunk(r)
		if err := t.CheckChunk(&index.Chunk{Digest: c.Digest, Size: c.Size, Blob: uint32(c.Blob), Offset: c.Offset}); err != nil {
			return nil, nil, nil, &index.Error{Name: "map", Offset: off, Err: err}
		}
		if want := first[c.Blob] + t.Blobs[c.Blob].Find(c.Offset); c.Span != want {
			return bad(off+20, "chunk in span %d, want %d", c.Span, want)
		}
		if flat > uint64(info.FlatSize) || c.Flat < end || c.Flat%chunk.Block != 0 {
			return bad(off, "chunk at flat address %d, after %d of %d", flat, end, info.FlatSize)
		}
		end = c.Flat + (int64(c.Size)+chunk.Block-1)&^(chunk.Block-1)
		for len(segments) > 0 && c.Flat >= segments[0].Flat+segments[0].Size {
			segments = segments[1:]
		}
		if len(segments) == 0 || c.Flat < segments[0].Flat || end > segments[0].Flat+segments[0].Size {
			return bad(off, "chunk at flat addresses %d to %d is in no segment", c.Flat, end)
		}
	}
	return records, spans, proofs, nil
}

func decodeChunk(r []byte) Chunk {
	le := binary.LittleEndian
	return Chunk{
		Flat:   int64(le.Uint64(r[0:])),
		Offset: int64(le.Uint64(r[8:])),
		Size:   le.Uint32(r[16:]),
		Span:   int(le.Uint32(r[20:])),
		Blob:   int(le.Uint16(r[24:])),
		Digest: chunk.Digest{Algorithm: chunk.Algorithm(r[26]), Sum: [32]byte(r[32:])},
		Next:   r[27]&flagNext != 0,
	}
}

// decodeSpan sets all of a span but its proof, and returns the blob it is in.
func decodeSpan(r []byte, s *index.Span) (blob int) {
	le := binary.LittleEndian
	s.Start = int64(le.Uint64(r[0:]))
	s.Size = int64(le.Uint64(r[8:]))
	s.Offset = int64(le.Uint64(r[16:]))
	s.Length = int64(le.Uint64(r[24:]))
	s.Window = index.Window{Offset: int64(le.Uint64(r[32:])), Length: le.Uint32(r[40:]), Blob: uint32(le.Uint16(r[46:]))}
	s.Codec = chunk.Codec(r[48])
	s.Bits = r[49]
	return int(le.Uint16(r[44:]))
}
