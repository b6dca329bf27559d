package stream

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/klauspost/compress/zstd"
	"go.uber.org/goleak"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/zframe"
	"github.com/shale-image/shale/index/zran"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// layout is a blob, what it stores and its stream.
type layout struct {
	index.Blob
	stored, plain []byte
	windows       map[int64][]byte // by the Start of spans, as they are
	side          []byte           // the same as it is stored
}

// keep stores a window.
func (l *layout) keep(p []byte) index.Window {
	w := index.Window{Offset: int64(len(l.side)), Length: uint32(len(p))}
	l.side = append(l.side, p...)
	return w
}

var encoder, _ = zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))

// text is n bytes that compress by half and more, and that the seed decides.
func text(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	p := make([]byte, (n+15)&^15)
	for i := 0; i < len(p); i += 16 {
		binary.LittleEndian.PutUint32(p[i:], r.Uint32())
	}
	return p[:n]
}

func (l *layout) gap(n int) { l.stored = append(l.stored, text(uint64(n), n)...) }

func (l *layout) add(codec chunk.Codec, plain, stored []byte) {
	l.Append(index.Span{Size: int64(len(plain)), Offset: int64(len(l.stored)), Length: int64(len(stored)), Codec: codec})
	l.stored, l.plain = append(l.stored, stored...), append(l.plain, plain...)
}

// piece adds a span as None, Zstd or LZ4.
func (l *layout) piece(codec chunk.Codec, plain []byte) {
	stored, ok := codec.Encode(nil, plain)
	if !ok {
		codec, stored = chunk.None, plain
	}
	l.add(codec, plain, stored)
}

// big is a zstd frame of several blocks that is larger than what is decoded in
// memory.
var big = sync.OnceValues(func() (plain, frame []byte) {
	plain = bytes.Repeat(text(99, 1<<20), 17)[:17<<20-77]
	return plain, frame17(plain)
})

func frame17(plain []byte) []byte {
	var b bytes.Buffer
	w, err := zstd.NewWriter(&b, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(4<<20))
	if err != nil {
		panic(err)
	}
	w.Write(plain)
	if err := w.Close(); err != nil {
		panic(err)
	}
	return b.Bytes()
}

// gzip adds members of a gzip file, with a span for each checkpoint.
func (l *layout) gzip(step int, members ...[]byte) {
	var b bytes.Buffer
	for _, p := range members {
		w := gzip.NewWriter(&b)
		w.Write(p)
		w.Close()
	}
	l.parts(step, b.Bytes())
}

func (l *layout) parts(step int, gz []byte) {
	var cps []zran.Checkpoint
	var windows [][]byte
	z := zran.NewReader(bytes.NewReader(gz), zran.Options{Span: int64(step), Checkpoint: func(cp zran.Checkpoint, window []byte) error {
		cps, windows = append(cps, cp), append(windows, bytes.Clone(window))
		return nil
	}})
	plain, err := io.ReadAll(z)
	if err != nil {
		panic(err)
	}
	z.Close()
	base := int64(len(l.stored))
	for i, cp := range cps {
		size, end := int64(len(plain))-cp.Out, int64(len(gz))
		if i+1 < len(cps) {
			size, end = cps[i+1].Out-cp.Out, cps[i+1].In
			if cps[i+1].Bits > 0 {
				end++
			}
		}
		if size == 0 { // the last one, at the end of the stream
			break
		}
		s := index.Span{Size: size, Offset: base + cp.In, Length: end - cp.In, Codec: chunk.Gzip, Bits: cp.Bits}
		if !cp.Member {
			s.Window = l.keep(encoder.EncodeAll(windows[i], nil))
		}
		l.windows[l.Append(s)] = windows[i]
	}
	l.stored, l.plain = append(l.stored, gz...), append(l.plain, plain...)
}

// blocks adds a zstd frame of small blocks, with spans of at least every bytes, and perhaps
// another frame.
func (l *layout) blocks(r *rand.Rand, every int, plain []byte) {
	e, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(1<<(10+r.IntN(6))), zstd.WithEncoderCRC(r.IntN(2) == 0))
	if err != nil {
		panic(err)
	}
	n := len(plain)
	if r.IntN(2) == 0 {
		n = r.IntN(n + 1)
	}
	frames := e.EncodeAll(plain[n:], e.EncodeAll(plain[:n], nil))
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1))
	if err != nil {
		panic(err)
	}
	defer d.Close()
	base := int64(len(l.stored))
	z := zframe.New(bytes.NewReader(frames), d, func(zframe.Frame) error { return nil })
	z.Cut(zframe.NewCutter(int64(every), int64(every), func(s index.Span, state []byte) error {
		if s.Offset += base; state != nil {
			s.Window = l.keep(encoder.EncodeAll(state, nil))
		}
		l.Append(s)
		return nil
	}))
	if _, err := io.Copy(io.Discard, z); err != nil {
		panic(err)
	}
	if err := z.Whole(); err != nil {
		panic(err)
	}
	l.stored, l.plain = append(l.stored, frames...), append(l.plain, plain...)
}

// prove makes spans from n on such that only what is stored is verified: those of
// gzip begin behind the header of their member, as nothing tells of that.
func (l *layout) prove(n int) {
	for i := n; i < len(l.Spans); i++ {
		s := &l.Spans[i]
		if s.Codec != chunk.None && s.Codec != chunk.Gzip {
			continue
		}
		if s.Codec == chunk.Gzip {
			if s.Codec = chunk.Deflate; s.Window.Length == 0 {
				s.Offset, s.Length = s.Offset+10, s.Length-10 // as Go writes it
			}
		}
		s.Proof = &index.Proof{Stored: sha256.Sum256(l.stored[s.Offset:][:s.Length])}
		if w := l.windows[s.Start]; s.Window.Length > 0 {
			s.Window, s.Proof.Window = l.keep(w), sha256.Sum256(w)
		}
	}
}

// random makes a layout of n pieces. It has gzip or blocks of zstd frames: not both need
// windows.
func random(r *rand.Rand, n int) *layout {
	l := &layout{windows: map[int64][]byte{}}
	blocks := r.IntN(2) == 0
	for range n {
		if r.IntN(3) == 0 {
			l.gap(r.IntN(1 << (1 + r.IntN(14))))
		}
		size, first := 1+r.IntN(1<<(1+r.IntN(17))), len(l.Spans)
		switch k := r.IntN(40); {
		case k == 0 && r.IntN(4) == 0:
			p, f := big()
			l.add(chunk.Zstd, p, f)
		case k < 12 && blocks:
			l.blocks(r, 1+r.IntN(1<<(4+r.IntN(14))), append(text(r.Uint64(), size), text(r.Uint64()%8, 1+r.IntN(1<<17))...))
		case k < 6:
			l.gzip(1+r.IntN(1<<16), text(r.Uint64(), size), text(r.Uint64(), 1+r.IntN(1<<17)))
		case k < 18:
			l.piece(chunk.Zstd, text(r.Uint64(), size))
		case k < 28:
			l.piece(chunk.LZ4, bytes.Repeat(text(r.Uint64(), 1+size/9), 9))
		default:
			l.piece(chunk.None, text(r.Uint64(), size))
		}
		if r.IntN(2) == 0 {
			l.prove(first)
		}
	}
	l.Size = int64(len(l.stored))
	return l
}

// check fails the test unless the layout is one that link takes.
func (l *layout) check(t testing.TB) *layout {
	t.Helper()
	tree := index.Tree{Blobs: []index.Blob{l.Blob}}
	if err := tree.CheckSpans(); err != nil {
		t.Fatal(err)
	}
	if l.StreamSize() != int64(len(l.plain)) {
		t.Fatalf("stream of %d bytes, want %d", l.StreamSize(), len(l.plain))
	}
	return l
}

// open opens a part of the stream, whose stored bytes change may replace.
func (l *layout) open(from, to int64, change func(body []byte) io.Reader) (*Reader, error) {
	spans := l.Cover(from, to)
	off, n := index.Stored(spans, from, to)
	p := l.stored[off : off+n : off+n]
	body := io.Reader(bytes.NewReader(p))
	if change != nil {
		body = change(p)
	}
	var beside []byte
	if _, off, n := index.Beside(spans); n > 0 {
		beside = l.side[off:][:n]
	}
	return NewReader(body, spans, from, to, beside)
}
