// Package zran reads gzip streams (RFC 1952) and makes them random access: it
// inflates a stream from its start and tells, every so many bytes, a
// checkpoint from which a later reader can go on without what was before.
//
// A deflate stream (RFC 1951) is a row of blocks. Between two blocks an
// inflater has no state but the last 32 KiB of output, the window that matches
// copy from. A checkpoint is such a place, and with the window beside it, it
// is all that is needed to start there:
//
//	compressed    |head| block | block | block | block |tail|head| block |tail|
//	checkpoints   0                    1                    2 (member, no window)
//	decompressed  |-------- span ------|------ span --------|----------|
//
// To read from the middle of a span costs inflating the part of the span
// before it; so the span is a choice between that and 32 KiB (which compress
// well) for each checkpoint.
//
// The package knows nothing of what is in the stream or where the windows are
// kept.
package zran

import (
	"errors"
	"io"
	"sync"

	"github.com/shale-image/shale/index"
)

// WindowSize is the most bytes of output a deflate stream refers back to.
const WindowSize = 32 << 10

// Options are what a Reader does besides reading. The zero value: nothing.
type Options struct {
	// Span is how many decompressed bytes there are at least between two
	// checkpoints; none are made if it is not positive. Blocks of common
	// compressors are some 60 KiB, so that the actual distance is that much
	// more, but a block can be of any size.
	Span int64

	// Checkpoint is called with every checkpoint, in order: the start of the
	// stream, then the first start of a block or member that is Span bytes
	// behind the checkpoint before. The window is what has to be given to
	// Resume with the checkpoint: the last up to WindowSize decompressed bytes
	// of the member. If Span is WindowSize or more, those that no match copies
	// are 0, nine tenths in Debian's layers: that is known late, and so a
	// checkpoint is told of when the next one comes, or the end. The window is
	// valid during the call only. An error ends reading.
	Checkpoint func(cp Checkpoint, window []byte) error
}

// Reader inflates a gzip stream, all members of it. It reads its source ahead
// by up to 64 KiB and takes some 250 KiB of memory whatever the input. Zero
// bytes after the last member are ignored, like gzip(1) does; other bytes are
// an error.
//
// Malformed input is an error that wraps index.ErrCorrupt and has the offset
// in the compressed stream; for a stream that is cut off it wraps
// io.ErrUnexpectedEOF as well. An error of the source is returned as it is,
// behind all that could be decompressed before it; an error or end of the
// source matters only when bytes behind it are needed. Errors stay.
//
// A Reader is for one goroutine at a time.
type Reader struct {
	src  source
	out  output
	opts Options
	mark

	state  state
	final  bool // the block is the last of its member
	stored int  // bytes left of a stored block
	code   *codes
	own    codes // of a dynamic block
	tmp    code

	crc     uint32 // of the member's header so far
	partial bool   // the member was entered by a checkpoint: it cannot be verified
	start   int64  // Out of the member's first byte
	err     error
}

var pool = sync.Pool{New: func() any { return new(Reader) }}

// NewReader returns a Reader of a whole gzip stream.
func NewReader(r io.Reader, opts Options) *Reader {
	z := pool.Get().(*Reader)
	z.Reset(r, opts)
	return z
}

// Resume returns a Reader that goes on at a checkpoint. r has the compressed
// stream from cp.In on; the window is the one that came with cp (it is copied)
// and ignored at the start of a member.
//
// Up to the next checkpoint's Out it needs no bytes of r but those before the
// next checkpoint's In, and the one at In if that has Bits. The checksum of
// the member that cp is in the middle of is not verified, as it covers bytes
// that are not seen; members after it are.
func Resume(r io.Reader, cp Checkpoint, window []byte) (*Reader, error) {
	z := pool.Get().(*Reader)
	if err := z.Resume(r, cp, window); err != nil {
		z.Close()
		return nil, err
	}
	return z, nil
}

// Reset makes z what NewReader returns, with its memory used again.
func (z *Reader) Reset(r io.Reader, opts Options) {
	z.src.reset(r, 0)
	z.out.reset(0, nil)
	z.opts = opts
	z.mark.reset()
	z.state, z.err = atFirstMember, nil
	z.partial, z.start = false, 0
}

// Resume makes z what the function Resume returns, with its memory used again.
func (z *Reader) Resume(r io.Reader, cp Checkpoint, window []byte) error {
	if cp.In < 0 || cp.Out < 0 || cp.Bits > 7 || cp.Member && cp.Bits != 0 || len(window) > WindowSize {
		return index.Errorf(index.ErrCorrupt, name, cp.In, "no checkpoint: %d bits used, %d decompressed bytes before, a window of %d",
			cp.Bits, cp.Out, len(window))
	}
	z.Reset(r, Options{})
	z.src.reset(r, cp.In)
	if cp.Member {
		window = nil
	} else {
		z.state = atBlock
		z.partial = true
		z.src.skip = cp.Bits
	}
	z.out.reset(cp.Out, window)
	return nil
}

// Close gives the memory of z to readers to come; z must not be used again.
// It does not close the source. It returns nil.
func (z *Reader) Close() error {
	if z.err == errClosed {
		return nil
	}
	z.Reset(nil, Options{})
	z.err = errClosed
	pool.Put(z)
	return nil
}

var errClosed = errors.New("zran: read after Close")

// InputOffset returns the offset in the compressed stream of the byte with the
// first bit that is not decoded yet. It may be well behind what belongs to the
// bytes read.
func (z *Reader) InputOffset() int64 { return z.src.offset() }

// Offset returns the offset in the decompressed stream of the next byte that
// is read.
func (z *Reader) Offset() int64 { return z.out.base + int64(z.out.read) }

// ahead is the least that is inflated at a time even if less is asked for.
const ahead = 16 << 10

// Next returns the next bytes of the stream, at least one and at most n, and
// advances past them. They are in the Reader's own memory and valid until the
// next call of a method. At the end the error is io.EOF. For n of 0 or less it
// returns nothing.
func (z *Reader) Next(n int) ([]byte, error) {
	if n <= 0 {
		return nil, nil
	}
	n = min(n, outSize)
	o := &z.out
	if o.read == o.n {
		if z.err == nil {
			z.inflate(max(n, ahead))
		}
		if o.read == o.n {
			return nil, z.err
		}
	}
	b := o.buf[o.read:min(o.n, o.read+n)]
	o.read += len(b)
	return b, nil
}

// Read implements io.Reader.
func (z *Reader) Read(p []byte) (int, error) {
	b, err := z.Next(len(p))
	return copy(p, b), err
}

// Discard skips n bytes, or fewer only with an error, which is io.EOF at the
// end. It returns how many it skipped.
func (z *Reader) Discard(n int64) (int64, error) {
	left := n
	for left > 0 {
		b, err := z.Next(int(min(left, outSize)))
		if err != nil {
			return n - left, err
		}
		left -= int64(len(b))
	}
	return n, nil
}

// WriteTo implements io.WriterTo.
func (z *Reader) WriteTo(w io.Writer) (int64, error) {
	var total int64
	for {
		b, err := z.Next(outSize)
		if err == io.EOF {
			return total, nil
		}
		if err != nil {
			return total, err
		}
		n, err := w.Write(b)
		total += int64(n)
		if err != nil {
			return total, err
		}
		if n != len(b) {
			return total, io.ErrShortWrite
		}
	}
}
