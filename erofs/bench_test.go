package erofs

import (
	"bytes"
	"fmt"
	"io"
	"testing"

	"github.com/shale-image/shale/index"
)

// hundredThousand is a tree of 100,000 files of one or two chunks of 64 KiB in
// 2,000 directories, as a distribution has them.
func hundredThousand() *world {
	w := newWorld(0)
	block := uint32(0)
	for i := range 2000 {
		d := dir()
		w.tree.Root.Children[fmt.Sprintf("directory-%d", i)] = d
		for k := range 50 {
			f := w.file(70000)
			for off := int64(0); off < f.Size; off += 65536 {
				f.Extents = append(f.Extents, index.Extent{Off: off, Chunk: uint32(len(w.locs))})
				w.tree.Chunks = append(w.tree.Chunks, index.Chunk{Size: uint32(min(65536, f.Size-off))})
				w.locs = append(w.locs, Location{Device: 1, Block: block})
				block += 16
			}
			d.Children[fmt.Sprintf("file-name-%d.ext", k)] = f
		}
	}
	return w
}

func BenchmarkWrite100k(b *testing.B) {
	w := hundredThousand()
	o := Options{Devices: []Device{{Blocks: 1 << 30}}, Locate: func(c uint32) Location { return w.locs[c] }, Checksum: true}
	b.ReportAllocs()
	for b.Loop() {
		l, err := NewLayout(&w.tree, o)
		if err != nil {
			b.Fatal(err)
		}
		n, err := l.WriteTo(io.Discard)
		if err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(n)/(1<<20), "MiB")
	}
}

func BenchmarkRead100k(b *testing.B) {
	w := hundredThousand()
	o := Options{Devices: []Device{{Blocks: 1 << 30}}, Locate: func(c uint32) Location { return w.locs[c] }, Checksum: true}
	l, err := NewLayout(&w.tree, o)
	if err != nil {
		b.Fatal(err)
	}
	var img bytes.Buffer
	l.WriteTo(&img)
	b.ReportAllocs()
	for b.Loop() {
		if err := readAll(img.Bytes(), Limits{}); err != nil {
			b.Fatal(err)
		}
	}
}
