package zran

import (
	"bytes"
	"compress/gzip"
	"io"
	"os"
	"testing"

	kgzip "github.com/klauspost/compress/gzip"
)

// benchStream is the gzip file that ZRAN_BENCH names, or one made up. Numbers
// worth comparing come from a real layer.
func benchStream(b *testing.B) []byte {
	if path := os.Getenv("ZRAN_BENCH"); path != "" {
		gz, err := os.ReadFile(path)
		if err != nil {
			b.Fatal(err)
		}
		return gz
	}
	var data []byte
	for _, s := range samples() {
		data = append(data, s...)
	}
	return stdGzip(b, data, 6)
}

func benchmark(b *testing.B, decode func(r io.Reader) (int64, error)) {
	gz := benchStream(b)
	b.ReportAllocs()
	for b.Loop() {
		n, err := decode(bytes.NewReader(gz))
		if err != nil {
			b.Fatal(err)
		}
		b.SetBytes(n)
	}
}

func BenchmarkZran(b *testing.B) {
	benchmark(b, func(r io.Reader) (int64, error) {
		z := NewReader(r, Options{})
		defer z.Close()
		return z.WriteTo(io.Discard)
	})
}

func BenchmarkZranSpan32KiB(b *testing.B) {
	var window [WindowSize]byte
	benchmark(b, func(r io.Reader) (int64, error) {
		z := NewReader(r, Options{Span: 32 << 10, Checkpoint: func(_ Checkpoint, w []byte) error {
			copy(window[:], w)
			return nil
		}})
		defer z.Close()
		return z.WriteTo(io.Discard)
	})
}

func BenchmarkKlauspost(b *testing.B) {
	benchmark(b, func(r io.Reader) (int64, error) {
		z, err := kgzip.NewReader(r)
		if err != nil {
			return 0, err
		}
		return io.Copy(io.Discard, z)
	})
}

func BenchmarkStandard(b *testing.B) {
	benchmark(b, func(r io.Reader) (int64, error) {
		z, err := gzip.NewReader(r)
		if err != nil {
			return 0, err
		}
		return io.Copy(io.Discard, z)
	})
}
