package index

import (
	"fmt"
	"math"
	"sort"

	"github.com/shale-image/shale/chunk"
)

// Blob is an object of the image's repository. What it stores decodes to a
// stream, from which chunks are cut: the content of a RAFS blob, the tar archive
// of a layer. A blob that only keeps windows has no stream.
type Blob struct {
	Digest string // as in the manifest: "sha256:<64 hex digits>"
	Size   int64  // bytes of the whole object; 0 if the index does not tell
	Spans  []Span // in order; their Starts leave no gap in the stream
	Data   []byte // all of the object, if no repository has it: windows that a reader made

	// First is how many bytes of the stream, from its start, have what containers are
	// known to read first; 0 if nobody has said so.
	First int64
}

// Span is a run of a blob's stored bytes that can be decoded without those
// before it: a chunk or batch of a RAFS blob, a frame of a zstd layer or some of its
// blocks, what lies between two checkpoints of a gzip layer, all of an archive that is not
// compressed. Chunks may lie in several.
type Span struct {
	Start  int64 // offset in the stream of what it decodes to
	Size   int64 // bytes it decodes to
	Offset int64 // of the first stored byte
	Length int64 // stored bytes
	Codec  chunk.Codec
	Bits   uint8  // chunk.Gzip, chunk.Deflate: how many bits of the first byte belong to the span before
	Window Window // likewise, and chunk.ZstdBlocks: what decoding needs besides
	Proof  *Proof // of what is stored; nil if only chunks can be verified
}

// Proof are the SHA-256 digests of what a span is decoded from: of all its stored
// bytes, and of its window if it has one. They are compared before anything is
// decoded. Of a chunk.Zstd span, which is Whole then, Stored is the digest of what it
// decodes to instead, compared before any of that is used. Chunks rely on it that have
// no digest of content (chunk.Origin).
type Proof struct {
	Stored, Window [32]byte
}

// Window is the content before a span that decoding it may refer to, at most
// 32 KiB; in a blob, for chunk.Gzip zstd-compressed, for chunk.Deflate as it is. For
// chunk.ZstdBlocks it is the state that decoding begins with (index/zframe),
// zstd-compressed, and those of a blob lie one behind the other. The zero Window says that
// none is needed.
type Window struct {
	Blob   uint32 // position in Tree.Blobs
	Length uint32 // stored bytes
	Offset int64  // of the first of them in the blob
}

// End is the offset in the stream behind the span.
func (s *Span) End() int64 { return s.Start + s.Size }

// maxWhole is up to which size a zstd frame is decoded as one piece. Of a larger one,
// such as a layer that is one frame, the first chunks are of use long before the
// last have come.
const maxWhole = 1 << 20

// Whole tells whether the span is decoded as one piece in memory.
func (s *Span) Whole() bool {
	switch s.Codec {
	case chunk.Zstd:
		return s.Size <= maxWhole || s.Proof != nil && s.Size <= chunk.MaxSize
	case chunk.ZstdBlocks:
		return s.Size <= maxWhole
	}
	return s.Codec == chunk.LZ4 && s.Size <= chunk.MaxSize
}

// Inflated tells whether the span is a part of a gzip stream.
func (s *Span) Inflated() bool { return s.Codec == chunk.Gzip || s.Codec == chunk.Deflate }

// Windowed tells whether decoding the span may need a Window.
func (s *Span) Windowed() bool { return s.Inflated() || s.Codec == chunk.ZstdBlocks }

// Divisible tells whether any part of the span can be had without the rest.
func (s *Span) Divisible() bool { return s.Codec == chunk.None && s.Proof == nil }

// StreamSize is the size of the stream in bytes.
func (b *Blob) StreamSize() int64 {
	if len(b.Spans) == 0 {
		return 0
	}
	return b.Spans[len(b.Spans)-1].End()
}

// Append adds a span at the end of the stream, and returns its Start.
func (b *Blob) Append(s Span) int64 {
	s.Start = b.StreamSize()
	b.Spans = append(b.Spans, s)
	return s.Start
}

// Find returns the position of the span that has offset off of the stream,
// len(b.Spans) if none has.
func (b *Blob) Find(off int64) int {
	return sort.Search(len(b.Spans), func(i int) bool { return b.Spans[i].End() > off })
}

// Cover returns the spans that have the stream's bytes [from, to).
func (b *Blob) Cover(from, to int64) []Span {
	lo := b.Find(from)
	hi := lo
	for hi < len(b.Spans) && b.Spans[hi].Start < to {
		hi++
	}
	return b.Spans[lo:hi]
}

// Stored returns the stored bytes that the stream's bytes [from, to), which
// spans have, are decoded from.
func Stored(spans []Span, from, to int64) (off, length int64) {
	first, last := &spans[0], &spans[len(spans)-1]
	off = first.Offset
	end := last.Offset + last.Length
	if first.Divisible() {
		off += from - first.Start
	}
	if last.Divisible() {
		end = last.Offset + to - last.Start
	}
	return off, end - off
}

// Beside returns what decoding spans of one blob, which are one behind the other, needs
// besides: a run of the bytes of another blob, with the windows, of length 0 if there are
// none. A gzip stream needs that of the first span alone.
func Beside(spans []Span) (blob uint32, off, length int64) {
	for i := range spans {
		w := &spans[i].Window
		switch {
		case w.Length == 0 || i > 0 && spans[i].Inflated():
		case length == 0:
			blob, off, length = w.Blob, w.Offset, int64(w.Length)
		default:
			length = w.Offset + int64(w.Length) - off
		}
	}
	return blob, off, length
}

// MaxStored bounds the stored bytes of a span that is decoded or proved in
// memory: the worst that zstd and LZ4 make of 16 MiB is 64 KiB more.
const MaxStored = chunk.MaxSize + chunk.MaxSize/64

// MaxSpans bounds the spans that a chunk lies in, and MaxImageSpans those of all blobs of an
// image: who reads a chunk has its spans in memory, and who opens an image all of them. Spans
// that we make have 32 KiB of content at least, but for the last. Smaller ones have tables of
// contents and bootstraps, where a chunk of many is a file that was cut at odd places.
const (
	MaxSpans      = 1 << 12
	MaxImageSpans = 1 << 24
)

// maxWindow bounds the stored bytes of a window of gzip. A state of blocks of zstd has no
// content twice, so that it is smaller than what they decode to, but for slack.
const (
	maxWindow = 33 << 10
	slack     = 1 << 10
)

// MoreStored is how much longer than twice what they decode to, in bytes, a span of blocks
// of zstd may be: empty blocks take time.
const MoreStored = 64 << 10

// StoredShare is how many stored bytes a chunk costs: its share of the spans it
// lies in.
func (t *Tree) StoredShare(c *Chunk) (n int64) {
	for _, s := range t.Blobs[c.Blob].Cover(c.Offset, c.End()) {
		part := min(s.End(), c.End()) - max(s.Start, c.Offset)
		n += int64(float64(s.Length) * (float64(part) / float64(s.Size)))
	}
	return n
}

// CheckSpans refuses spans that nobody could fetch or decode. The error wraps
// ErrCorrupt.
func (t *Tree) CheckSpans() error {
	for n := range t.Blobs {
		b := &t.Blobs[n]
		var start, stored int64
		var last *Span // that may need a window
		for i := range b.Spans {
			s := &b.Spans[i]
			err := s.check(start, stored, b.Size, t.Blobs)
			if err == nil && s.Windowed() {
				err = s.checkBeside(last)
				if last == nil || s.Window.Length > 0 {
					last = s
				}
			}
			if err != nil {
				return fmt.Errorf("%w: span %d of blob %s: %v", ErrCorrupt, i, b.Digest, err)
			}
			start, stored = s.End(), s.Offset+s.Length
		}
	}
	return nil
}

// CheckChunk refuses a chunk that is in no span, or in too many. The error wraps ErrCorrupt.
func (t *Tree) CheckChunk(c *Chunk) error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%w: chunk %s: "+format, append([]any{ErrCorrupt, c.Digest}, args...)...)
	}
	switch {
	case !c.Digest.Algorithm.Known():
		return bad("unknown digest")
	case c.Size == 0 || c.Size > chunk.MaxSize:
		return bad("%d bytes, want 1 to %d", c.Size, chunk.MaxSize)
	case int64(c.Blob) >= int64(len(t.Blobs)):
		return bad("it lies in blob %d of %d", c.Blob, len(t.Blobs))
	}
	b := &t.Blobs[c.Blob]
	if end := b.StreamSize(); c.Offset < 0 || c.Offset > end-int64(c.Size) {
		return bad("%d bytes at %d of a stream of %d in blob %s", c.Size, c.Offset, end, b.Digest)
	}
	if i := b.Find(c.Offset) + MaxSpans; i < len(b.Spans) && b.Spans[i].Start < c.End() {
		return bad("%d bytes at %d of the stream of blob %s lie in more than %d spans", c.Size, c.Offset, b.Digest, MaxSpans)
	}
	if c.Digest.Algorithm == chunk.Origin {
		for _, s := range b.Cover(c.Offset, c.End()) {
			if s.Proof == nil {
				return bad("nothing to verify it by at %d in blob %s", s.Offset, b.Digest)
			}
		}
	}
	return nil
}

// checkBeside refuses what Beside cannot tell of: spans of gzip and blocks of zstd in one
// blob, and states that do not lie one behind the other. last is the last span before
// that has a window, or else the first that may have one.
func (s *Span) checkBeside(last *Span) error {
	switch {
	case last == nil:
		return nil
	case s.Inflated() != last.Inflated():
		return fmt.Errorf("%v, where others need windows of another kind", s.Codec)
	case s.Inflated() || s.Window.Length == 0 || last.Window.Length == 0:
		return nil
	}
	if end := last.Window.Offset + int64(last.Window.Length); s.Window.Offset != end || s.Window.Blob != last.Window.Blob {
		return fmt.Errorf("a window at %d of blob %d, want it at %d of blob %d", s.Window.Offset, s.Window.Blob, end, last.Window.Blob)
	}
	return nil
}

// check is CheckSpans for one span, where those before it end at start and
// stored. A byte that two gzip spans share belongs to both.
func (s *Span) check(start, stored, size int64, blobs []Blob) error {
	if s.Bits > 0 {
		stored--
	}
	switch {
	case s.Start != start || s.Size <= 0 || s.Start > math.MaxInt64-s.Size:
		return fmt.Errorf("%d bytes at %d of the stream, want them at %d", s.Size, s.Start, start)
	case s.Offset < max(0, stored) || s.Length <= 0 || s.Offset > math.MaxInt64-s.Length || size > 0 && s.Offset+s.Length > size:
		return fmt.Errorf("%d stored bytes at %d of %d, those before end at %d", s.Length, s.Offset, size, stored)
	case s.Codec == chunk.None && s.Length != s.Size, (s.Whole() || s.Proof != nil) && s.Length > MaxStored, (s.Codec == chunk.LZ4 || s.Codec == chunk.ZstdBlocks) && !s.Whole():
		return fmt.Errorf("%d bytes stored as %d, %v", s.Size, s.Length, s.Codec)
	case s.Codec > chunk.ZstdBlocks:
		return fmt.Errorf("%v", s.Codec)
	case s.Proof != nil && s.Codec != chunk.None && s.Codec != chunk.Deflate && (s.Codec != chunk.Zstd || !s.Whole()):
		return fmt.Errorf("digests of what is stored as %v", s.Codec)
	case !s.Windowed() && s.Window != Window{}, !s.Inflated() && s.Bits > 0, s.Bits > 7:
		return fmt.Errorf("%v with %d bits and a window of %d bytes", s.Codec, s.Bits, s.Window.Length)
	case s.Codec == chunk.ZstdBlocks && s.Length > 2*s.Size+MoreStored:
		return fmt.Errorf("%d bytes stored as %d, %v", s.Size, s.Length, s.Codec)
	case s.Inflated() && s.Window.Length > maxWindow || !s.Inflated() && int64(s.Window.Length) > s.Size+slack,
		s.Window.Offset < 0 || s.Window.Offset > math.MaxInt64-int64(s.Window.Length) || int64(s.Window.Blob) >= int64(len(blobs)):
		return fmt.Errorf("a window of %d bytes at %d of blob %d of %d", s.Window.Length, s.Window.Offset, s.Window.Blob, len(blobs))
	}
	return nil
}
