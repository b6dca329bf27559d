package chunk

import (
	"fmt"
	"sync"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
)

// Codec is how one chunk is compressed where it is stored.
type Codec uint8

// The codecs. The values are Shale's own; index readers translate.
const (
	None Codec = iota
	Zstd
	LZ4     // LZ4 block format, no frame
	Gzip    // gzip or a part of it: decoded as a stream (index/stream), never one chunk alone
	Deflate // Gzip from the start of a block on, never from that of a member

	// ZstdBlocks are blocks of a zstd frame, or of several, where the first or the last is not
	// there as a whole: decoded with what the first needs of what is before (index/zframe).
	ZstdBlocks
)

// String returns the codec's name as the command line spells it.
func (c Codec) String() string {
	switch c {
	case None:
		return "none"
	case Zstd:
		return "zstd"
	case LZ4:
		return "lz4"
	case Gzip:
		return "gzip"
	case Deflate:
		return "deflate"
	case ZstdBlocks:
		return "zstd blocks"
	}
	return fmt.Sprintf("codec(%d)", uint8(c))
}

// ParseCodec reads the form that String writes.
func ParseCodec(s string) (Codec, error) {
	for _, c := range []Codec{None, Zstd, LZ4} {
		if s == c.String() {
			return c, nil
		}
	}
	return 0, fmt.Errorf("compressor %q: want zstd, lz4 or none", s)
}

// Encoders and decoders keep tables of hundreds of KiB, so they are shared.
// EncodeAll and DecodeAll of one zstd coder may run concurrently up to its
// concurrency; the pools hold coders of concurrency 1, so that what a caller
// compresses never depends on how many others do.
var (
	zstdEncoders = sync.Pool{New: func() any {
		e, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedDefault),
			zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(false),
			zstd.WithWindowSize(1<<20), zstd.WithSingleSegment(true))
		if err != nil {
			panic(err) // the options are constants
		}
		return e
	}}
	zstdDecoders = sync.Pool{New: func() any {
		d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1),
			zstd.WithDecoderMaxMemory(MaxSize), zstd.WithDecodeAllCapLimit(true))
		if err != nil {
			panic(err)
		}
		return d
	}}
	lz4Compressors = sync.Pool{New: func() any { return new(lz4.Compressor) }}
)

// Encode appends src, compressed, to dst. ok is false, and dst is returned
// unchanged, if the result would not be smaller than src: store it as None.
// The result depends on src alone.
func (c Codec) Encode(dst, src []byte) (out []byte, ok bool) {
	switch c {
	case Zstd:
		e := zstdEncoders.Get().(*zstd.Encoder)
		out = e.EncodeAll(src, dst)
		zstdEncoders.Put(e)
	case LZ4:
		n := len(dst)
		bound := lz4.CompressBlockBound(len(src))
		out = append(dst, make([]byte, bound)...)
		l := lz4Compressors.Get().(*lz4.Compressor)
		m, err := l.CompressBlock(src, out[n:])
		lz4Compressors.Put(l)
		if err != nil || m == 0 {
			return dst, false
		}
		out = out[:n+m]
	default:
		return dst, false
	}
	if len(out)-len(dst) >= len(src) {
		return dst, false
	}
	return out, true
}

// Decode decompresses src into dst, which must have the exact length of the
// result. Any other length, and any undecodable input, is an error that wraps
// ErrCorrupt. dst and src must not overlap.
func (c Codec) Decode(dst, src []byte) error {
	switch c {
	case None:
		if len(src) != len(dst) {
			return fmt.Errorf("%w: %d stored bytes, want %d", ErrCorrupt, len(src), len(dst))
		}
		copy(dst, src)
		return nil
	case Zstd:
		d := zstdDecoders.Get().(*zstd.Decoder)
		out, err := d.DecodeAll(src, dst[:0:len(dst)])
		zstdDecoders.Put(d)
		if err != nil {
			return fmt.Errorf("%w: zstd: %v", ErrCorrupt, err)
		}
		if len(out) != len(dst) {
			return fmt.Errorf("%w: zstd: %d bytes, want %d", ErrCorrupt, len(out), len(dst))
		}
		return nil
	case LZ4:
		n, err := lz4.UncompressBlock(src, dst)
		if err != nil {
			return fmt.Errorf("%w: lz4: %v", ErrCorrupt, err)
		}
		if n != len(dst) {
			return fmt.Errorf("%w: lz4: %d bytes, want %d", ErrCorrupt, n, len(dst))
		}
		return nil
	}
	return fmt.Errorf("%w: unknown codec %d", ErrCorrupt, uint8(c))
}
