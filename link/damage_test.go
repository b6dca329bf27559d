package link

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
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
	good := make([]byte, mapHeader+2*mapRecord)
	copy(good, mapMagic)
	binary.LittleEndian.PutUint32(good[8:], 2)
	for i, flat := range []uint64{chunk.Block, 10 * chunk.Block} {
		r := good[mapHeader+i*mapRecord:]
		binary.LittleEndian.PutUint64(r, flat)
		binary.LittleEndian.PutUint32(r[16:], 5)
		binary.LittleEndian.PutUint32(r[20:], 3*chunk.Block)
		r[27] = byte(chunk.BLAKE3)
	}
	f.Add(good)
	f.Add(good[:mapHeader])
	f.Fuzz(func(t *testing.T, b []byte) {
		parseMap(b, info, [32]byte{})
		if len(b) >= mapHeader {
			clear(b[infoSumAt:mapHeader])
		}
		sum := blake3.Sum256(b)
		records, err := parseMap(append(b[:len(b):len(b)], sum[:]...), info, [32]byte{})
		if err != nil {
			return
		}
		im := &Image{Info: *info, records: records}
		end := info.MetaSize
		for i := range im.Chunks() {
			c := im.Chunk(i)
			if c.Flat < end || c.Blob >= 2 || c.Size == 0 || c.Size > chunk.MaxSize || c.Offset < 0 || c.Offset+int64(c.Length) < c.Offset {
				t.Fatalf("record %d: %+v", i, c)
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

// FuzzInfo: an accepted info has an address space that makes sense.
func FuzzInfo(f *testing.F) {
	good, err := json.Marshal(Info{Version: 1, MetaSize: 4096, MetaSum: strings.Repeat("0", 64), FlatSize: 2 * chunk.Block,
		Segments: []Segment{{ID: 1, Flat: chunk.Block, Size: chunk.Block}}, Blobs: []Blob{{"sha256:", 1}}})
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
			if s.Flat < end || s.Size <= 0 || s.Size > pool.MaxSegment {
				t.Fatalf("%+v", info)
			}
			end = s.Flat + s.Size
		}
		if end != info.FlatSize || end <= 0 || end > erofs.BlockSize<<32 {
			t.Fatalf("%+v", info)
		}
	})
}

// BenchmarkLink links 100,000 files of 130,000 chunks of 64 KiB: first into an
// empty pool, then again, when the pool knows them all.
func BenchmarkLink(b *testing.B) {
	tree := &index.Tree{Root: directory(), Blobs: make([]index.Blob, 10)}
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
					Digest: chunk.Sum(chunk.BLAKE3, binary.LittleEndian.AppendUint64(nil, uint64(n))), Size: chunk.Size,
					Codec: chunk.Zstd, Blob: uint32(n % 10), Length: 30_000, Offset: uint64(n) * 30_000,
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
