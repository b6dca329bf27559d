package stream

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// TestZstdWindow reads a span of two frames, the second with a large window: room is
// asked for before that is decoded, and it does not pass the limit.
func TestZstdWindow(t *testing.T) {
	data := make([]byte, 3<<20)
	rand.NewChaCha8([32]byte{}).Read(data[:len(data)/2])
	var stored []byte
	for i, window := range []int{1 << 20, 32 << 20} {
		var b bytes.Buffer
		w, err := zstd.NewWriter(&b, zstd.WithWindowSize(window), zstd.WithEncoderConcurrency(1))
		if err != nil {
			t.Fatal(err)
		}
		part := [][]byte{data[:10_000], data[10_000:]}[i]
		for len(part) > 0 { // in pieces, or the frame is one segment
			n := min(len(part), 5000)
			w.Write(part[:n])
			part = part[n:]
		}
		w.Close()
		stored = append(stored, b.Bytes()...)
	}
	spans := []index.Span{{Size: int64(len(data)), Length: int64(len(stored)), Codec: chunk.Zstd}}
	read := func(o Options) ([]byte, error) {
		r, err := o.NewReader(bytes.NewReader(stored), spans, 0, int64(len(data)), nil)
		if err != nil {
			return nil, err
		}
		defer r.Close()
		p, err := r.Next(len(data))
		return bytes.Clone(p), err
	}
	var asked []int64
	room := func(n int64) error { asked = append(asked, n); return nil }
	if p, err := read(Options{Room: room}); err != nil || !bytes.Equal(p, data) {
		t.Errorf("%d bytes, %v", len(p), err)
	}
	if most := Memory(spans); len(asked) != 1 || asked[0] < 32<<20 || asked[0] > 33<<20 || most > 1<<20 {
		t.Errorf("asked for %d, beside %d", asked, most)
	}
	for _, limit := range []int64{16 << 20, 32<<20 - 1} {
		if _, err := read(Options{Window: limit}); !errors.Is(err, index.ErrLimit) || errors.Is(err, chunk.ErrCorrupt) || !strings.Contains(err.Error(), "33554432 bytes") || !strings.Contains(err.Error(), "(Window)") {
			t.Errorf("at most %d: %v", limit, err)
		}
	}
	if p, err := read(Options{Window: 32 << 20}); err != nil || !bytes.Equal(p, data) {
		t.Errorf("%d bytes, %v", len(p), err)
	}
	none := errors.New("nothing is left")
	if _, err := read(Options{Room: func(int64) error { return none }}); err != none {
		t.Error("no room:", err)
	}
	// Damage is damage still.
	bad := slices.Clone(stored)
	stored = bad
	bad[len(bad)/2] ^= 0x55
	if p, err := read(Options{}); err == nil && bytes.Equal(p, data) {
		t.Error("damage is not seen")
	} else if err != nil && !errors.Is(err, chunk.ErrCorrupt) {
		t.Error(err)
	}
}
