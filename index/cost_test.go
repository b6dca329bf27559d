package index

import (
	"testing"

	"pgregory.net/rapid"

	"github.com/shale-image/shale/chunk"
)

func TestCosts(t *testing.T) {
	// An archive, a layer of gzip with windows in a blob beside it, a zstd frame.
	tree := &Tree{
		Blobs: []Blob{
			{Spans: []Span{{Size: 1000, Offset: 0, Length: 1000}}},
			{Spans: []Span{
				{Size: 100, Offset: 10, Length: 40, Codec: chunk.Gzip},
				{Start: 100, Size: 100, Offset: 50, Length: 50, Codec: chunk.Gzip, Window: Window{Blob: 3, Length: 7}},
				{Start: 200, Size: 100, Offset: 100, Length: 60, Codec: chunk.Gzip, Window: Window{Blob: 3, Length: 9, Offset: 7}},
			}},
			{Spans: []Span{{Size: 5 << 20, Offset: 0, Length: 1 << 20, Codec: chunk.Zstd}}},
			{},
		},
		Chunks: []Chunk{
			{Blob: 0, Size: 100, Offset: 512}, {Blob: 0, Size: 10, Offset: 700},
			{Blob: 1, Size: 50, Offset: 0}, {Blob: 1, Size: 20, Offset: 60},
			{Blob: 1, Size: 60, Offset: 90}, {Blob: 1, Size: 80, Offset: 150}, {Blob: 1, Size: 70, Offset: 230},
			{Blob: 2, Size: 100, Offset: 0}, {Blob: 2, Size: 100, Offset: 1 << 20},
		},
	}
	all := []uint32{0, 1, 2, 3, 4, 5, 6, 7, 8}
	check := func(what string, r Reads, want ...Cost) {
		t.Helper()
		for i, got := range tree.Costs(r) {
			if got != want[i] {
				t.Errorf("%s: blob %d: %+v, want %+v", what, i, got, want[i])
			}
		}
	}
	frame := Cost{Once: 1 << 20, Most: 1 << 20, Read: 1 << 20, Pieces: 1, OneFrame: true}
	gzip := Cost{
		Once:   40 + 50 + 7 + 60 + 9,
		Most:   40 + (40 + 50) + (50 + 60 + 7) + (60 + 9), // both in the first, that across, that across, the last
		Read:   50 + 60 + 7,
		Pieces: 3,
	}
	check("nothing is here", Reads{Chunks: all}, Cost{Once: 110, Most: 110, Read: 100}, gzip, frame, Cost{})
	check("all is here", Reads{Chunks: all, Here: func(int) bool { return true }},
		Cost{Read: 100}, Cost{Read: 117, Pieces: 3}, Cost{Read: 1 << 20, Pieces: 1, OneFrame: true}, Cost{})
	check("what lies across is here", Reads{Chunks: all, Here: func(n int) bool { return n == 4 || n == 5 || n == 8 }},
		Cost{Once: 110, Most: 110, Read: 100}, Cost{Once: 40 + 60 + 9, Most: 40 + 60 + 9, Read: 117, Pieces: 3}, frame, Cost{})
	windows := gzip
	windows.Once, windows.Most, windows.Read = windows.Once-16, windows.Most-16, windows.Read-7
	check("the windows are here", Reads{Chunks: all, Local: func(b uint32) bool { return b == 0 || b == 3 }}, Cost{}, windows, frame, Cost{})
	tree.Blobs[3].Data = []byte{1}
	check("the windows come with the index", Reads{Chunks: all, Local: func(b uint32) bool { return b == 0 }}, Cost{}, windows, frame, Cost{})
	check("one of each", Reads{Chunks: []uint32{1, 3, 7}}, Cost{Once: 10, Most: 10, Read: 10},
		Cost{Once: 40, Most: 40, Read: 40, Pieces: 1}, frame, Cost{})
}

// Of blocks of a zstd frame each has its state, all of which come.
func TestCostsOfStates(t *testing.T) {
	tree := &Tree{
		Blobs: []Blob{{Spans: []Span{
			{Size: 100, Length: 40, Codec: chunk.ZstdBlocks},
			{Start: 100, Size: 100, Offset: 40, Length: 50, Codec: chunk.ZstdBlocks, Window: Window{Blob: 1, Length: 7, Offset: 20}},
			{Start: 200, Size: 100, Offset: 90, Length: 60, Codec: chunk.ZstdBlocks, Window: Window{Blob: 1, Length: 9, Offset: 27}},
		}}, {}},
		Chunks: []Chunk{{Size: 90, Offset: 5}, {Size: 150, Offset: 120}, {Size: 20, Offset: 280}},
	}
	reads := Reads{Chunks: []uint32{0, 1, 2}}
	for _, c := range []struct {
		what   string
		change func()
		want   Cost
	}{
		{"nothing is here", func() {}, Cost{Once: 40 + 50 + 60 + 16, Most: 40 + (110 + 16) + (60 + 9), Read: 110 + 16, Pieces: 3}},
		{"what lies across is", func() { reads.Here = func(n int) bool { return n == 1 } }, Cost{Once: 40 + 60 + 9, Most: 40 + 60 + 9, Read: 110 + 16, Pieces: 3}},
		{"the states are", func() { reads.Here, tree.Blobs[1].Data = nil, []byte{1} }, Cost{Once: 150, Most: 40 + 110 + 60, Read: 110, Pieces: 3}},
		{"one piece", func() { reads.Chunks = []uint32{2} }, Cost{Once: 60, Most: 60, Read: 60, Pieces: 1}},
	} {
		c.change()
		if got := tree.Costs(reads)[0]; got != c.want {
			t.Errorf("%s: %+v, want %+v", c.what, got, c.want)
		}
	}
}

// However a blob is read, chunk by chunk with all that the spans of each decode to,
// that takes no less than Once and no more than Most.
func TestCostsBound(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		tree := draw(t)
		b := &tree.Blobs[0]
		for off := int64(0); off < b.StreamSize(); {
			size := min(b.StreamSize()-off, rapid.Int64Range(1, 500).Draw(t, "size"))
			tree.Chunks = append(tree.Chunks, Chunk{Size: uint32(size), Offset: off})
			off += size
		}
		var all []uint32
		for i := range tree.Chunks {
			all = append(all, uint32(i))
		}
		cost := tree.Costs(Reads{Chunks: all})[0]
		var fetched, most, stored int64
		have := map[uint32]bool{}
		for _, x := range rapid.Permutation(all).Draw(t, "order") {
			if have[x] {
				continue
			}
			c := &tree.Chunks[x]
			cover := b.Cover(c.Offset, c.End())
			_, n := Stored(cover, c.Offset, c.End())
			for _, s := range cover {
				n += int64(s.Window.Length)
			}
			fetched, most = fetched+n, max(most, n)
			from, to := cover[0].Start, cover[len(cover)-1].End()
			if cover[0].Divisible() {
				from = c.Offset
			}
			if cover[len(cover)-1].Divisible() {
				to = c.End()
			}
			for i, o := range tree.Chunks {
				if o.Offset >= from && o.End() <= to {
					have[uint32(i)] = true
				}
			}
		}
		for _, s := range b.Spans {
			stored += s.Length + int64(s.Window.Length)
		}
		if cost.Once != stored || fetched < cost.Once || fetched > cost.Most || most > cost.Read {
			t.Fatalf("%d bytes were fetched, %d at once, of %d stored: %+v", fetched, most, stored, cost)
		}
	})
}
