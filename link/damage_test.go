package link

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"lukechampine.com/blake3"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/erofs"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/pool"
)

// Any byte of info and map changed, any length: refused. meta is checked by
// Verify.
func TestDamage(t *testing.T) {
	p, dir := openPool(t), filepath.Join(t.TempDir(), "im")
	some(0, 4).link(t, p, dir)
	for _, name := range []string{"info", "map", "meta"} {
		path := filepath.Join(dir, name)
		good, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		try := func(b []byte, how string, at int) {
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
			im, err := Open(dir)
			if err == nil {
				err = errors.Join(im.Verify(), im.Close())
			}
			if !errors.Is(err, index.ErrCorrupt) && !errors.Is(err, index.ErrUnsupported) || !strings.Contains(err.Error(), dir) {
				t.Fatalf("%s %s at %d: %v", name, how, at, err)
			}
		}
		step := max(1, len(good)/1000)
		for at := 0; at < len(good); at += step {
			b := bytes.Clone(good)
			b[at] ^= 1 << (at % 8)
			try(b, "flipped", at)
			try(good[:at], "cut", at)
		}
		try(append(good, 0), "longer", 0)
		if err := os.WriteFile(path, good, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if im, err := Open(dir); err != nil || im.Verify() != nil {
		t.Error(err)
	}
}

// A closed image can still be asked: it just has no metadata.
func TestClosed(t *testing.T) {
	im := some(0, 4).link(t, openPool(t), filepath.Join(t.TempDir(), "im"))
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	runtime.GC()
	if im.Chunks() != 4 || im.Find(im.FlatSize-1) > 4 || im.Chunk(3).Size == 0 {
		t.Error("the map changed")
	}
	if _, err := im.Meta().ReadAt(make([]byte, 1), 0); !errors.Is(err, os.ErrClosed) {
		t.Error(err)
	}
}

// FuzzMap: whatever a map with right checksums says, what is accepted is in
// bounds.
func FuzzMap(f *testing.F) {
	info := &Info{Blobs: make([]Blob, 2), MetaSize: 4096, FlatSize: 20 * chunk.Block,
		Segments: []Segment{{ID: 1, Flat: chunk.Block, Size: 8 * chunk.Block}, {ID: 2, Flat: 10 * chunk.Block, Size: 10 * chunk.Block}}}
	good := seedMap()
	if _, _, _, err := parse(good, info); err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(good[:mapHeader])
	f.Fuzz(func(t *testing.T, b []byte) {
		parseMap(b, info, [32]byte{})
		if len(b) >= mapHeader {
			clear(b[infoSumAt:mapHeader])
		}
		records, spans, proofs, err := parse(b, info)
		if err != nil {
			if !errors.Is(err, index.ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		im := &Image{Info: *info, records: records, spans: spans, proofs: proofs}
		end := info.MetaSize
		for i := range im.Chunks() {
			c := im.Chunk(i)
			if c.Flat < end || c.Blob >= 2 || c.Size == 0 || c.Size > chunk.MaxSize || c.Offset < 0 || c.Span >= im.Spans() {
				t.Fatalf("record %d: %+v", i, c)
			}
			at := im.Stored(c)
			if s, blob := im.Span(at.First); blob != c.Blob || s.Start > c.Offset || s.End() <= c.Offset || !at.Has(c) || at.Offset < 0 || at.Length <= 0 ||
				at.Offset > math.MaxInt64-at.Length || im.StoredShare(c) < 0 {
				t.Fatalf("record %d: %+v in %+v, stored %+v", i, c, s, at)
			}
			if s, blob := im.Span(at.Last); blob != c.Blob || s.End() < c.End() || s.Start >= c.End() {
				t.Fatalf("record %d: %+v ends in %+v", i, c, s)
			}
			if end = c.Flat + int64(c.Size); end > info.FlatSize || c.Flat < 10*chunk.Block && end > 9*chunk.Block {
				t.Fatalf("record %d leaves its segment", i)
			}
			if im.Find(c.Flat) != i || im.Find(end-1) != i {
				t.Fatalf("record %d is not found", i)
			}
		}
	})
}

// parse parses a map without its checksum.
func parse(b []byte, info *Info) (records, spans, proofs []byte, err error) {
	sum := blake3.Sum256(b)
	return parseMap(append(b[:len(b):len(b)], sum[:]...), info, [32]byte{})
}

// seedMap is a good map, but for its checksum: two chunks, one of them across
// two spans, of the spans of two blobs, the first with a proof.
func seedMap() []byte {
	b := make([]byte, mapHeader+2*mapRecord+4*mapSpan+mapProof)
	le := binary.LittleEndian
	copy(b, mapMagic)
	le.PutUint32(b[8:], 2)
	le.PutUint32(b[12:], 4)
	le.PutUint32(b[16:], 1)
	le.PutUint32(b[mapHeader+2*mapRecord+52:], 1)
	for i, flat := range []uint64{chunk.Block, 10 * chunk.Block} {
		r := b[mapHeader+i*mapRecord:]
		le.PutUint64(r, flat)
		le.PutUint64(r[8:], uint64(90*i))
		le.PutUint32(r[16:], 50)
		le.PutUint16(r[24:], uint16(i))
		le.PutUint32(r[20:], uint32(i))
		r[26] = byte(chunk.BLAKE3)
	}
	for i, s := range []struct {
		start, size, off, length, blob int
		codec                          chunk.Codec
	}{{0, 100, 0, 100, 0, chunk.None}, {0, 100, 10, 60, 1, chunk.Zstd}, {100, 100, 80, 60, 1, chunk.Gzip}, {200, 100, 139, 60, 1, chunk.Gzip}} {
		r := b[mapHeader+2*mapRecord+i*mapSpan:]
		for k, v := range []int{s.start, s.size, s.off, s.length} {
			le.PutUint64(r[8*k:], uint64(v))
		}
		le.PutUint16(r[44:], uint16(s.blob))
		r[48] = byte(s.codec)
		if i == 3 {
			r[49] = 3
			le.PutUint32(r[40:], 1000)
			le.PutUint64(r[32:], 500)
		}
	}
	return b
}

// A map whose checksum is right is refused all the same if it says what nobody
// could fetch.
func TestHostileMap(t *testing.T) {
	info := &Info{Blobs: []Blob{{"a", 100}, {"b", 199}}, MetaSize: 4096, FlatSize: 20 * chunk.Block,
		Segments: []Segment{{ID: 1, Flat: chunk.Block, Size: 8 * chunk.Block}, {ID: 2, Flat: 10 * chunk.Block, Size: 10 * chunk.Block}}}
	if _, _, _, err := parse(seedMap(), info); err != nil {
		t.Fatal(err)
	}
	const first, second, spans = mapHeader, mapHeader + mapRecord, mapHeader + 2*mapRecord
	for _, c := range []struct {
		what  string
		at, n int
		v     uint64
		text  string
	}{
		{"records", 8, 4, 3, "3 records"},
		{"spans", 12, 4, 1<<32 - 1, "4294967295 spans"},
		{"too many spans", 12, 4, index.MaxImageSpans + 1, "more than 16777216"},
		{"proofs", 16, 4, 1<<32 - 1, "4294967295 proofs"},
		{"proof behind the last", spans + 52, 4, 2, "proof 2 of 1, want 1"},
		{"a proof twice", spans + mapSpan + 52, 4, 1, "proof 1 of 1, want 2"},
		{"flat before a segment", first, 8, 4096 * 3, "flat address"},
		{"flat not at a granule", first, 8, chunk.Block + 1, "flat address"},
		{"flat negative", first, 8, 1 << 63, "flat address"},
		{"flat between segments", first, 8, 9 * chunk.Block, "no segment"},
		{"flat at the other", second, 8, chunk.Block, "flat address"},
		{"offset negative", first + 8, 8, 1<<64 - 1, "of a stream"},
		{"offset far", first + 8, 8, 1<<63 - 1, "of a stream"},
		{"offset behind", first + 8, 8, 51, "of a stream"},
		{"offset in another span", second + 8, 8, 100, "span 1, want 2"},
		{"empty", first + 16, 4, 0, "0 bytes"},
		{"large", first + 16, 4, chunk.MaxSize + 1, "bytes, want"},
		{"larger than the stream", first + 16, 4, 101, "of a stream"},
		{"span", first + 20, 4, 1, "span 1, want 0"},
		{"span far", first + 20, 4, 1<<32 - 1, "want 0"},
		{"blob", first + 24, 2, 2, "blob 2 of 2"},
		{"algorithm", first + 26, 1, 0, "unknown digest"},
		{"span start", spans, 8, 1, "want them at 0"},
		{"span size", spans + mapSpan + 8, 8, 99, "want them at 99"},
		{"span size 0", spans + 8, 8, 0, "0 bytes"},
		{"span size negative", spans + 3*mapSpan + 8, 8, 1 << 63, "of the stream"},
		{"stored beyond the blob", spans + 3*mapSpan + 24, 8, 61, "those before"},
		{"stored before another", spans + 2*mapSpan + 16, 8, 69, "those before"},
		{"stored negative", spans + 16, 8, 1<<64 - 1, "those before"},
		{"stored 0", spans + 24, 8, 0, "0 stored bytes"},
		{"not compressed, and shorter", spans + 24, 8, 99, "stored as 99"},
		{"span of no blob", spans + 3*mapSpan + 44, 2, 2, "blob 2 of 2"},
		{"span of an earlier blob", spans + 3*mapSpan + 44, 2, 0, "after one in 1"},
		{"codec", spans + mapSpan + 48, 1, 6, "codec(6)"},
		{"large lz4", spans + mapSpan + 48, 1, 1 << 7, "codec"},
		{"bits", spans + 3*mapSpan + 49, 1, 8, "8 bits"},
		{"bits of another codec", spans + mapSpan + 49, 1, 1, "1 bits"},
		{"window of another codec", spans + 40, 4, 1, "window"},
		{"window blob", spans + 3*mapSpan + 46, 2, 2, "blob 2 of 2"},
		{"window size", spans + 3*mapSpan + 40, 4, 34 << 10, "a window"},
		{"window offset", spans + 3*mapSpan + 32, 8, 1 << 63, "a window"},
	} {
		b := seedMap()
		var v [8]byte
		binary.LittleEndian.PutUint64(v[:], c.v)
		copy(b[c.at:c.at+c.n], v[:])
		if _, _, _, err := parse(b, info); !errors.Is(err, index.ErrCorrupt) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v, want it to say %q", c.what, err, c.text)
		}
	}
}

// FuzzInfo: an accepted info has an address space that makes sense.
func FuzzInfo(f *testing.F) {
	good, err := json.Marshal(Info{Version: infoVersion, MetaSize: 4096, MetaSum: strings.Repeat("0", 64), FlatSize: 3 * chunk.Block,
		Segments: []Segment{{ID: 1, Flat: 2 * chunk.Block, Size: chunk.Block}}, Blobs: []Blob{{"sha256:", 1}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Fuzz(func(t *testing.T, js []byte) {
		info, err := parseInfo(js)
		if err != nil {
			return
		}
		end := info.MetaSize
		for _, s := range info.Segments {
			if s.Flat < end || s.Size <= 0 || s.Size > pool.MaxSegment || s.Size >= info.Segments[0].Flat {
				t.Fatalf("%+v", info)
			}
			end = s.Flat + s.Size
		}
		if end != info.FlatSize || end <= 0 || end > erofs.BlockSize<<32 {
			t.Fatalf("%+v", info)
		}
	})
}

// BenchmarkLink links 100,000 files of 130,000 chunks: first into an
// empty pool, then again, when the pool knows them all.
func BenchmarkLink(b *testing.B) {
	tree := &index.Tree{Root: directory(), Blobs: make([]index.Blob, 10)} // of chunks that are spans
	for i := range 1000 {
		d := directory()
		tree.Root.Children[fmt.Sprintf("directory-%d", i)] = d
		for k := range 100 {
			f := &index.Inode{Mode: syscall.S_IFREG | 0o644}
			for range 1 + k%10/7 { // 1.3 on average
				n := len(tree.Chunks)
				f.Extents = append(f.Extents, index.Extent{Off: f.Size, Chunk: uint32(n)})
				f.Size += chunk.Size
				tree.Chunks = append(tree.Chunks, index.Chunk{
					Digest: chunk.Sum(chunk.BLAKE3, binary.LittleEndian.AppendUint64(nil, uint64(n))), Size: chunk.Size, Blob: uint32(n % 10),
					Offset: tree.Blobs[n%10].Append(index.Span{Size: chunk.Size, Codec: chunk.Zstd, Length: 30_000, Offset: int64(n) * 30_000}),
				})
			}
			d.Children[fmt.Sprintf("file-name-%d.ext", k)] = f
		}
	}
	if n := len(tree.Chunks); n != 130_000 {
		b.Fatal(n)
	}
	link := func(b *testing.B, p *pool.Pool) {
		dir := filepath.Join(b.TempDir(), "im")
		if err := Link(b.Context(), tree, p, dir); err != nil {
			b.Fatal(err)
		}
	}
	b.Run("first", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			b.StopTimer()
			p := openPool(b)
			b.StartTimer()
			link(b, p)
		}
	})
	p := openPool(b)
	link(b, p)
	b.Run("again", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			link(b, p)
		}
	})
	dir := filepath.Join(b.TempDir(), "im")
	if err := Link(b.Context(), tree, p, dir); err != nil {
		b.Fatal(err)
	}
	b.Run("open", func(b *testing.B) {
		for b.Loop() {
			im, err := Open(dir)
			if err != nil {
				b.Fatal(err)
			}
			im.Close()
		}
	})
	b.Run("verify", func(b *testing.B) {
		im, err := Open(dir)
		if err != nil {
			b.Fatal(err)
		}
		b.SetBytes(im.MetaSize)
		for b.Loop() {
			if err := im.Verify(); err != nil {
				b.Fatal(err)
			}
		}
		im.Close()
	})
	b.Run("references", func(b *testing.B) {
		for b.Loop() {
			if _, err := References(dir); err != nil {
				b.Fatal(err)
			}
		}
	})
}
