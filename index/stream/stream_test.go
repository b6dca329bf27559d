package stream

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"testing/iotest"

	"github.com/klauspost/compress/zstd"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// walk reads [from, to) in steps, some of which it skips, and fails the test
// unless it is the stream.
func (l *layout) walk(t testing.TB, r *rand.Rand, from, to int64) {
	t.Helper()
	in, err := l.open(from, to, func(p []byte) io.Reader {
		if r.IntN(4) == 0 {
			n := min(len(p), 1<<15)
			return io.MultiReader(iotest.OneByteReader(bytes.NewReader(p[:n])), bytes.NewReader(p[n:]))
		}
		return bytes.NewReader(p)
	})
	if err != nil {
		t.Fatalf("%d to %d: %v", from, to, err)
	}
	defer in.Close()
	for pos := from; pos < to; {
		if in.Pos() != pos {
			t.Fatalf("at %d, want %d", in.Pos(), pos)
		}
		n := min(to-pos, 1+r.Int64N(1<<(1+r.IntN(18))))
		if r.IntN(3) == 0 {
			if r.IntN(4) == 0 {
				n = r.Int64N(to - pos + 1)
			}
			if err := in.Skip(n); err != nil {
				t.Fatalf("%d to %d: skip %d at %d: %v", from, to, n, pos, err)
			}
		} else if p, err := in.Next(int(n)); err != nil || !bytes.Equal(p, l.plain[pos:pos+n]) {
			t.Fatalf("%d to %d: %d bytes at %d are others, or %v", from, to, n, pos, err)
		}
		pos += n
	}
}

// Whatever spans there are, any part of the stream is read as it is.
func TestRandomLayouts(t *testing.T) {
	for seed := range uint64(50) {
		r := rand.New(rand.NewPCG(seed, 2))
		l := random(r, 1+r.IntN(12)).check(t)
		for range 12 {
			from := r.Int64N(l.StreamSize())
			l.walk(t, r, from, from+1+r.Int64N(l.StreamSize()-from))
		}
		l.walk(t, r, 0, l.StreamSize())
	}
}

func FuzzLayouts(f *testing.F) {
	f.Add(uint64(1), uint8(3), uint32(0), uint32(1<<31))
	f.Add(uint64(7), uint8(9), uint32(12345), uint32(1))
	f.Fuzz(func(t *testing.T, seed uint64, n uint8, from, length uint32) {
		r := rand.New(rand.NewPCG(seed, 3))
		l := random(r, 1+int(n%16)).check(t)
		at := int64(from) % l.StreamSize()
		l.walk(t, r, at, at+1+int64(length)%(l.StreamSize()-at))
	})
}

// FuzzBodies: whatever the stored bytes are, reading ends with the stream or
// with an error of the right kind.
func FuzzBodies(f *testing.F) {
	for seed := range uint64(4) {
		f.Add(seed, uint16(0), []byte("x"))
		f.Add(seed, uint16(4000), []byte{})
	}
	f.Fuzz(func(t *testing.T, seed uint64, at uint16, change []byte) {
		l := random(rand.New(rand.NewPCG(seed, 4)), 1+int(seed%5)).check(t)
		if len(l.plain) > 1<<20 {
			return
		}
		body := append([]byte(nil), l.stored...)
		copy(body[int(at)%len(body):], change)
		if len(change) == 0 {
			body = body[:int(at)%len(body)]
		}
		off, _ := index.Stored(l.Spans, 0, l.StreamSize())
		in, err := NewReader(bytes.NewReader(body[min(int64(len(body)), off):]), l.Spans, 0, l.StreamSize(), nil)
		if err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		for pos := int64(0); pos < l.StreamSize(); {
			n := min(5000, l.StreamSize()-pos)
			if _, err := in.Next(int(n)); err == nil {
				pos += n
				continue
			} else if !errors.Is(err, chunk.ErrCorrupt) && !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Fatalf("at %d: %v", pos, err)
			}
			if in.Pos() <= pos {
				return
			}
			pos = in.Pos()
		}
	})
}

// several are spans of all kinds, with gaps.
func several(t testing.TB) *layout {
	l := &layout{windows: map[int64][]byte{}}
	l.piece(chunk.None, text(1, 5000))
	l.gap(3)
	l.piece(chunk.Zstd, text(2, 6000))
	l.piece(chunk.LZ4, bytes.Repeat(text(3, 700), 10))
	l.gap(1000)
	l.piece(chunk.Zstd, text(4, 8000))
	l.gzip(50000, text(5, 100000), text(6, 3000))
	l.gap(10)
	l.gzip(1<<20, text(7, 3000))
	l.piece(chunk.None, text(8, 100))
	p, f := big()
	l.add(chunk.Zstd, p, f)
	l.piece(chunk.Zstd, text(9, 10))
	return l.check(t)
}

// A body that ends anywhere is that, and no corruption. It stays.
func TestTruncated(t *testing.T) {
	l := several(t)
	all := int64(len(l.stored))
	for n := int64(0); n < all; n += 1 + n/60 + (all-n)/2000 {
		in, err := l.open(0, l.StreamSize(), func(p []byte) io.Reader { return bytes.NewReader(p[:n]) })
		if err != nil {
			t.Fatal(err)
		}
		for err == nil {
			_, err = in.Next(int(min(100000, l.StreamSize()-in.Pos())))
			if in.Pos() == l.StreamSize() {
				break
			}
		}
		if !errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, chunk.ErrCorrupt) {
			t.Fatalf("%d of %d stored bytes: at %d of %d: %v", n, all, in.Pos(), l.StreamSize(), err)
		}
		for range 3 {
			if _, err := in.Next(1); !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Fatalf("after the end: %v", err)
			}
			if err := in.Skip(1); !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Fatalf("after the end: %v", err)
			}
		}
		in.Close()
	}
}

// An error of the body is passed on, and stays.
func TestBodyFails(t *testing.T) {
	l := several(t)
	broken := errors.New("broken")
	for n := 0; n < len(l.stored); n += 1 + n/7 + (len(l.stored)-n)/900 {
		for _, skip := range []bool{false, true} {
			in, err := l.open(0, l.StreamSize(), func(p []byte) io.Reader {
				return io.MultiReader(bytes.NewReader(p[:n]), iotest.ErrReader(broken), bytes.NewReader(p[n:]))
			})
			if err != nil {
				t.Fatal(err)
			}
			for err == nil && in.Pos() < l.StreamSize() {
				step := min(30000, l.StreamSize()-in.Pos())
				if skip = !skip; skip {
					err = in.Skip(step)
				} else {
					_, err = in.Next(int(step))
				}
			}
			// A body may fail behind the last byte that is needed.
			if !errors.Is(err, broken) || errors.Is(err, chunk.ErrCorrupt) {
				t.Fatalf("after %d of %d stored bytes: at %d of %d: %v", n, len(l.stored), in.Pos(), l.StreamSize(), err)
			}
			if _, err := in.Next(1); !errors.Is(err, broken) {
				t.Fatalf("again: %v", err)
			}
			in.Close()
		}
	}
}

// A span that is damaged, and decoded as one piece, harms nobody else: neither
// if it is read, from wherever, nor if it is skipped.
func TestCorruptWhole(t *testing.T) {
	for _, at := range []int{1, 2, 3} {
		l := several(t)
		bad := l.Spans[at]
		for i := range 4 {
			l.stored[bad.Offset+int64(i)] ^= 0xff
		}
		for _, from := range []int64{0, bad.Start, bad.Start + 1, bad.End() - 1} {
			in, err := l.open(from, l.StreamSize(), nil)
			if err != nil {
				t.Fatal(err)
			}
			if from == 0 {
				if p, err := in.Next(int(bad.Start)); err != nil || !bytes.Equal(p, l.plain[:bad.Start]) {
					t.Fatalf("before span %d: %v", at, err)
				}
			}
			if _, err := in.Next(1); !errors.Is(err, chunk.ErrCorrupt) || in.Pos() != bad.End() {
				t.Errorf("span %d from %d: at %d, %v", at, from, in.Pos(), err)
			}
			if p, err := in.Next(20000); err != nil || !bytes.Equal(p, l.plain[bad.End():][:20000]) {
				t.Errorf("behind span %d: %v", at, err)
			}
			in.Close()
		}
		in, err := l.open(0, l.StreamSize(), nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := in.Next(int(bad.Start) + 7); !errors.Is(err, chunk.ErrCorrupt) || in.Pos() != bad.End() {
			t.Errorf("into span %d: at %d, %v", at, in.Pos(), err)
		}
		in.Close()
		if in, err = l.open(0, l.StreamSize(), nil); err != nil {
			t.Fatal(err)
		}
		if err := in.Skip(bad.End() + 5); err != nil {
			t.Errorf("skip span %d: %v", at, err)
		}
		if p, err := in.Next(5); err != nil || !bytes.Equal(p, l.plain[bad.End()+5:][:5]) {
			t.Errorf("behind span %d: %v", at, err)
		}
		in.Close()
	}
}

// What is decoded as a stream is corrupt if it is damaged, ends early or is cut;
// if there is more of it than its span tells, that does not matter.
func TestCorruptStream(t *testing.T) {
	p, frame := big()
	for name, c := range map[string]struct {
		size, length int
		change       func(f []byte)
		good         bool
	}{
		"right":   {len(p), len(frame), func([]byte) {}, true},
		"magic":   {len(p), len(frame), func(f []byte) { f[0] ^= 1 }, false},
		"block":   {len(p), len(frame), func(f []byte) { f[len(f)-1] ^= 1; f[len(f)/2] ^= 0x55 }, false},
		"short":   {len(p) + 1, len(frame), func([]byte) {}, false},
		"cut":     {len(p), len(frame) - 10, func([]byte) {}, false},
		"more":    {len(p) - 5000, len(frame), func([]byte) {}, true},
		"garbage": {len(p), len(frame), func(f []byte) { copy(f, text(3, len(f))) }, false},
	} {
		l := &layout{}
		l.add(chunk.Zstd, p, bytes.Clone(frame))
		c.change(l.stored)
		l.Spans[0].Size, l.Spans[0].Length = int64(c.size), int64(c.length)
		l.plain = l.plain[:min(len(p), c.size)]
		next := l.Append(index.Span{Size: 100, Length: 100, Offset: int64(len(l.stored))})
		l.stored = append(l.stored, text(8, 100)...)
		in, err := l.open(0, l.StreamSize(), nil)
		if err != nil {
			t.Fatal(err)
		}
		for err == nil && in.Pos() < next {
			n := min(100000, next-in.Pos())
			at := in.Pos()
			var q []byte
			if q, err = in.Next(int(n)); err == nil && !bytes.Equal(q, l.plain[at:at+n]) {
				err = fmt.Errorf("wrong bytes at %d", at)
				if !c.good {
					err = chunk.ErrCorrupt // as its digest would tell
				}
			}
		}
		if c.good {
			var q []byte
			if err == nil {
				q, err = in.Next(100)
			}
			if err != nil || !bytes.Equal(q, text(8, 100)) {
				t.Errorf("%s: %v", name, err)
			}
		} else if !errors.Is(err, chunk.ErrCorrupt) {
			t.Errorf("%s: %v, want ErrCorrupt", name, err)
		}
		in.Close()
	}
}

// Skipping reads what lies between, and decodes nothing that it need not.
func TestSkip(t *testing.T) {
	l := several(t)
	for i := range l.Spans {
		if l.Spans[i].Whole() && i != 3 {
			clear(l.stored[l.Spans[i].Offset:][:l.Spans[i].Length])
		}
	}
	s := l.Spans[3]
	in, err := l.open(10, s.End(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	if err := in.Skip(s.Start + 100 - 10); err != nil {
		t.Fatal(err)
	}
	if p, err := in.Next(50); err != nil || !bytes.Equal(p, l.plain[s.Start+100:][:50]) {
		t.Error(err)
	}
	if err := in.Skip(0); err != nil || in.Pos() != s.Start+150 {
		t.Error(err)
	}
	if err := in.Skip(s.End() - in.Pos()); err != nil {
		t.Error(err)
	}
	if _, err := in.Next(1); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("behind the end: %v", err)
	}
	if err := in.Skip(1); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("behind the end: %v", err)
	}
}

// Close reads nothing any more.
func TestClose(t *testing.T) {
	l := several(t)
	var left *bytes.Reader
	in, err := l.open(0, l.StreamSize(), func(p []byte) io.Reader { left = bytes.NewReader(p); return left })
	if err != nil {
		t.Fatal(err)
	}
	if _, err := in.Next(100); err != nil {
		t.Fatal(err)
	}
	n := left.Len()
	if in.Close(); left.Len() != n {
		t.Errorf("%d bytes were read", n-left.Len())
	}
	in.Close()
}

func TestNewReaderRefuses(t *testing.T) {
	l := several(t)
	for _, c := range []struct {
		spans    []index.Span
		from, to int64
	}{
		{nil, 0, 1}, {l.Spans, -1, 1}, {l.Spans, 5, 5}, {l.Spans, 5, 4}, {l.Spans, 0, l.StreamSize() + 1},
		{l.Spans[1:], 0, 6000}, {l.Spans[:1], 4000, 5001}, {l.Spans, 5000, 5001}, {l.Spans, 1 << 62, 1<<62 + 1},
	} {
		if r, err := NewReader(bytes.NewReader(l.stored), c.spans, c.from, c.to, nil); !errors.Is(err, chunk.ErrCorrupt) || r != nil {
			t.Errorf("%d to %d in %d spans: %v", c.from, c.to, len(c.spans), err)
		}
	}
	lz4 := []index.Span{{Size: chunk.MaxSize + 1, Length: 5, Codec: chunk.LZ4}} // CheckSpans refuses it
	r, err := NewReader(bytes.NewReader(l.stored), lz4, 0, 1, nil)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := r.Next(1); !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("a stream of LZ4: %v", err)
		}
	}
	r.Close()
	r.Close()
}

// A gzip span needs its window, and the right one.
func TestGzipWindow(t *testing.T) {
	l := &layout{windows: map[int64][]byte{}}
	l.gzip(60000, text(1, 400000))
	l.check(t)
	s := l.Spans[len(l.Spans)-1]
	if len(l.Spans) < 3 || s.Window.Length == 0 {
		t.Fatalf("%d spans", len(l.Spans))
	}
	r := rand.New(rand.NewPCG(1, 1))
	l.walk(t, r, s.Start, s.End())
	l.walk(t, r, s.End()-1, s.End())
	window := l.windows[s.Start]
	stored := l.stored[s.Offset:][:s.Length]
	for name, w := range map[string][]byte{"none": nil, "other": make([]byte, len(window)), "half": window[len(window)/2:]} {
		if w != nil {
			w = encoder.EncodeAll(w, nil)
		}
		s.Window = index.Window{Length: max(1, uint32(len(w)))}
		in, err := NewReader(bytes.NewReader(stored), []index.Span{s}, s.Start, s.End(), w)
		if err != nil {
			t.Fatal(err)
		}
		p, err := in.Next(int(s.Size))
		if err == nil && bytes.Equal(p, l.plain[s.Start:]) || err != nil && !errors.Is(err, chunk.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
		in.Close()
	}
}

var zeroFrames, _ = zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithZeroFrames(true))

// states is a layout of spans that need states, and one that begins with a frame.
func states(t testing.TB) *layout {
	r := rand.New(rand.NewPCG(4, 4))
	l := &layout{windows: map[int64][]byte{}}
	l.piece(chunk.None, text(1, 5000))
	l.blocks(r, 1, append(bytes.Repeat(text(2, 3000), 30), text(3, 20_000)...))
	l.piece(chunk.Zstd, text(4, 5000))
	l.check(t)
	n := 0
	for i := range l.Spans {
		if l.Spans[i].Window.Length > 0 {
			n++
		}
	}
	if n < 3 {
		t.Fatalf("%d of %d spans have states", n, len(l.Spans))
	}
	return l
}

// A span whose state is damaged, missing or another's is corrupt or has other bytes, and
// harms nobody else.
func TestStates(t *testing.T) {
	broken := func(what string, l *layout, wrong func(i int) bool, beside func(all []byte) []byte, certain bool) {
		t.Helper()
		off, _ := index.Stored(l.Spans, 0, l.StreamSize())
		in, err := NewReader(bytes.NewReader(l.stored[off:]), l.Spans, 0, l.StreamSize(), beside(bytes.Clone(l.side)))
		if err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		for i, s := range l.Spans {
			p, err := in.Next(int(s.Size))
			right := err == nil && bytes.Equal(p, l.plain[s.Start:s.End()])
			if in.Pos() != s.End() || err != nil && !errors.Is(err, chunk.ErrCorrupt) || !wrong(i) && !right || wrong(i) && certain && err == nil {
				t.Errorf("%s: span %d, %+v: at %d, right %v, %v", what, i, s, in.Pos(), right, err)
			}
		}
	}
	l := states(t)
	needs := func(i int) bool { return l.Spans[i].Window.Length > 0 }
	broken("none is wrong", l, func(int) bool { return false }, func(p []byte) []byte { return p }, true)
	broken("all are missing", l, needs, func([]byte) []byte { return nil }, true)
	for n := range l.Spans {
		if !needs(n) {
			continue
		}
		w, only := l.Spans[n].Window, func(i int) bool { return i == n }
		broken("no zstd", l, only, func(p []byte) []byte { p[w.Offset] ^= 1; return p }, true)
		broken("cut off", l, func(i int) bool { return needs(i) && i >= n }, func(p []byte) []byte { return p[:w.Offset+int64(w.Length)-1] }, true)
		broken("another byte", l, only, func(p []byte) []byte { p[w.Offset+int64(w.Length)/2] ^= 0x10; return p }, false)
		for what, state := range map[string][]byte{"nothing": {}, "zeros": make([]byte, 5000), "flags": {0xff}} {
			changed := *l
			changed.Spans = append([]index.Span(nil), l.Spans...)
			changed.side = nil
			for i := range changed.Spans {
				if s := &changed.Spans[i]; i == n {
					s.Window = changed.keep(zeroFrames.EncodeAll(state, nil))
				} else if needs(i) {
					s.Window = changed.keep(l.side[s.Window.Offset:][:s.Window.Length])
				}
			}
			broken(what, &changed, only, func(p []byte) []byte { return p }, true)
		}
	}
	// What lies before the windows that were fetched, and in the middle.
	n := 0
	for !needs(n) {
		n++
	}
	s := l.Spans[n+1]
	in, err := NewReader(bytes.NewReader(l.stored[s.Offset:]), l.Spans[n+1:n+2], s.Start+100, s.End(), l.side[s.Window.Offset:][:s.Window.Length])
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	if p, err := in.Next(int(s.Size - 100)); err != nil || !bytes.Equal(p, l.plain[s.Start+100:s.End()]) {
		t.Errorf("from the middle: %v", err)
	}
}

// States that are not beside come when they are needed. That they do not is no fault of the
// stream's.
func TestMore(t *testing.T) {
	l := states(t)
	off, _ := index.Stored(l.Spans, 0, l.StreamSize())
	calls := 0
	var fails error
	open := func() *Reader {
		o := Options{More: func(blob uint32, off, length int64) ([]byte, error) {
			calls++
			if blob != 0 || length < 1 || off < 0 || off+length > int64(len(l.side)) {
				t.Errorf("%d bytes at %d of blob %d are asked for", length, off, blob)
			}
			return l.side[off:][:length], fails
		}}
		in, err := o.NewReader(bytes.NewReader(l.stored[off:]), l.Spans, 0, l.StreamSize(), nil)
		if err != nil {
			t.Fatal(err)
		}
		return in
	}
	in := open()
	if p, err := in.Next(int(l.StreamSize())); err != nil || !bytes.Equal(p, l.plain) || calls < 3 || calls >= len(l.Spans) {
		t.Errorf("%d calls for %d spans, %v", calls, len(l.Spans), err)
	}
	in.Close()
	fails = errors.New("no")
	in = open()
	defer in.Close()
	for _, s := range l.Spans {
		p, err := in.Next(int(s.Size))
		if s.Window.Length == 0 {
			if err != nil || !bytes.Equal(p, l.plain[s.Start:s.End()]) {
				t.Fatalf("a span without a state: %v", err)
			}
			continue
		}
		for range 3 {
			if err != fails || in.Pos() != s.Start {
				t.Errorf("at %d: %v", in.Pos(), err)
			}
			_, err = in.Next(1)
		}
		break
	}
}

// Of a span that has a proof nothing is decoded unless all of what is stored is
// right: not even what lies before the damage.
func TestProof(t *testing.T) {
	l := &layout{windows: map[int64][]byte{}}
	l.piece(chunk.None, text(1, 100_000))
	l.gzip(60000, text(2, 400000))
	l.gap(7)
	l.gzip(1<<20, text(3, 50000))
	l.prove(0)
	l.check(t)
	origin := chunk.Digest{Algorithm: chunk.Origin}
	for i, s := range l.Spans {
		for _, at := range []int64{s.Offset, s.Offset + s.Length/2, s.Offset + s.Length - 1} {
			stored := l.stored
			l.stored = bytes.Clone(stored)
			l.stored[at] ^= 0x10
			for _, from := range []int64{s.Start, s.End() - 1, 0} {
				in, err := l.open(from, l.StreamSize(), nil)
				if err == nil && from == 0 && s.Start > 0 {
					// The damage may be in a byte that the span before has, too.
					err = in.Skip(l.Spans[i-1].Start)
				}
				if err == nil && from == 0 && s.Start > 0 {
					var p []byte
					before := l.Spans[i-1]
					if p, err = in.Next(int(before.Size)); err == nil && !bytes.Equal(p, l.plain[before.Start:s.Start]) {
						t.Errorf("span %d: wrong bytes before it", i)
					}
					if err != nil && at > s.Offset {
						t.Errorf("span %d, damaged at %d: what is before it: %v", i, at, err)
					}
				}
				if err == nil {
					_, err = in.Next(1)
				}
				if !errors.Is(err, chunk.ErrCorrupt) {
					t.Errorf("span %d, damaged at %d, from %d: %v", i, at, from, err)
				}
				if in != nil {
					in.Close()
				}
			}
			l.stored = stored
		}
	}
	in, err := l.open(0, l.StreamSize(), nil)
	if err != nil {
		t.Fatal(err)
	}
	p, err := in.Next(int(l.StreamSize()))
	if err != nil || !bytes.Equal(p, l.plain) || in.Verify(origin, p) != nil {
		t.Errorf("all of it: %v", err)
	}
	if err := in.Verify(chunk.Sum(chunk.SHA256, nil), p); !errors.Is(err, chunk.ErrCorrupt) {
		t.Errorf("another digest: %v", err)
	}
	in.Close()
	l.Spans[0].Proof = nil
	if in, err = l.open(99_000, 100_001, nil); err == nil {
		_, err = in.Next(1001)
	}
	if err != nil || !errors.Is(in.Verify(origin, nil), chunk.ErrCorrupt) {
		t.Errorf("in part without a proof: %v", err)
	}
	in.Close()
}

func TestMemory(t *testing.T) {
	l := several(t)
	if n := Memory(l.Spans); n != 512<<10 {
		t.Errorf("%d bytes", n)
	}
	if n := Memory([]index.Span{{Size: 4 << 20, Length: 3 << 20, Codec: chunk.Deflate, Proof: &index.Proof{}}}); n != 3<<20+512<<10 {
		t.Errorf("%d bytes", n)
	}
	if n := Memory([]index.Span{{Size: 1 << 20, Length: 5, Codec: chunk.ZstdBlocks, Window: index.Window{Length: 9}}, {Size: 1}}); n != 4<<20+256<<10+5+9 {
		t.Errorf("%d bytes", n)
	}
	if n := Memory([]index.Span{{Size: 1 << 20, Length: 5, Codec: chunk.Zstd}, {Size: 1}}); n != 1<<20+5 {
		t.Errorf("%d bytes", n)
	}
	if n := Memory([]index.Span{{Size: 1 << 40, Length: 1 << 39, Codec: chunk.Zstd}, {Size: 1 << 40, Length: 1 << 40}}); n > 1<<20 {
		t.Errorf("%d bytes", n)
	}
}

// Readers share memory when they are closed, and no other.
func TestConcurrent(t *testing.T) {
	l := several(t)
	var wg sync.WaitGroup
	for k := range 8 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(k), 9))
			for range 20 {
				from := r.Int64N(40000)
				l.walk(t, r, from, from+1+r.Int64N(90000))
			}
		})
	}
	wg.Wait()
}

// What a zstd frame decodes to is proved where it has a digest, and what has none
// does not spoil what has.
func TestProofOfContent(t *testing.T) {
	var b index.Blob
	var stored, data []byte
	for i := range 4 {
		p := bytes.Repeat([]byte{byte('a' + i)}, 1000)
		z, _ := chunk.Zstd.Encode(nil, p)
		b.Append(index.Span{Size: 1000, Offset: int64(len(stored)), Length: int64(len(z)), Codec: chunk.Zstd, Proof: &index.Proof{Stored: sha256.Sum256(p)}})
		stored, data = append(stored, z...), append(data, p...)
	}
	b.Spans[0].Proof = nil
	b.Spans[3].Proof.Stored[5] ^= 1
	r, err := NewReader(bytes.NewReader(stored), b.Spans, 500, 4000, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	origin := chunk.Digest{Algorithm: chunk.Origin}
	for _, x := range []struct {
		n  int
		ok bool
	}{{700, false}, {1300, true}, {500, true}} { // 500 to 1200, to 2500, to 3000
		at := r.Pos()
		p, err := r.Next(x.n)
		if err != nil || !bytes.Equal(p, data[at:][:x.n]) {
			t.Fatalf("%d bytes at %d: %v or others", x.n, at, err)
		}
		if err := r.Verify(origin, p); (err == nil) != x.ok || err != nil && !errors.Is(err, chunk.ErrCorrupt) {
			t.Errorf("%d bytes at %d: %v", x.n, at, err)
		}
	}
	if _, err := r.Next(10); !errors.Is(err, chunk.ErrCorrupt) || !strings.Contains(fmt.Sprint(err), "decode to") || r.Pos() != 4000 {
		t.Errorf("a wrong digest: %v, at %d", err, r.Pos())
	}
}
