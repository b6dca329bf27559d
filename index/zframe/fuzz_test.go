package zframe

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/shale-image/shale/index"
)

// whole decodes all frames by the library, whose checksums are not ours to compare.
func whole(stored []byte) ([]byte, error) {
	return wholeDecoder.DecodeAll(stored, nil)
}

var wholeDecoder, _ = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(4<<20), zstd.WithDecoderMaxWindow(MaxWindow), zstd.IgnoreChecksum(true))

// decode is Decode, twice: by a decoder that decoded something else before and by a new one,
// into memory that had other bytes. Both have to do the same, all of it, and nothing else.
func decode(t testing.TB, size int, stored, state []byte) ([]byte, error) {
	t.Helper()
	const guard = 32
	p, s := bytes.Clone(stored), bytes.Clone(state)
	fill := func(v byte) []byte { return bytes.Repeat([]byte{v}, size+2*guard) }
	a, b := fill(0xa5), fill(0x5a)
	err := Decode(a[guard:][:size:size], p, s)
	d := new(decoder)
	again := d.read(size, p, s)
	if again == nil {
		d.execute(b[guard:][:size:size])
	}
	if (err == nil) != (again == nil) || err != nil && (err.Error() != again.Error() || !errors.Is(err, index.ErrCorrupt)) {
		t.Fatalf("%v, by a new decoder %v", err, again)
	}
	edge := func(p []byte, v byte) bool {
		return bytes.Count(p[:guard], []byte{v}) == guard && bytes.Count(p[guard+size:], []byte{v}) == guard
	}
	if !edge(a, 0xa5) || !edge(b, 0x5a) || !bytes.Equal(p, stored) || !bytes.Equal(s, state) {
		t.Fatal("it wrote where it should not")
	}
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(a[guard:][:size], b[guard:][:size]) {
		t.Fatal("what it decodes depends on what was before")
	}
	return a[guard:][:size], nil
}

// odd tells whether the library decodes a frame although there is no saying what it means:
// it takes an offset of 0 for 1 (RFC 8878, section 3.1.1.5, has that as corrupt).
func odd(err error) bool { return strings.Contains(err.Error(), "an offset of 0") }

// FuzzDecode: whatever a span and its state are, decoding ends with an error or with all
// that was wanted. Whole frames decode to what the library makes of them, and those that it
// takes are taken.
func FuzzDecode(f *testing.F) {
	add := func(stored []byte, pieces []piece) {
		for i, p := range pieces {
			q := stored[p.Offset:][:p.Length]
			f.Add(uint32(p.Size), q, p.state)
			f.Add(uint32(p.Size), q[:len(q)/2], p.state)
			f.Add(uint32(p.Size), q, p.state[:len(p.state)/2])
			f.Add(uint32(p.Size/2), q, p.state)
			if i > 5 {
				break
			}
		}
	}
	for _, plain := range samples(20_000) {
		for level := zstd.SpeedFastest; level <= zstd.SpeedBestCompression; level += 3 {
			e, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(level), zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(4<<10)) // blocks are no larger
			if err != nil {
				f.Fatal(err)
			}
			for _, n := range []int{1000, len(plain)} {
				stored := e.EncodeAll(plain[:min(n, len(plain))], nil)
				_, pieces, err := cut(f, stored, 1)
				if err != nil {
					f.Fatal(err)
				}
				add(stored, pieces)
				f.Add(uint32(n), stored, []byte{})
			}
		}
	}
	f.Fuzz(func(t *testing.T, size uint32, stored, state []byte) {
		n := int(size % (MaxSpan + 1))
		got, err := decode(t, n, stored, state)
		if len(state) > 0 {
			return
		}
		want, werr := whole(stored)
		if werr != nil {
			return
		}
		if err == nil && (len(want) < n || !bytes.Equal(got, want[:n])) {
			t.Fatalf("%d bytes that are others than the library's %d", n, len(want))
		}
		if len(want) > MaxSpan {
			return
		}
		if got, err = decode(t, len(want), stored, nil); err != nil && !odd(err) {
			t.Fatalf("%v, the library takes it: %d bytes", err, len(want))
		} else if err == nil && !bytes.Equal(got, want) {
			t.Fatal("other bytes than the library's")
		}
	})
}

// FuzzCut: of whatever the library decodes, if it can be cut, each span decodes by itself.
func FuzzCut(f *testing.F) {
	for _, plain := range samples(20_000) {
		for level := zstd.SpeedFastest; level <= zstd.SpeedBestCompression; level += 3 {
			e, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(level), zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(4<<10))
			if err != nil {
				f.Fatal(err)
			}
			stored := e.EncodeAll(plain, nil)
			f.Add(stored, uint32(1))
			f.Add(e.EncodeAll(plain[:min(300, len(plain))], stored), uint32(10_000))
		}
	}
	f.Fuzz(func(t *testing.T, stored []byte, every uint32) {
		d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(4<<20), zstd.WithDecoderMaxWindow(4<<20))
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		var pieces []piece
		r := New(bytes.NewReader(stored), d, func(Frame) error { return nil })
		r.Cut(NewCutter(1+int64(every), 1+int64(every), func(s index.Span, state []byte) error {
			pieces = append(pieces, piece{s, bytes.Clone(state)})
			return nil
		}))
		plain, err := io.ReadAll(io.LimitReader(r, 8<<20))
		if err == nil && len(plain) < 8<<20 && r.Whole() == nil {
			check(t, stored, plain, pieces)
		}
	})
}
