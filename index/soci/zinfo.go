package soci

import (
	"crypto/sha256"
	"encoding/binary"
	"math"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// The checkpoints of a gzip layer, little-endian:
//
//	count i32, span size i64, and for each checkpoint
//	in i64, out i64, bits u8, window [32768]
//
// A checkpoint is at a block of deflate: in is the offset in the layer of the first
// byte all of whose bits are to be read, and bits of the byte before are to be
// read, too; out is the offset in the archive. Ztocs of old leave out the first
// checkpoint, which is at the end of a header of 10 bytes.
const (
	zinfoHeader     = 4 + 8
	checkpointSize  = 8 + 8 + 1 + windowSize
	windowSize      = 32 << 10
	firstCheckpoint = 10
)

// expansion is how many bytes one of deflate makes at most.
const expansion = 1032

type checkpoint struct {
	in, out int64
	bits    uint8
	window  int // position in the checkpoints
}

// gzipSpans makes a span of what lies between two checkpoints, which are p, at an
// offset of the ztoc.
func (r *reader) gzipSpans(at int, p []byte, proofs []index.Proof, stream int64) error {
	n := len(proofs)
	if n == 0 || len(p) < zinfoHeader || int64(binary.LittleEndian.Uint32(p)) != int64(n) {
		return r.errorf(index.ErrCorrupt, "%d bytes of checkpoints for %d spans", len(p), n)
	}
	var all []checkpoint
	switch rest := len(p) - zinfoHeader; {
	case rest%checkpointSize == 0 && rest/checkpointSize == n:
	case rest%checkpointSize == 0 && rest/checkpointSize == n-1:
		all = append(all, checkpoint{in: firstCheckpoint})
	default:
		return r.errorf(index.ErrCorrupt, "%d bytes of checkpoints for %d spans", len(p), n)
	}
	for c := zinfoHeader; c < len(p); c += checkpointSize {
		le := binary.LittleEndian
		all = append(all, checkpoint{int64(le.Uint64(p[c:])), int64(le.Uint64(p[c+8:])), p[c+16], c + 17})
	}
	var blob index.Blob
	for i, c := range all {
		next := checkpoint{in: r.of.Size, out: math.MaxInt64}
		if i+1 < n {
			next = all[i+1]
		}
		if i == 0 && c.out != 0 || c.bits > 7 || c.bits > 0 && c.in == 0 || c.in < 0 || next.in < c.in || next.in > r.of.Size || next.out < c.out {
			return r.errorf(index.ErrCorrupt, "checkpoint %d: %d bits before offset %d of the layer, offset %d of the archive, the next one at %d and %d", i, c.bits, c.in, c.out, next.in, next.out)
		}
		s := index.Span{Offset: c.in, Size: min(next.out, stream) - c.out, Codec: chunk.Deflate, Proof: &proofs[i]}
		if c.bits > 0 {
			s.Offset, s.Bits = c.in-1, 8-c.bits
		}
		s.Length = next.in - s.Offset
		switch {
		case s.Size <= 0: // nothing comes of its blocks, or it is behind the end
			continue
		case s.Length > index.MaxStored:
			return r.errorf(index.ErrUnsupported, "span %d has %d stored bytes, want at most %d", i, s.Length, index.MaxStored)
		case s.Size/expansion > s.Length:
			return r.errorf(index.ErrCorrupt, "span %d of %d bytes, which %d stored bytes cannot hold", i, s.Size, s.Length)
		}
		if c.out > 0 {
			s.Window = index.Window{Offset: int64(at + c.window), Length: windowSize}
			proofs[i].Window = sha256.Sum256(p[c.window:][:windowSize])
		}
		blob.Append(s)
	}
	r.out.Spans = blob.Spans
	return nil
}

// The information about a layer that is not compressed is a flatbuffer itself.
const (
	_         = iota // version
	plainSpan        // bytes of a span
	plainSize        // of the layer
)

// plainSpans makes the spans of an archive that is stored as it is.
func (r *reader) plainSpans(p []byte, proofs []index.Proof) error {
	f := flat{b: p}
	root := f.root()
	each, size := f.i64(root, plainSpan), f.i64(root, plainSize)
	switch {
	case f.err != nil:
		return r.errorf(index.ErrCorrupt, "information about spans: %v", f.err)
	case size != r.of.Size || each <= 0 || size/each+min(1, size%each) != int64(len(proofs)):
		return r.errorf(index.ErrCorrupt, "%d spans of %d bytes in a layer of %d, want one of %d", len(proofs), each, size, r.of.Size)
	case min(each, size) > index.MaxStored:
		return r.errorf(index.ErrUnsupported, "spans of %d bytes, want at most %d", each, index.MaxStored)
	}
	var blob index.Blob
	for i := range proofs {
		off := int64(i) * each
		n := min(each, size-off)
		blob.Append(index.Span{Offset: off, Length: n, Size: n, Codec: chunk.None, Proof: &proofs[i]})
	}
	r.out.Spans = blob.Spans
	return nil
}
