package zframe

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// piece is a span with its state.
type piece struct {
	index.Span
	state []byte
}

// cut reads a stream, and returns its content and its spans.
func cut(t testing.TB, stored []byte, every int64) (plain []byte, pieces []piece, err error) {
	t.Helper()
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true))
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	r := New(bytes.NewReader(stored), d, func(Frame) error { return nil })
	r.Cut(NewCutter(every, every, func(s index.Span, state []byte) error {
		pieces = append(pieces, piece{s, bytes.Clone(state)})
		return nil
	}))
	if plain, err = io.ReadAll(r); err != nil {
		t.Fatal(err)
	}
	return plain, pieces, r.Whole()
}

// check decodes each span by itself.
func check(t testing.TB, stored, plain []byte, pieces []piece) {
	t.Helper()
	at, offset := int64(0), int64(0)
	for i, p := range pieces {
		if p.Start != at || p.Size <= 0 || p.Offset < offset || (p.state != nil) && p.Codec != chunk.ZstdBlocks {
			t.Fatalf("span %d is %+v behind %d, %d", i, p.Span, at, offset)
		}
		at, offset = p.End(), p.Offset+p.Length
		got := make([]byte, p.Size)
		if err := Decode(got, stored[p.Offset:offset], p.state); err != nil {
			t.Fatalf("span %d of %d, %+v: %v", i, len(pieces), p.Span, err)
		}
		if !bytes.Equal(got, plain[p.Start:at]) {
			t.Fatalf("span %d of %d, %+v: wrong content", i, len(pieces), p.Span)
		}
	}
	if at != int64(len(plain)) {
		t.Errorf("spans of %d bytes, want %d", at, len(plain))
	}
}

// samples are of the kinds of content that make encoders do different things.
func samples(n int) map[string][]byte {
	r := rand.New(rand.NewPCG(1, 2))
	noise := make([]byte, n)
	rand.NewChaCha8([32]byte{1}).Read(noise)
	words := make([][]byte, 3000)
	for i := range words {
		words[i] = fmt.Appendf(nil, "%x ", r.Uint64()>>(4*r.IntN(14)))
	}
	var text []byte
	for len(text) < n {
		text = append(text, words[int(r.ExpFloat64()*200)%len(words)]...)
	}
	var mixed []byte
	for len(mixed) < n { // what was before comes again, from near and far
		k := 1 + r.IntN(3000)
		switch from := r.IntN(len(mixed) + 1); {
		case r.IntN(3) == 0 || len(mixed) < k:
			mixed = append(mixed, noise[r.IntN(n-k):][:k]...)
		case r.IntN(8) == 0:
			mixed = append(mixed, make([]byte, k*20)...)
		case r.IntN(2) == 0:
			mixed = append(mixed, text[from:min(from+k, len(text))]...)
		default:
			mixed = append(mixed, mixed[from:min(from+k, len(mixed))]...)
		}
	}
	return map[string][]byte{"noise": noise, "text": text[:n], "mixed": mixed[:n], "zeros": make([]byte, n), "one": []byte("x"), "empty": {}}
}

// TestSpans has each span decode by itself to what it is in the whole.
func TestSpans(t *testing.T) {
	var program []string
	if _, err := exec.LookPath("zstd"); err != nil {
		t.Log("zstd(1) is not here")
	} else {
		program = []string{"-1", "-3", "-9", "-19", "--ultra -22", "--fast=5", "-3 --long=24", "-3 --no-check", "-3 -B100000 -T2"}
	}
	for kind, plain := range samples(3 << 20) {
		for _, args := range program {
			t.Run("zstd "+args+" "+kind, func(t *testing.T) {
				t.Parallel()
				cmd := exec.Command("sh", "-c", "zstd -c "+args)
				cmd.Stdin, cmd.Stderr = bytes.NewReader(plain), os.Stderr
				stored, err := cmd.Output()
				if err != nil {
					t.Fatal(err)
				}
				testSpans(t, stored, plain)
			})
		}
		for level := zstd.SpeedFastest; level <= zstd.SpeedBestCompression; level++ {
			t.Run(fmt.Sprint("go ", level, " ", kind), func(t *testing.T) {
				t.Parallel()
				var out bytes.Buffer
				e, err := zstd.NewWriter(&out, zstd.WithEncoderLevel(level), zstd.WithWindowSize(1<<20))
				if err == nil {
					_, err = e.Write(plain)
				}
				if err == nil {
					err = e.Close()
				}
				if err != nil {
					t.Fatal(err)
				}
				testSpans(t, out.Bytes(), plain)
			})
		}
	}
}

func testSpans(t *testing.T, stored, plain []byte) {
	for _, every := range []int64{1, 100_000, 300_000} {
		got, pieces, err := cut(t, stored, every)
		if err != nil || !bytes.Equal(got, plain) {
			t.Fatal(len(got), err)
		}
		if len(plain) > MaxSpan && int64(len(pieces)) < int64(len(plain))/(every+2*MaxBlock) {
			t.Errorf("%d spans", len(pieces))
		}
		check(t, stored, plain, pieces)
	}
}

// TestReal: LAYER=<zstd file> go test -v -run TestReal ./index/zframe
func TestReal(t *testing.T) {
	stored, err := os.ReadFile(os.Getenv("LAYER"))
	if err != nil {
		t.Skip("no LAYER=<file>")
	}
	e, err := zstd.NewWriter(nil, zstd.WithEncoderCRC(false), zstd.WithSingleSegment(true))
	if err != nil {
		t.Fatal(err)
	}
	for _, every := range []int64{1, 64 << 10, 128 << 10, 192 << 10, 256 << 10, 512 << 10} {
		plain, pieces, err := cut(t, stored, every)
		if err != nil {
			t.Fatal(err)
		}
		check(t, stored, plain, pieces)
		states, kept := 0, 0
		for _, p := range pieces {
			states += len(p.state)
			kept += len(e.EncodeAll(p.state, nil))
		}
		t.Logf("every %d: %d spans of %d, states %d, stored %d = %.1f%%, %d each", every, len(pieces), len(stored)/len(pieces), states, kept, 100*float64(kept)/float64(len(stored)), kept/len(pieces))
	}
}
