package zframe

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"github.com/klauspost/compress/zstd"
)

// stream is two frames with a skippable one before, between and behind them.
func stream(t testing.TB, parts ...[]byte) (stored []byte, at []int64) {
	e, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	skip := []byte{0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3}
	stored = append(stored, skip...)
	for _, p := range parts {
		at = append(at, int64(len(stored)))
		stored = e.EncodeAll(p, stored)
		at = append(at, int64(len(stored)))
		stored = append(stored, skip...)
	}
	return stored, at
}

func library(t testing.TB) *zstd.Decoder {
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(1<<20), zstd.WithDecoderMaxMemory(1<<20))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Close)
	return d
}

func TestFrames(t *testing.T) {
	a, b := bytes.Repeat([]byte("one "), 5000), bytes.Repeat([]byte("two "), 70_000)
	stored, at := stream(t, a, b)
	var got []Frame
	r := New(bytes.NewReader(stored), library(t), func(f Frame) error { got = append(got, f); return nil })
	p, err := io.ReadAll(r)
	if err != nil || !bytes.Equal(p, append(bytes.Clone(a), b...)) {
		t.Fatalf("%d bytes, %v", len(p), err)
	}
	if len(got) != 2 || got[0].Out != 0 || got[0].Offset != at[0] || got[0].Last != 0 ||
		got[1].Out != int64(len(a)) || got[1].Offset != at[2] || got[1].Last != at[1] || r.End() != at[3] {
		t.Errorf("%+v, the last ends at %d; want %d", got, r.End(), at)
	}
	if got[0].Window < int64(len(a)) || got[1].Window < int64(len(b)) || got[1].Window > 1<<20 {
		t.Errorf("windows of %d and %d bytes", got[0].Window, got[1].Window)
	}
	no := errors.New("no")
	if p, err := io.ReadAll(New(bytes.NewReader(stored), library(t), func(f Frame) error {
		if f.Out > 0 {
			return no
		}
		return nil
	})); err != no || len(p) != len(a) {
		t.Errorf("%d bytes, %v", len(p), err)
	}
	for n := range stored { // a stream that ends within a frame says so
		p, err := io.ReadAll(New(bytes.NewReader(stored[:n]), library(t), func(Frame) error { return nil }))
		if whole := int64(n) >= at[3] || int64(n) >= at[1] && int64(n) <= at[2]; err == nil && !whole && int64(n) > at[0] {
			t.Fatalf("%d of %d stored bytes: %d bytes and no error", n, len(stored), len(p))
		}
	}
}

func FuzzFrames(f *testing.F) {
	stored, _ := stream(f, bytes.Repeat([]byte("one "), 500), []byte("two"))
	f.Add(stored)
	f.Add(stored[20:])
	f.Fuzz(func(t *testing.T, p []byte) {
		var last Frame
		r := New(bytes.NewReader(p), library(t), func(f Frame) error {
			if f.Offset < last.Offset || f.Offset >= int64(len(p)) || f.Out < last.Out || f.Last > f.Offset {
				t.Errorf("%+v behind %+v", f, last)
			}
			last = f
			return nil
		})
		n, err := io.Copy(io.Discard, io.LimitReader(r, 1<<20))
		if err == nil && n < last.Out {
			t.Errorf("%d bytes", n)
		}
	})
}
