package index

import (
	"errors"
	"math"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/shale-image/shale/chunk"
)

// spans are good ones of all kinds: the bits of one lie in the last byte of the
// one before.
func spans() []Span {
	return []Span{
		{Start: 0, Size: 100, Offset: 10, Length: 100},
		{Start: 100, Size: 1000, Offset: 110, Length: 1200, Codec: chunk.Zstd},
		{Start: 1100, Size: chunk.MaxSize, Offset: 2000, Length: 50, Codec: chunk.LZ4},
		{Start: 1100 + chunk.MaxSize, Size: 1 << 40, Offset: 2050, Length: 1 << 40, Codec: chunk.Zstd},
		{Start: 1100 + chunk.MaxSize + 1<<40, Size: 10, Offset: 1<<40 + 2050, Length: 10, Codec: chunk.Gzip},
		{Start: 1110 + chunk.MaxSize + 1<<40, Size: 10, Offset: 1<<40 + 2059, Length: 11, Codec: chunk.Gzip, Bits: 7,
			Window: Window{Blob: 1, Length: maxWindow, Offset: 77}},
	}
}

func TestCheckSpans(t *testing.T) {
	tree := func() *Tree {
		return &Tree{Blobs: []Blob{{Digest: "sha256:a", Size: 1<<40 + 2070, Spans: spans()}, {Digest: "sha256:windows", Size: 9}, {Digest: "sha256:b"}}}
	}
	if err := tree().CheckSpans(); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		what string
		span int
		bad  func(s *Span)
		text string
	}{
		{"a gap in the stream", 1, func(s *Span) { s.Start++ }, "want them at 100"},
		{"an overlap in the stream", 1, func(s *Span) { s.Start-- }, "want them at 100"},
		{"a first one not at 0", 0, func(s *Span) { s.Start = 1 }, "want them at 0"},
		{"empty", 1, func(s *Span) { s.Size = 0 }, "0 bytes"},
		{"of negative size", 1, func(s *Span) { s.Size = -1 }, "-1 bytes"},
		{"beyond all numbers", 5, func(s *Span) { s.Size = math.MaxInt64 - s.Start + 1 }, "of the stream"},
		{"at a negative offset", 0, func(s *Span) { s.Offset = -1 }, "stored bytes at -1"},
		{"at a negative offset, with bits", 0, func(s *Span) { s.Codec, s.Bits, s.Offset = chunk.Gzip, 3, -1 }, "stored bytes at -1"},
		{"before another's stored bytes", 1, func(s *Span) { s.Offset-- }, "those before end at 110"},
		{"in another's byte without bits", 5, func(s *Span) { s.Bits = 0 }, "those before"},
		{"two bytes in another", 5, func(s *Span) { s.Offset-- }, "those before"},
		{"nothing stored", 1, func(s *Span) { s.Length = 0 }, "0 stored bytes"},
		{"of negative length", 1, func(s *Span) { s.Length = -1 }, "-1 stored bytes"},
		{"stored beyond all numbers", 5, func(s *Span) { s.Length = math.MaxInt64 - s.Offset + 1 }, "stored bytes"},
		{"stored beyond the blob", 5, func(s *Span) { s.Length++ }, "of 1099511629846"},
		{"not compressed and shorter", 0, func(s *Span) { s.Length-- }, "100 bytes stored as 99"},
		{"not compressed and longer", 0, func(s *Span) { s.Size = 99 }, "99 bytes stored as 100"},
		{"more than fits into memory", 2, func(s *Span) { s.Length = MaxStored + 1 }, "stored as"},
		{"a stream of LZ4", 3, func(s *Span) { s.Codec = chunk.LZ4 }, "lz4"},
		{"an unknown codec", 1, func(s *Span) { s.Codec = chunk.ZstdBlocks + 1 }, "codec(6)"},
		{"bits of zstd", 1, func(s *Span) { s.Bits = 1 }, "1 bits"},
		{"bits of none", 0, func(s *Span) { s.Bits = 1 }, "1 bits"},
		{"8 bits", 5, func(s *Span) { s.Bits = 8 }, "8 bits"},
		{"a window of zstd", 1, func(s *Span) { s.Window.Length = 1 }, "a window of 1"},
		{"a window's place of zstd", 1, func(s *Span) { s.Window.Offset = 1 }, "a window"},
		{"a window too long", 5, func(s *Span) { s.Window.Length = maxWindow + 1 }, "a window"},
		{"a window before its blob", 5, func(s *Span) { s.Window.Offset = -1 }, "a window"},
		{"a window in no blob", 5, func(s *Span) { s.Window.Blob = 3 }, "blob 3 of 3"},
		{"no window, in no blob", 4, func(s *Span) { s.Window.Blob = 3 }, "blob 3 of 3"},
		{"a proof of gzip", 4, func(s *Span) { s.Proof = &Proof{} }, "stored as gzip"},
		{"a proof of a zstd stream", 1, func(s *Span) { s.Size, s.Proof = chunk.MaxSize+1, &Proof{} }, "stored as zstd"},
		{"more than is proved", 3, func(s *Span) { s.Codec, s.Proof = chunk.Deflate, &Proof{} }, "stored as"},
	} {
		bad := tree()
		c.bad(&bad.Blobs[0].Spans[c.span])
		err := bad.CheckSpans()
		if !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), c.text) || !strings.Contains(err.Error(), "sha256:a") {
			t.Errorf("%s: %v, want it to say %q", c.what, err, c.text)
		}
	}
	unknown := tree() // where a blob ends
	unknown.Blobs[0].Size = 0
	unknown.Blobs[0].Spans[5].Length = 1 << 50
	if err := unknown.CheckSpans(); err != nil {
		t.Error(err)
	}
}

// States lie one behind the other, and are of one blob.
func TestCheckStates(t *testing.T) {
	const state = maxWhole + slack
	tree := func() *Tree {
		return &Tree{Blobs: []Blob{{Digest: "sha256:a", Spans: []Span{
			{Size: 100, Length: 90, Codec: chunk.ZstdBlocks}, // begins with a frame
			{Start: 100, Size: maxWhole, Offset: 90, Length: 1000, Codec: chunk.ZstdBlocks, Window: Window{Blob: 1, Length: state, Offset: 50}},
			{Start: 100 + maxWhole, Size: 10, Offset: 1100, Length: 10, Codec: chunk.Zstd},
			{Start: 110 + maxWhole, Size: 10, Offset: 1110, Length: 10, Codec: chunk.ZstdBlocks, Window: Window{Blob: 1, Length: 3, Offset: 50 + state}},
			{Start: 120 + maxWhole, Size: 10, Offset: 1120, Length: 10, Codec: chunk.ZstdBlocks},
			{Start: 130 + maxWhole, Size: 10, Offset: 1130, Length: 10, Codec: chunk.ZstdBlocks, Window: Window{Blob: 1, Length: 5, Offset: 53 + state}},
		}}, {Digest: "sha256:states"}, {Digest: "sha256:more"}}}
	}
	if err := tree().CheckSpans(); err != nil {
		t.Fatal(err)
	}
	far := tree() // but nothing that cannot be added up
	for i, off := range map[int]int64{1: 0, 3: state, 5: state + 3} {
		far.Blobs[0].Spans[i].Window.Offset = math.MaxInt64 - 3*state + off
	}
	if err := far.CheckSpans(); err != nil {
		t.Error(err)
	}
	for _, c := range []struct {
		what string
		span int
		bad  func(s *Span)
		text string
	}{
		{"large", 5, func(s *Span) { s.Size = maxWhole + 1 }, "1048577 bytes stored as 10, zstd blocks"},
		{"of too many stored bytes", 5, func(s *Span) { s.Length = 20 + MoreStored + 1 }, "10 bytes stored as 65557, zstd blocks"},
		{"with bits", 3, func(s *Span) { s.Bits = 1 }, "zstd blocks with 1 bits"},
		{"with a proof", 3, func(s *Span) { s.Proof = &Proof{} }, "digests of what is stored as zstd blocks"},
		{"a state too long", 5, func(s *Span) { s.Window.Length = 10 + slack + 1 }, "a window of 1035 bytes"},
		{"a state in no blob", 5, func(s *Span) { s.Window.Blob = 3 }, "blob 3 of 3"},
		{"a state before its blob", 1, func(s *Span) { s.Window.Offset = -1 }, "a window"},
		{"a state beyond all numbers", 1, func(s *Span) { s.Window.Offset = math.MaxInt64 - state + 1 }, "a window"},
		{"a state in another blob", 3, func(s *Span) { s.Window.Blob = 2 }, "a window at 1049650 of blob 2, want it at 1049650 of blob 1"},
		{"a state behind a gap", 3, func(s *Span) { s.Window.Offset++ }, "want it at 1049650 of blob 1"},
		{"a state in another one", 3, func(s *Span) { s.Window.Offset-- }, "want it at 1049650 of blob 1"},
		{"a state behind a gap, and a span without", 5, func(s *Span) { s.Window.Offset++ }, "want it at 1049653 of blob 1"},
		{"a window of gzip", 2, func(s *Span) { s.Codec, s.Window = chunk.Gzip, Window{Blob: 2, Length: 9, Offset: 1 << 40} }, "windows of another kind"},
		{"a window of gzip in front", 0, func(s *Span) { s.Codec, s.Window = chunk.Deflate, Window{Blob: 2, Length: 9, Offset: 1 << 40} }, "windows of another kind"},
	} {
		bad := tree()
		c.bad(&bad.Blobs[0].Spans[c.span])
		if err := bad.CheckSpans(); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), c.text) || !strings.Contains(err.Error(), "sha256:a") {
			t.Errorf("%s: %v, want it to say %q", c.what, err, c.text)
		}
	}
}

func TestBeside(t *testing.T) {
	with := func(codec chunk.Codec, windows ...Window) (spans []Span) {
		for _, w := range windows {
			spans = append(spans, Span{Codec: codec, Window: w})
		}
		return spans
	}
	none, a, b, c := Window{}, Window{7, 10, 100}, Window{7, 20, 110}, Window{7, 5, 130}
	for _, x := range []struct {
		what        string
		spans       []Span
		blob        uint32
		off, length int64
	}{
		{"none", with(chunk.ZstdBlocks, none, none), 0, 0, 0},
		{"no spans", nil, 0, 0, 0},
		{"one", with(chunk.ZstdBlocks, b), 7, 110, 20},
		{"all", with(chunk.ZstdBlocks, none, a, b, none, c, none), 7, 100, 35},
		{"two", with(chunk.ZstdBlocks, b, none, c), 7, 110, 25},
		{"the first of gzip", with(chunk.Gzip, a, b, c), 7, 100, 10},
		{"the first of deflate, which has none", with(chunk.Deflate, none, b, c), 0, 0, 0},
	} {
		if blob, off, length := Beside(x.spans); blob != x.blob || off != x.off || length != x.length {
			t.Errorf("%s: %d bytes at %d of blob %d", x.what, length, off, blob)
		}
	}
}

func TestCheckChunk(t *testing.T) {
	tree := &Tree{Blobs: []Blob{{Spans: spans()}, {}}}
	good := Chunk{Digest: chunk.Sum(chunk.SHA256, nil), Size: 200, Offset: 50} // in two spans
	if err := tree.CheckChunk(&good); err != nil {
		t.Fatal(err)
	}
	tree.Blobs[0].Spans[0].Proof = &Proof{}
	origin := Chunk{Digest: chunk.Digest{Algorithm: chunk.Origin}, Size: 50, Offset: 50}
	if err := tree.CheckChunk(&origin); err != nil {
		t.Error(err)
	}
	end := tree.Blobs[0].StreamSize()
	for what, change := range map[string]func(c *Chunk){
		"no digest":                      func(c *Chunk) { c.Digest.Algorithm = 0 },
		"unknown digest":                 func(c *Chunk) { c.Digest.Algorithm = chunk.Origin + 1 },
		"of an origin that has no proof": func(c *Chunk) { c.Digest.Algorithm = chunk.Origin },
		"empty":                          func(c *Chunk) { c.Size = 0 },
		"large":                          func(c *Chunk) { c.Size = chunk.MaxSize + 1 },
		"no blob":                        func(c *Chunk) { c.Blob = 2 },
		"no blob by far":                 func(c *Chunk) { c.Blob = math.MaxUint32 },
		"blob of no stream":              func(c *Chunk) { c.Blob = 1 },
		"negative":                       func(c *Chunk) { c.Offset = -1 },
		"most negative":                  func(c *Chunk) { c.Offset = math.MinInt64 },
		"behind the stream":              func(c *Chunk) { c.Offset = end - 199 },
		"far behind":                     func(c *Chunk) { c.Offset = math.MaxInt64 },
	} {
		c := good
		if change(&c); !errors.Is(tree.CheckChunk(&c), ErrCorrupt) {
			t.Errorf("%s: %v", what, tree.CheckChunk(&c))
		}
	}
	for _, off := range []int64{0, end - 200} {
		c := good
		if c.Offset = off; tree.CheckChunk(&c) != nil {
			t.Errorf("at %d of %d: %v", off, end, tree.CheckChunk(&c))
		}
	}
	many := &Tree{Blobs: make([]Blob, 1)}
	for i := range int64(MaxSpans + 2) {
		many.Blobs[0].Append(Span{Size: 2, Offset: 2 * i, Length: 2})
	}
	for _, c := range []struct {
		off  int64
		size uint32
		ok   bool
	}{{0, 2 * MaxSpans, true}, {1, 2*MaxSpans - 1, true}, {4, 2 * MaxSpans, true}, {1, 2 * MaxSpans, false}, {0, 2*MaxSpans + 1, false}, {3, 2*MaxSpans + 1, false}} {
		err := many.CheckChunk(&Chunk{Digest: good.Digest, Offset: c.off, Size: c.size})
		if (err == nil) != c.ok || !c.ok && (!errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "more than 4096 spans")) {
			t.Errorf("%d bytes at %d of spans of 2: %v", c.size, c.off, err)
		}
	}
}

// draw makes a blob with spans of all kinds.
func draw(t *rapid.T) *Tree {
	tree := &Tree{Blobs: make([]Blob, 2)}
	b := &tree.Blobs[0]
	var at, states int64
	kinds := []chunk.Codec{chunk.None, chunk.Zstd, chunk.LZ4, rapid.SampledFrom([]chunk.Codec{chunk.Gzip, chunk.ZstdBlocks}).Draw(t, "windowed")}
	for _, n := range rapid.SliceOfN(rapid.Int64Range(1, 1000), 1, 20).Draw(t, "sizes") {
		s := Span{Size: n, Offset: at + rapid.Int64Range(0, 3).Draw(t, "gap"), Codec: rapid.SampledFrom(kinds).Draw(t, "codec")}
		if s.Codec == chunk.ZstdBlocks && rapid.Bool().Draw(t, "inside") {
			s.Window = Window{Blob: 1, Length: rapid.Uint32Range(1, 300).Draw(t, "state"), Offset: states}
			states += int64(s.Window.Length)
		}
		if s.Length = rapid.Int64Range(1, 1000).Draw(t, "length"); s.Codec == chunk.None {
			s.Length = n
		}
		at = s.Offset + s.Length
		if got := b.Append(s); got != b.Spans[len(b.Spans)-1].Start || b.StreamSize() != got+n {
			t.Fatalf("appended at %d, stream of %d", got, b.StreamSize())
		}
	}
	if err := tree.CheckSpans(); err != nil {
		t.Fatal(err)
	}
	return tree
}

// Find, Cover and Stored tell what looking at every byte does.
func TestCover(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := &draw(t).Blobs[0]
		size := b.StreamSize()
		var of []int // spans by byte
		for i, s := range b.Spans {
			for range s.Size {
				of = append(of, i)
			}
		}
		of = append(of, len(b.Spans))
		from := rapid.Int64Range(0, size-1).Draw(t, "from")
		to := rapid.Int64Range(from+1, size).Draw(t, "to")
		for _, off := range []int64{0, from, to, size} {
			if got := b.Find(off); got != of[off] {
				t.Fatalf("offset %d is in span %d, want %d", off, got, of[off])
			}
		}
		cover := b.Cover(from, to)
		if len(cover) != of[to-1]-of[from]+1 || cover[0] != b.Spans[of[from]] {
			t.Fatalf("%d to %d is in %v", from, to, cover)
		}
		first, end := int64(math.MaxInt64), int64(0)
		for _, s := range cover {
			lo, hi := s.Offset, s.Offset+s.Length
			if s.Codec == chunk.None {
				lo += max(0, from-s.Start)
				hi -= max(0, s.End()-to)
			}
			first, end = min(first, lo), max(end, hi)
		}
		if off, n := Stored(cover, from, to); off != first || off+n != end {
			t.Fatalf("%d to %d is stored in %d bytes at %d, want %d at %d", from, to, n, off, end-first, first)
		}
	})
}

// What all chunks cost is what is stored, but for rounding.
func TestStoredShare(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		tree := draw(t)
		b := &tree.Blobs[0]
		var want, got, pieces int64
		for _, s := range b.Spans {
			want += s.Length
		}
		for off := int64(0); off < b.StreamSize(); {
			c := Chunk{Size: uint32(min(b.StreamSize()-off, rapid.Int64Range(1, 500).Draw(t, "chunk"))), Offset: off}
			share := tree.StoredShare(&c)
			if share < 0 {
				t.Fatalf("%+v costs %d bytes", c, share)
			}
			got += share
			off = c.End()
			pieces += int64(len(b.Cover(c.Offset, off)))
		}
		if got > want || got < want-pieces {
			t.Fatalf("all chunks cost %d bytes, want %d, at most %d less", got, want, pieces)
		}
	})
}

func TestWhole(t *testing.T) {
	for _, c := range []struct {
		codec chunk.Codec
		size  int64
		want  bool
	}{{chunk.None, 5, false}, {chunk.Zstd, 1, true}, {chunk.Zstd, 1 << 20, true}, {chunk.Zstd, 1<<20 + 1, false},
		{chunk.LZ4, chunk.MaxSize, true}, {chunk.LZ4, chunk.MaxSize + 1, false}, {chunk.Gzip, 5, false},
		{chunk.ZstdBlocks, 1 << 20, true}, {chunk.ZstdBlocks, 1<<20 + 1, false}} {
		if s := (Span{Codec: c.codec, Size: c.size}); s.Whole() != c.want {
			t.Errorf("%+v: %v", s, s.Whole())
		}
	}
	if b := (Blob{}); b.StreamSize() != 0 || b.Find(0) != 0 || len(b.Cover(0, 0)) != 0 {
		t.Error("a blob without a stream has one")
	}
}
