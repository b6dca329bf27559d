// Package stream decodes the stream of a blob (index.Blob) from its stored
// bytes: span after span, in bounded memory.
package stream

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/zstd"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/zframe"
	"github.com/shale-image/shale/index/zran"
)

// A Reader decodes part of a stream. It is not safe for concurrent use.
type Reader struct {
	body  io.Reader
	spans []index.Span // not entered yet
	pos   int64        // in the stream
	at    int64        // in the blob, of the next byte of body

	// What is entered: one span, or those of gzip that need what is before them.
	end    int64     // where it ends in the stream; nothing is entered if pos is there
	whole  []byte    // all of it, if it was decoded as one piece
	in     io.Reader // otherwise: what is left of it
	stored *section  // that it is decoded from
	free   func()    // if there is a decoder to give back

	beside   []byte // windows
	besideAt int64  // where they lie in their blob

	unproved int64 // where in the stream the last span ends that was entered and has no Proof
	from     int64 // where what Next has returned begins

	err error // of what is neither decoded nor passed over; sticks
	mem *memory
	opt Options
}

// Options are what may be said of a Reader besides.
type Options struct {
	// Window is the largest window of a zstd frame: index.Limits.Window.
	Window int64

	// Room, if it is not nil, is asked before a zstd frame is decoded that takes more
	// memory than a Memory counts, with what it takes in all.
	Room func(memory int64) error

	// More, if it is not nil, is asked for each window in the place of what is beside: for
	// bytes of a blob (index.Window), one behind the other. Its errors are passed on.
	More func(blob uint32, off, length int64) ([]byte, error)
}

// memory is what Readers use again and again.
type memory struct{ stored, data, join, state []byte }

var memories = sync.Pool{New: func() any { return new(memory) }}

// NewReader decodes the stream's bytes [from, to), which spans cover
// (index.Blob.Cover), from body: the stored bytes that index.Stored tells. beside are those
// that index.Beside does. Close the Reader; body is the caller's.
func NewReader(body io.Reader, spans []index.Span, from, to int64, beside []byte) (*Reader, error) {
	return Options{}.NewReader(body, spans, from, to, beside)
}

// NewReader is the function of that name, with options.
func (o Options) NewReader(body io.Reader, spans []index.Span, from, to int64, beside []byte) (*Reader, error) {
	if len(spans) == 0 || from < spans[0].Start || from >= spans[0].End() || from >= to || to > spans[len(spans)-1].End() {
		return nil, fmt.Errorf("%w: the stream's bytes %d to %d are in no span", chunk.ErrCorrupt, from, to)
	}
	r := &Reader{body: body, spans: spans, pos: spans[0].Start, beside: beside, mem: memories.Get().(*memory), opt: o}
	r.at, _ = index.Stored(spans, from, to)
	_, r.besideAt, _ = index.Beside(spans)
	r.end = r.pos
	if spans[0].Divisible() || spans[0].Whole() {
		r.pos, r.end = from, from
	}
	if err := r.Skip(from - r.pos); err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

// Close releases what the Reader holds. What Next returned is no longer valid.
func (r *Reader) Close() {
	r.release()
	if r.mem != nil {
		memories.Put(r.mem)
		r.mem = nil
	}
}

const base = 512 << 10 // bytes of memory of what decodes a stream

// Memory is how many bytes a Reader of spans may hold, windows of zstd frames of more
// than that aside: Options.Room is asked for those; and what is beside.
func Memory(spans []index.Span) (n int64) {
	for i := range spans {
		m := int64(base)
		switch s := &spans[i]; {
		case s.Codec == chunk.ZstdBlocks:
			m = s.Length + 2*s.Size + zframe.Memory(s.Size) + int64(s.Window.Length)
		case s.Whole():
			m = s.Length + s.Size
		case s.Proof != nil:
			m += s.Length
		}
		n = max(n, m)
	}
	return n
}

// Pos is the offset in the stream of what Next returns.
func (r *Reader) Pos() int64 { return r.pos }

// Err is why the Reader cannot go on; nil if it can, perhaps behind a span that was
// decoded in vain.
func (r *Reader) Err() error { return r.err }

// Next returns the next n bytes of the stream, valid until the next call. If
// the stored bytes cannot be decoded the error wraps chunk.ErrCorrupt, if they
// end early io.ErrUnexpectedEOF; errors of the body are passed on. A span that
// was decoded as one piece in vain is passed over: if Pos is behind it, reading
// may go on there.
func (r *Reader) Next(n int) ([]byte, error) {
	r.from = r.pos
	if err := r.enter(); err != nil {
		return nil, err
	}
	if r.whole != nil && r.pos+int64(n) <= r.end {
		at := len(r.whole) - int(r.end-r.pos)
		r.pos += int64(n)
		return r.whole[at : at+n : at+n], nil
	}
	p := grow(&r.mem.join, n)
	for got := 0; got < n; {
		m, err := r.read(p[got:])
		if got += m; err != nil {
			return nil, err
		}
	}
	return p, nil
}

// Skip passes over n bytes of the stream. Spans that need not be decoded for
// it are not.
func (r *Reader) Skip(n int64) error {
	for to := r.pos + n; r.pos < to; {
		if r.pos == r.end && len(r.spans) > 0 && r.spans[0].End() <= to && !r.spans[0].Inflated() {
			if err := r.left(); err != nil {
				return err
			}
			r.pos, r.end = r.spans[0].End(), r.spans[0].End()
			r.spans = r.spans[1:]
			continue
		}
		if err := r.enter(); err != nil {
			return err
		}
		m := min(to, r.end) - r.pos
		if r.whole == nil {
			if k, err := io.CopyN(io.Discard, r.in, m); err != nil {
				r.pos += k
				r.err = unexpected(err)
				return r.err
			}
		}
		r.pos += m
	}
	return nil
}

func (r *Reader) read(p []byte) (n int, err error) {
	if err := r.enter(); err != nil {
		return 0, err
	}
	p = p[:min(int64(len(p)), r.end-r.pos)]
	if r.whole != nil {
		n = copy(p, r.whole[len(r.whole)-int(r.end-r.pos):])
	} else {
		n, r.err = io.ReadFull(r.in, p)
		r.err = unexpected(r.err)
	}
	r.pos += int64(n)
	return n, r.err
}

// left ends what was entered: body goes on behind it.
func (r *Reader) left() error {
	if r.err == nil && r.stored != nil {
		_, r.err = io.CopyN(io.Discard, r.stored, r.stored.N)
		r.err = unexpected(r.err)
	}
	r.release()
	return r.err
}

// release gives up what was entered.
func (r *Reader) release() {
	if r.free != nil {
		r.free()
	}
	r.free, r.stored, r.in, r.whole = nil, nil, nil, nil
}

// enter begins the next span unless the reader is in one.
func (r *Reader) enter() error {
	if r.err != nil || r.pos < r.end {
		return r.err
	}
	if err := r.left(); err != nil {
		return err
	}
	if len(r.spans) == 0 {
		return io.ErrUnexpectedEOF
	}
	first, last := &r.spans[0], &r.spans[0]
	n := 1
	for n < len(r.spans) && first.Inflated() && follows(last, &r.spans[n]) {
		last = &r.spans[n]
		n++
	}
	off, length := first.Offset, last.Offset+last.Length-first.Offset
	if first.Divisible() { // perhaps only its end
		off += r.pos - first.Start
		length -= r.pos - first.Start
	}
	if _, err := io.CopyN(io.Discard, r.body, off-r.at); err != nil {
		r.err = unexpected(err)
		return r.err
	}
	r.at, r.end = off+length, last.End()
	group := r.spans[:n]
	r.spans = r.spans[n:]
	err := r.open(group, length)
	var other passed
	if errors.As(err, &other) {
		err = other.error
	}
	if r.pos < r.end {
		r.err = err
	}
	return err
}

// follows tells whether the decoder of one part of a gzip stream goes on with
// another one. What is proved and what is not are kept apart.
func follows(s, next *index.Span) bool {
	return next.Codec == s.Codec && (next.Proof == nil) == (s.Proof == nil) && next.Window.Length > 0 && next.Offset <= s.Offset+s.Length
}

// open begins to decode a span, or several of gzip, that have length stored bytes,
// all of them next in body.
func (r *Reader) open(group []index.Span, length int64) error {
	s := &group[0]
	if s.Proof == nil {
		r.unproved = r.end
	}
	if s.Whole() {
		stored := grow(&r.mem.stored, int(length))
		if _, err := io.ReadFull(r.body, stored); err != nil {
			return unexpected(err)
		}
		data := grow(&r.mem.data, int(s.Size))
		if err := r.decode(s, data, stored); err != nil {
			if !errors.As(err, new(passed)) {
				r.pos = r.end // what follows is none the worse
			}
			return err
		}
		if s.Proof != nil {
			if got := sha256.Sum256(data); got != s.Proof.Stored {
				r.pos = r.end
				return fmt.Errorf("%w: digest of what %d stored bytes at offset %d decode to is sha256:%x, want sha256:%x", chunk.ErrCorrupt, s.Length, s.Offset, got, s.Proof.Stored)
			}
		}
		r.whole = data
		return nil
	}
	in := &section{LimitedReader: io.LimitedReader{R: r.body, N: length}}
	r.stored = in
	stored := io.Reader(in)
	if s.Proof != nil {
		stored = &proven{body: in, spans: group, end: s.Offset, mem: &r.mem.stored}
	}
	switch s.Codec {
	case chunk.None:
		r.in = stored
	case chunk.Zstd:
		z, free := r.frames(in)
		r.free = free
		r.in = decoded{z, in}
	case chunk.Gzip, chunk.Deflate:
		cp := zran.Checkpoint{In: s.Offset, Out: s.Start, Bits: s.Bits, Member: s.Codec == chunk.Gzip && s.Window.Length == 0}
		window, err := r.window(s)
		if err != nil {
			return err
		}
		z, err := zran.Resume(stored, cp, window)
		if err != nil {
			return err
		}
		r.free = func() { _ = z.Close() }
		r.in = decoded{z, in}
	default:
		return fmt.Errorf("stream of %v: %w", s.Codec, errors.ErrUnsupported)
	}
	return nil
}

// decode decodes a span as one piece.
func (r *Reader) decode(s *index.Span, data, stored []byte) error {
	if s.Codec == chunk.ZstdBlocks {
		state, err := r.window(s)
		if err == nil {
			err = zframe.Decode(data, stored, state)
		}
		if err != nil && !errors.Is(err, chunk.ErrCorrupt) && !errors.As(err, new(passed)) {
			err = fmt.Errorf("%w: %w", chunk.ErrCorrupt, err)
		}
		return err
	}
	err := s.Codec.Decode(data, stored)
	if err != nil && r.begins(s, data, stored) {
		return nil
	}
	return err
}

// begins decodes a span that decodes to more than the stream has of it, as in
// layers whose frames also hold what lies between files.
func (r *Reader) begins(s *index.Span, data, stored []byte) bool {
	if s.Codec != chunk.Zstd {
		return false
	}
	z, free := r.frames(bytes.NewReader(stored))
	defer free()
	_, err := io.ReadFull(z, data)
	return err == nil
}

// frames decodes zstd frames, as long as there is room for what they take, and returns
// what gives the decoder back.
func (r *Reader) frames(in io.Reader) (*zframe.Reader, func()) {
	d := decoders.Get().(*zstd.Decoder)
	most, has := index.Limits{Window: r.opt.Window}.WithDefaults().Window, int64(0)
	z := zframe.New(in, d, func(f zframe.Frame) error {
		if f.Window > most {
			return passed{fmt.Errorf("%w: a zstd frame needs a window of %d bytes, want at most %d (Window)", index.ErrLimit, f.Window, most)}
		}
		if has = max(has, f.Window); has > base/2 && r.opt.Room != nil {
			if err := r.opt.Room(base + has); err != nil {
				return passed{err}
			}
		}
		return nil
	})
	return z, func() {
		if has > keptWindow {
			d.Close()
			return
		}
		_ = d.Reset(nil)
		decoders.Put(d)
	}
}

// passed is an error that is not the stream's.
type passed struct{ error }

// keptWindow is the largest window whose memory is used again. Most tools make none
// larger unless they are asked to.
const keptWindow = 8 << 20

var decoders = sync.Pool{New: func() any {
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(1<<40), zstd.WithDecoderMaxMemory(1<<62), zstd.WithDecoderLowmem(true))
	if err != nil {
		panic(err) // the options are constants
	}
	return d
}}

// section is the part of a body that belongs to what is decoded.
type section struct {
	io.LimitedReader
	err error // of the body
}

func (s *section) Read(p []byte) (int, error) {
	n, err := s.LimitedReader.Read(p)
	if err != nil && err != io.EOF {
		s.err = err
	}
	return n, err
}

// decoded is what a decoder makes of a section. An error that is not the
// body's is the stream's.
type decoded struct {
	io.Reader
	s *section
}

func (d decoded) Read(p []byte) (int, error) {
	n, err := d.Reader.Read(p)
	var other passed
	switch {
	case err == nil:
	case errors.As(err, &other):
		err = other.error
	case d.s.err != nil:
		err = d.s.err
	case d.s.N > 0 && (err == io.EOF || errors.Is(err, io.ErrUnexpectedEOF)): // the body's end
		err = io.ErrUnexpectedEOF
	case err == io.EOF: // who reads on wants more
		err = fmt.Errorf("%w: the stream ends early", chunk.ErrCorrupt)
	case !errors.Is(err, chunk.ErrCorrupt):
		err = fmt.Errorf("%w: %w", chunk.ErrCorrupt, err)
	}
	return n, err
}

func grow(b *[]byte, n int) []byte {
	if cap(*b) < n {
		*b = make([]byte, n)
	}
	return (*b)[:n]
}

func unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
