package zran

import (
	"bytes"
	"compress/gzip"
	"io"
	"math/rand/v2"
	"testing"

	kgzip "github.com/klauspost/compress/gzip"
)

// samples are contents of different kinds by name, each some 150 KB.
func samples() map[string][]byte {
	rnd := rand.New(rand.NewPCG(1, 2))
	const n = 150_000
	noise := make([]byte, n)
	for i := range noise {
		noise[i] = byte(rnd.Uint32())
	}
	words := []byte{}
	for len(words) < n {
		w := noise[rnd.IntN(2000):]
		for _, b := range w[:2+rnd.IntN(9)] {
			words = append(words, 'a'+b%26)
		}
		words = append(words, ' ')
	}
	runs := []byte{}
	for len(runs) < n {
		period := noise[len(runs)%1000:][:1+rnd.IntN(20)]
		runs = append(runs, bytes.Repeat(period, 1+rnd.IntN(200))...)
	}
	far := append(append(bytes.Clone(noise[:WindowSize]), noise[:WindowSize]...), noise[100:WindowSize]...)
	skewed := make([]byte, n)
	for i := range skewed { // long codes
		skewed[i] = byte(rnd.ExpFloat64() * 8)
	}
	mixed := append(append(append(bytes.Clone(words[:70_000]), noise[:70_000]...), make([]byte, 70_000)...), runs[:70_000]...)
	return map[string][]byte{
		"empty": {}, "one byte": {42}, "zeros": make([]byte, n), "noise": noise, "words": words,
		"runs": runs, "far": far, "skewed": skewed, "mixed": mixed,
	}
}

func stdGzip(t testing.TB, data []byte, level int) []byte {
	var b bytes.Buffer
	w, err := gzip.NewWriterLevel(&b, level)
	if err != nil {
		t.Fatal(err)
	}
	w.Write(data)
	w.Close()
	return b.Bytes()
}

func klauspostGzip(t testing.TB, data []byte, level int) []byte {
	var b bytes.Buffer
	w, err := kgzip.NewWriterLevel(&b, level)
	if err != nil {
		t.Fatal(err)
	}
	w.Write(data)
	w.Close()
	return b.Bytes()
}

func TestWriters(t *testing.T) {
	for kind, data := range samples() {
		for level := gzip.HuffmanOnly; level <= 9; level++ {
			verify(t, kind, stdGzip(t, data, level), data)
		}
		for level := kgzip.StatelessCompression; level <= 9; level++ {
			verify(t, kind, klauspostGzip(t, data, level), data)
		}
	}
}

// verify decodes a stream from its start and from each of its checkpoints.
func verify(t testing.TB, what string, gz, want []byte) {
	t.Helper()
	verifySpan(t, what, gz, want, 20_000)
	verifySpan(t, what, gz, want, WindowSize)
}

func verifySpan(t testing.TB, what string, gz, want []byte, span int64) {
	t.Helper()
	var cps []Checkpoint
	var windows [][]byte
	z := NewReader(bytes.NewReader(gz), Options{Span: span, Checkpoint: func(cp Checkpoint, window []byte) error {
		cps = append(cps, cp)
		windows = append(windows, bytes.Clone(window))
		return nil
	}})
	defer z.Close()
	got, err := io.ReadAll(z)
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	if !bytes.Equal(got, want) {
		t.Fatalf("%s: got %d bytes, want %d; they differ", what, len(got), len(want))
	}
	if len(cps) == 0 || cps[0] != (Checkpoint{Member: true}) {
		t.Fatalf("%s: first checkpoint: %v", what, cps)
	}
	for i, cp := range cps {
		in, out := gz, want
		if i+1 < len(cps) {
			next := cps[i+1]
			in = gz[:next.In+int64(next.Bits+7)/8]
			out = want[:next.Out]
		}
		got := make([]byte, len(out[cp.Out:]))
		z, err := Resume(bytes.NewReader(in[cp.In:]), cp, windows[i])
		if err == nil {
			_, err = io.ReadFull(z, got)
			z.Close()
		}
		if err != nil {
			t.Fatalf("%s: checkpoint %d %+v: %v", what, i, cp, err)
		}
		if !bytes.Equal(got, out[cp.Out:]) {
			t.Fatalf("%s: checkpoint %d %+v: other bytes", what, i, cp)
		}
	}
}

// A window has what is copied from it, and nothing else.
func TestSparseWindows(t *testing.T) {
	const at, back, n = 2 * WindowSize, 20_000, 300
	noise := samples()["noise"]
	data := append(bytes.Clone(noise[:at]), noise[at-back:][:n]...)
	data = append(data, noise[at:at+2*WindowSize]...)
	// Blocks end where the writer is flushed, and so a checkpoint is at 2*WindowSize.
	var gz bytes.Buffer
	w, err := gzip.NewWriterLevel(&gz, 9)
	if err != nil {
		t.Fatal(err)
	}
	w.Write(data[:at])
	w.Flush()
	w.Write(data[at:])
	w.Close()
	cp, window := checkpoints(t, gz.Bytes(), at, 1)
	if cp.Out != at || len(window) != WindowSize {
		t.Fatalf("checkpoint at %d with a window of %d, want %d and %d", cp.Out, len(window), at, WindowSize)
	}
	from := WindowSize - back
	if !bytes.Equal(window[from:from+n], data[at-back:][:n]) {
		t.Error("what is copied is not in the window")
	}
	clear(window[from : from+n])
	if k := WindowSize - bytes.Count(window, []byte{0}); k > 100 { // matches of 3 bytes, by chance
		t.Errorf("%d bytes besides are in the window", k)
	}
	verifySpan(t, "sparse", gz.Bytes(), data, at)
}
