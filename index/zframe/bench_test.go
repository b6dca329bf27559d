package zframe

import (
	"os"
	"testing"

	"github.com/klauspost/compress/zstd"
)

// BenchmarkDecode decodes spans of text and of a mixture one after the other, BenchmarkWhole
// the frame as the library does, and BenchmarkCut as an index is made.
func BenchmarkDecode(b *testing.B) {
	each(b, func(b *testing.B, stored, plain []byte) {
		_, pieces, err := cut(b, stored, 128<<10)
		if err != nil {
			b.Fatal(err)
		}
		dst := make([]byte, MaxSpan)
		for b.Loop() {
			for _, p := range pieces {
				if err := Decode(dst[:p.Size], stored[p.Offset:][:p.Length], p.state); err != nil {
					b.Fatal(err)
				}
			}
		}
	})
}

func BenchmarkWhole(b *testing.B) {
	each(b, func(b *testing.B, stored, plain []byte) {
		d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1))
		if err != nil {
			b.Fatal(err)
		}
		defer d.Close()
		for b.Loop() {
			if plain, err = d.DecodeAll(stored, plain[:0]); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkCut(b *testing.B) {
	each(b, func(b *testing.B, stored, plain []byte) {
		for b.Loop() {
			if _, _, err := cut(b, stored, 128<<10); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func each(b *testing.B, f func(b *testing.B, stored, plain []byte)) {
	for kind, plain := range samples(8 << 20) {
		if kind != "text" && kind != "mixed" {
			continue
		}
		b.Run(kind, func(b *testing.B) {
			e, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
			if err != nil {
				b.Fatal(err)
			}
			stored := e.EncodeAll(plain, nil)
			b.SetBytes(int64(len(plain)))
			b.ReportMetric(float64(len(plain))/float64(len(stored)), "ratio")
			f(b, stored, plain)
		})
	}
}

// BenchmarkReal: LAYER=<zstd file> go test -run xxx -bench Real ./index/zframe
func BenchmarkReal(b *testing.B) {
	stored, err := os.ReadFile(os.Getenv("LAYER"))
	if err != nil {
		b.Skip("no LAYER=<file>")
	}
	plain, pieces, err := cut(b, stored, 128<<10)
	if err != nil {
		b.Fatal(err)
	}
	dst := make([]byte, MaxSpan)
	b.Run("decode", func(b *testing.B) {
		b.SetBytes(int64(len(plain)))
		for b.Loop() {
			for _, p := range pieces {
				if err := Decode(dst[:p.Size], stored[p.Offset:][:p.Length], p.state); err != nil {
					b.Fatal(err)
				}
			}
		}
	})
	b.Run("whole", func(b *testing.B) {
		d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1))
		if err != nil {
			b.Fatal(err)
		}
		defer d.Close()
		b.SetBytes(int64(len(plain)))
		for b.Loop() {
			if plain, err = d.DecodeAll(stored, plain[:0]); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("cut", func(b *testing.B) {
		b.SetBytes(int64(len(plain)))
		for b.Loop() {
			if _, _, err := cut(b, stored, 128<<10); err != nil {
				b.Fatal(err)
			}
		}
	})
}
