package rafs

import (
	"encoding/binary"

	"github.com/klauspost/compress/zstd"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// A zran blob is the gzip layer of an image as it was. Its chunks lie in the
// stream it decodes to, an archive; its chunk info, a blob of its own, has an
// entry for each place where decoding can begin, and behind these what was decoded
// before each:
//
//	 0 u64 offset in the layer    24 u32 stored bytes    36 u8 the byte before
//	 8 u64 offset in the stream   28 u32 bytes           37 u8 bits of it that are still to be read
//	16 u64 offset of the window   32 u32 its size        38 zeros
//
// Stored bytes and bytes are those to the end of the last chunk that is decoded
// from there. Between two chunks they may leave out some, or be those of the next
// entry too. As the layer goes on in between, we have all from one entry to the
// next be a span.
const pointSize = 40

// maxWindow is the most that deflate refers back to.
const maxWindow = 32 << 10

// point is such an entry.
type point struct {
	in, out      uint64
	length, size uint32
	bits         uint8
	window       []byte
}

// windowEncoder makes windows what index.Window says; a window of nothing has
// some bytes too. Its results depend on its input alone.
var windowEncoder = func() *zstd.Encoder {
	e, err := zstd.NewWriter(nil, zstd.WithEncoderCRC(false), zstd.WithSingleSegment(true), zstd.WithZeroFrames(true), zstd.WithEncoderConcurrency(1))
	if err != nil {
		panic(err) // the options are constants
	}
	return e
}()

// decodeZran is decodeInfo of a zran blob with n points; it fills in the spans too.
func (b *BlobInfo) decodeZran(p []byte, n int, name string) error {
	chunks := int(b.ChunkCount) * infoV2Size
	points, err := b.decodePoints(p[chunks:], n, name)
	if err != nil {
		return err
	}
	b.makeSpans(points)
	b.Chunks = make([]ChunkRef, b.ChunkCount)
	var pos int64   // in the stream: where the chunk before ends
	var addr uint64 // and in the address space
	end := b.spans[len(b.spans)-1].End()
	for i := range b.Chunks {
		c, _, flags := decodeInfoV2(p[i*infoV2Size:])
		in, at := binary.LittleEndian.Uint32(p[i*infoV2Size+16:]), binary.LittleEndian.Uint32(p[i*infoV2Size+20:])
		corrupt := func(format string, args ...any) error {
			return index.Errorf(index.ErrCorrupt, name, int64(b.InfoOffset), "chunk %d: "+format, append([]any{i}, args...)...)
		}
		if flags&infoEncrypted != 0 {
			return index.Errorf(index.ErrUnsupported, name, int64(b.InfoOffset), "flags %#x of chunk %d (encryption)", flags, i)
		}
		if flags&^infoCRC != infoCompressed|infoZran || uint64(at) >= uint64(n) {
			return corrupt("flags %#x, from entry %d of %d", flags, at, n)
		}
		c.Index, c.Pos = uint32(i), int64(points[at].out-points[0].out)+int64(in)
		if c.Pos < pos || c.Pos > end-int64(c.Size) || c.Addr < addr || c.Addr+uint64(c.Size) > b.Span || c.Offset+uint64(c.Length) > uint64(b.Size) {
			return corrupt("%d bytes at %d of a stream of %d and address %d of %d, stored in %d at %d; the chunk before ends at %d and %d",
				c.Size, c.Pos, end, c.Addr, b.Span, c.Length, c.Offset, pos, addr)
		}
		pos, addr = c.Pos+int64(c.Size), c.Addr+roundUp(uint64(c.Size))
		b.Chunks[i] = c
	}
	return nil
}

// decodePoints decodes n entries and finds their windows, which follow them.
func (b *BlobInfo) decodePoints(p []byte, n int, name string) ([]point, error) {
	windows := p[n*pointSize:]
	points := make([]point, n)
	le := binary.LittleEndian
	for i := range points {
		e := p[i*pointSize:]
		c := point{in: le.Uint64(e), out: le.Uint64(e[8:]), length: le.Uint32(e[24:]), size: le.Uint32(e[28:]), bits: e[37]}
		at, size := le.Uint64(e[16:]), uint64(le.Uint32(e[32:]))
		var before point
		if i > 0 {
			before = points[i-1]
		}
		switch {
		case size > maxWindow || at > uint64(len(windows)) || size > uint64(len(windows))-at:
			return nil, index.Errorf(index.ErrCorrupt, name, int64(b.InfoOffset), "entry %d: a window of %d bytes at %d of %d", i, size, at, len(windows))
		case c.bits > 7 || c.bits > 0 && c.in == 0 || c.in > uint64(b.Size) || uint64(c.length) > uint64(b.Size)-c.in || c.out > maxAddress,
			i > 0 && (c.in < before.in || c.out < before.out || c.in == before.in && c.out > before.out), c.size == 0:
			return nil, index.Errorf(index.ErrCorrupt, name, int64(b.InfoOffset), "entry %d: %d bytes at %d, from %d at %d of %d and %d bits; the entry before is at %d, for %d",
				i, c.size, c.out, c.length, c.in, b.Size, c.bits, before.in, before.out)
		}
		c.window = windows[at:][:size]
		points[i] = c
	}
	return points, nil
}

// makeSpans makes the spans that begin at points, and compresses their windows.
// Of points where the same bytes come out the last counts.
func (b *BlobInfo) makeSpans(points []point) {
	for i, c := range points {
		if i+1 < len(points) && points[i+1].out == c.out {
			continue
		}
		s := index.Span{Start: int64(c.out - points[0].out), Size: int64(c.size), Offset: int64(c.in), Length: int64(c.length), Codec: chunk.Gzip}
		if c.bits > 0 {
			s.Offset, s.Length, s.Bits = s.Offset-1, s.Length+1, 8-c.bits
		}
		if i+1 < len(points) {
			s.Size, s.Length = int64(points[i+1].out-c.out), int64(points[i+1].in)-s.Offset
		}
		s.Window.Offset = int64(len(b.windows))
		b.windows = windowEncoder.EncodeAll(c.window, b.windows)
		s.Window.Length = uint32(int64(len(b.windows)) - s.Window.Offset)
		b.spans = append(b.spans, s)
	}
}
