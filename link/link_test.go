package link

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/pool"
)

// What the map says is what the index says, by flat address; new places are in
// the order of blob and offset, whatever the order of chunks and files.
func TestMapRoundTrip(t *testing.T) {
	w, p := newWorld(3), openPool(t)
	var cs []uint32
	for i := range 60 {
		cs = append(cs, w.chunk(uint32(i%3), uint64(i), 1+i*1500%chunk.Size))
	}
	w.rnd.Shuffle(len(cs), func(i, j int) { cs[i], cs[j] = cs[j], cs[i] })
	for i := range 20 {
		w.file(fmt.Sprint("f", i), cs[3*i:3*i+3]...)
	}
	unused := w.chunk(1, 999, 5000)
	im := w.link(t, p, filepath.Join(t.TempDir(), "im"))
	if im.Chunks() != 60 || len(im.Segments) != 1 || !sameBlobs(im, w.tree) {
		t.Fatalf("%d chunks, info %+v", im.Chunks(), im.Info)
	}
	byDigest := map[chunk.Digest]index.Chunk{}
	for i, c := range w.tree.Chunks {
		if uint32(i) != unused {
			byDigest[c.Digest] = c
		}
	}
	end := im.Segments[0].Flat
	for i := range im.Chunks() {
		c := im.Chunk(i)
		want := byDigest[c.Digest]
		got := index.Chunk{Digest: c.Digest, Size: c.Size, Blob: uint32(c.Blob), Offset: c.Offset}
		if got != want {
			t.Errorf("record %d: %+v, want %+v", i, got, want)
		}
		if c.Flat != end {
			t.Errorf("record %d is at %d, want %d", i, c.Flat, end)
		}
		end += (int64(c.Size) + chunk.Block - 1) &^ (chunk.Block - 1)
		if i > 0 {
			if b := im.Chunk(i - 1); b.Blob > c.Blob || b.Blob == c.Blob && b.Offset >= c.Offset {
				t.Errorf("record %d lies before record %d in its blob", i, i-1)
			}
		}
		for flat, want := range map[int64]int{c.Flat - 1: i, c.Flat: i, c.Flat + int64(c.Size) - 1: i, c.Flat + int64(c.Size): i + 1} {
			if flat == c.Flat-1 && i > 0 && c.Flat == im.Chunk(i-1).Flat+int64(im.Chunk(i-1).Size) {
				want = i - 1
			}
			if got := im.Find(flat); got != want {
				t.Errorf("find %d: record %d, want %d", flat, got, want)
			}
		}
	}
	if end != im.FlatSize {
		t.Errorf("flat addresses end at %d, not %d", end, im.FlatSize)
	}
}

// sameBlobs tells whether an image has the blobs of a tree, and their spans.
func sameBlobs(im *Image, t *index.Tree) bool {
	n := 0
	for i, b := range t.Blobs {
		if i >= len(im.Blobs) || im.Blobs[i] != (Blob{b.Digest, b.Size}) || n+len(b.Spans) > im.Spans() {
			return false
		}
		for _, want := range b.Spans {
			if s, blob := im.Span(n); !reflect.DeepEqual(s, want) || blob != i {
				return false
			}
			n++
		}
	}
	return len(im.Blobs) == len(t.Blobs) && im.Spans() == n
}

// randomSpans gives a blob spans of all kinds, with gaps between their bytes.
func randomSpans(r *rand.Rand, b *index.Blob, blobs int) {
	var at int64
	windowed := []chunk.Codec{chunk.Gzip, chunk.Deflate}
	if r.IntN(2) == 0 {
		windowed = []chunk.Codec{chunk.ZstdBlocks}
	}
	kinds := append([]chunk.Codec{chunk.None, chunk.Zstd, chunk.LZ4}, windowed...)
	state := index.Window{Blob: uint32(r.IntN(blobs)), Offset: r.Int64N(1 << 40)}
	for n := 1 + r.IntN(40); n > 0; n-- {
		if r.IntN(3) == 0 {
			at += r.Int64N(1000)
		}
		s := index.Span{Size: 1 + r.Int64N(3000), Offset: at, Codec: kinds[r.IntN(len(kinds))]}
		s.Length = 1 + r.Int64N(s.Size)
		switch {
		case s.Codec == chunk.None:
			s.Length = s.Size
		case s.Codec == chunk.Zstd && r.IntN(4) == 0:
			s.Size += chunk.MaxSize // a stream
		case s.Codec == chunk.ZstdBlocks && r.IntN(3) > 0:
			state.Offset, state.Length = state.Offset+int64(state.Length), 1+r.Uint32N(uint32(s.Size)+1<<10)
			s.Window = state
		case s.Inflated():
			if len(b.Spans) > 0 && b.Spans[len(b.Spans)-1].Inflated() && r.IntN(2) == 0 && at == end(b) {
				s.Bits, s.Offset, s.Length = uint8(1+r.IntN(7)), s.Offset-1, s.Length+1
			}
			s.Window = index.Window{Blob: uint32(r.IntN(blobs)), Length: r.Uint32N(20000), Offset: r.Int64N(1 << 40)}
		}
		if (s.Codec == chunk.None || s.Codec == chunk.Deflate) && r.IntN(2) == 0 {
			s.Proof = &index.Proof{Stored: [32]byte{1: byte(n)}, Window: [32]byte{31: byte(n)}}
		}
		at = s.Offset + s.Length
		b.Append(s)
	}
	b.Size = at + r.Int64N(5)
}

func end(b *index.Blob) int64 {
	s := b.Spans[len(b.Spans)-1]
	return s.Offset + s.Length
}

// Whatever spans and chunks there are: an image tells of them what the index
// does.
func TestSpans(t *testing.T) {
	for seed := range uint64(15) {
		r := rand.New(rand.NewPCG(seed, 5))
		w, p := newWorld(4), openPool(t)
		for i := range 3 { // the last one has none: it keeps windows only
			b := &w.tree.Blobs[i]
			randomSpans(r, b, 4)
			size := b.StreamSize()
			for k := range 60 {
				n := min(1+r.Int64N(1<<(1+r.IntN(14))), size)
				c := index.Chunk{Size: uint32(n), Blob: uint32(i), Offset: r.Int64N(size - n + 1)}
				c.Digest = chunk.Sum(chunk.SHA256, fmt.Append(nil, i, k))
				w.tree.Chunks = append(w.tree.Chunks, c)
				w.file(fmt.Sprintf("%d.%d", i, k), uint32(len(w.tree.Chunks)-1))
			}
		}
		im := w.link(t, p, filepath.Join(t.TempDir(), "im"))
		if im.Chunks() != 180 || !sameBlobs(im, w.tree) {
			t.Fatalf("%d chunks, blobs %v", im.Chunks(), im.Blobs)
		}
		for i := range im.Chunks() {
			c := im.Chunk(i)
			b := &w.tree.Blobs[c.Blob]
			cover := b.Cover(c.Offset, c.End())
			if s, blob := im.Span(c.Span); blob != c.Blob || !reflect.DeepEqual(s, cover[0]) {
				t.Fatalf("record %d: span %d of blob %d is %+v, want %+v", i, c.Span, c.Blob, s, cover[0])
			}
			all := im.Stored(c)
			if off, n := index.Stored(cover, c.Offset, c.End()); all.Offset != off || all.Length != n || all.Blob != c.Blob ||
				all.Last-all.First != len(cover)-1 || all.First != c.Span || !all.Has(c) {
				t.Fatalf("record %d: stored %+v, want %d bytes at %d", i, all, n, off)
			}
			if len(cover) == 1 && im.StoredShare(c) > cover[0].Length {
				t.Fatalf("record %d: %d bytes of %+v", i, im.StoredShare(c), cover[0])
			}
			last := c
			for k := i + 1; k < im.Chunks() && im.Chunk(k).Blob == c.Blob; k++ {
				d := im.Chunk(k)
				if d.End() <= last.End() {
					continue
				}
				last = d
				all.Extend(im.Stored(d))
				cover := b.Cover(c.Offset, d.End())
				if off, n := index.Stored(cover, c.Offset, d.End()); all.Offset != off || all.Length != n || all.Last-all.First != len(cover)-1 {
					t.Fatalf("records %d to %d: stored %+v, want %d bytes at %d", i, k, all, n, off)
				}
			}
			for k := range im.Chunks() {
				d := im.Chunk(k)
				if d.Blob != c.Blob {
					continue
				}
				at := im.Stored(d)
				inside := at.First >= all.First && at.Last <= all.Last && at.Offset >= all.Offset && at.Offset+at.Length <= all.Offset+all.Length
				if all.Has(d) != inside {
					t.Fatalf("record %d, stored as %+v, in %+v: %v, want %v", k, at, all, all.Has(d), inside)
				}
			}
		}
	}
}

// TestManySpans: the spans of a chunk are found that lies in as many as it may, also where
// those of another blob follow.
func TestManySpans(t *testing.T) {
	w, p := newWorld(2), openPool(t)
	for i := range w.tree.Blobs {
		for k := range int64(index.MaxSpans + 2) {
			w.tree.Blobs[i].Append(index.Span{Size: 2, Length: 2, Offset: 2 * k})
		}
		for off := range int64(5) {
			c := index.Chunk{Digest: chunk.Sum(chunk.SHA256, fmt.Append(nil, i, off)), Size: 2*index.MaxSpans - uint32(off%2), Blob: uint32(i), Offset: off}
			w.tree.Chunks = append(w.tree.Chunks, c)
			w.file(fmt.Sprint(i, off), uint32(len(w.tree.Chunks)-1))
		}
	}
	im := w.link(t, p, filepath.Join(t.TempDir(), "im"))
	for i := range im.Chunks() {
		c := im.Chunk(i)
		first := c.Blob*(index.MaxSpans+2) + int(c.Offset/2)
		if s := im.Stored(c); s.First != first || s.Last != first+index.MaxSpans-1 || s.Length != int64(c.Size) {
			t.Errorf("%d bytes at %d of blob %d are in %+v", c.Size, c.Offset, c.Blob, s)
		}
	}
}

func TestFlags(t *testing.T) {
	w, p := newWorld(1), openPool(t)
	var c []uint32
	for i := range 8 {
		c = append(c, w.chunk(0, uint64(i), 1000))
	}
	w.file("a", c[0], c[1], c[2])
	w.file("b", c[3])
	w.file("c", c[4], c[6]) // 6 does not continue what is stored before it
	w.file("d", c[5], c[1]) // nor does 1 here, but in a
	w.file("e", c[7])
	im := w.link(t, p, filepath.Join(t.TempDir(), "im"))
	want := []bool{false, true, true, false, false, false, false, false}
	if got := flags(im); !slices.Equal(got, want) {
		t.Errorf("next %v, want %v", got, want)
	}
}

// Two images share what they have in common; a third has nothing new.
func TestShared(t *testing.T) {
	p, dir := openPool(t), t.TempDir()
	a, b := newWorld(1), newWorld(2)
	for i := range 10 {
		a.file(fmt.Sprint(i), a.chunk(0, uint64(i), 20_000))
		b.file(fmt.Sprint(i), b.chunk(1, uint64(i+5), 20_000))
	}
	x, y := a.link(t, p, filepath.Join(dir, "x")), b.link(t, p, filepath.Join(dir, "y"))
	z := b.link(t, p, filepath.Join(dir, "z"))
	if len(x.Segments) != 1 || len(y.Segments) != 2 || !reflect.DeepEqual(y.Info, z.Info) || p.Usage().Segments != 2 {
		t.Fatalf("segments %v, %v, %v", x.Segments, y.Segments, z.Segments)
	}
	places := map[chunk.Digest]string{}
	at := func(im *Image, c Chunk) string {
		s, off := find(t, p, im, c)
		return fmt.Sprint(s.ID, off)
	}
	for i := range x.Chunks() {
		places[x.Chunk(i).Digest] = at(x, x.Chunk(i))
	}
	shared := 0
	for i := range y.Chunks() {
		c := y.Chunk(i)
		if was, ok := places[c.Digest]; ok {
			if shared++; was != at(y, c) {
				t.Errorf("chunk %s has two places", c.Digest)
			}
		}
		if c.Blob != 1 {
			t.Errorf("chunk %s comes from blob %d of its own image, want 1", c.Digest, c.Blob)
		}
	}
	if shared != 5 {
		t.Errorf("%d chunks are shared, want 5", shared)
	}
}

// Equal chunks of one image have one place and one record.
func TestEqual(t *testing.T) {
	w, p := newWorld(2), openPool(t)
	a, b, other := w.chunk(1, 1, 3000), w.chunk(0, 1, 3000), w.chunk(0, 2, 100)
	w.file("a", a, other)
	w.file("b", b, other, b)
	im := w.link(t, p, filepath.Join(t.TempDir(), "im"))
	if im.Chunks() != 2 {
		t.Fatalf("%d records, want 2", im.Chunks())
	}
	w.fill(t, p, im)
	// One that is known to the pool and one that is not, again equal.
	im = w.link(t, p, filepath.Join(t.TempDir(), "again"))
	if im.Chunks() != 2 || p.Usage().Segments != 1 {
		t.Fatalf("%d records, %d segments", im.Chunks(), p.Usage().Segments)
	}
}

func TestEmptyTree(t *testing.T) {
	w, p := newWorld(0), openPool(t)
	w.tree.Root.Children["hole"] = &index.Inode{Mode: unix.S_IFREG, Size: 1 << 20}
	im := w.link(t, p, filepath.Join(t.TempDir(), "im"))
	if im.Chunks() != 0 || im.FlatSize != im.MetaSize || im.Find(0) != 0 || p.Usage().Segments != 0 {
		t.Errorf("%d chunks, info %+v", im.Chunks(), im.Info)
	}
}

// If Link fails there is nothing, neither the image nor a segment.
func TestFails(t *testing.T) {
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	for name, test := range map[string]struct {
		ctx   context.Context
		spoil func(w *world)
		want  error
	}{
		"canceled":       {canceled, func(*world) {}, context.Canceled},
		"extent":         {nil, func(w *world) { w.file("x", 0).Extents[0].Chunk = 99 }, index.ErrCorrupt},
		"layout":         {nil, func(w *world) { w.file("x", 0).Extents[0].Off = 7 }, index.ErrCorrupt}, // fails when the segment is there
		"blob":           {nil, func(w *world) { w.tree.Chunks[0].Blob = 1 }, index.ErrCorrupt},
		"size":           {nil, func(w *world) { w.tree.Chunks[0].Size = chunk.MaxSize + 1 }, index.ErrCorrupt},
		"empty chunk":    {nil, func(w *world) { w.tree.Chunks[0].Size = 0 }, index.ErrCorrupt},
		"length":         {nil, func(w *world) { w.tree.Blobs[0].Spans[0].Length = math.MaxUint32 }, index.ErrCorrupt},
		"no length":      {nil, func(w *world) { w.tree.Blobs[0].Spans[0].Length = 0 }, index.ErrCorrupt},
		"span offset":    {nil, func(w *world) { w.tree.Blobs[0].Spans[1].Offset = math.MinInt64 }, index.ErrCorrupt},
		"overlap":        {nil, func(w *world) { w.tree.Blobs[0].Spans[1].Offset-- }, index.ErrCorrupt},
		"gap":            {nil, func(w *world) { w.tree.Blobs[0].Spans[1].Start++ }, index.ErrCorrupt},
		"beyond":         {nil, func(w *world) { w.tree.Blobs[0].Size = 100 }, index.ErrCorrupt},
		"window":         {nil, func(w *world) { w.tree.Blobs[0].Spans[0].Window.Length = 1 }, index.ErrCorrupt},
		"codec":          {nil, func(w *world) { w.tree.Blobs[0].Spans[0].Codec = 77 }, index.ErrCorrupt},
		"no spans":       {nil, func(w *world) { w.tree.Blobs[0].Spans = nil }, index.ErrCorrupt},
		"offset":         {nil, func(w *world) { w.tree.Chunks[0].Offset = -1 }, index.ErrCorrupt},
		"far offset":     {nil, func(w *world) { w.tree.Chunks[0].Offset = math.MaxInt64 }, index.ErrCorrupt},
		"out of stream":  {nil, func(w *world) { w.tree.Chunks[1].Offset++ }, index.ErrCorrupt},
		"algorithm":      {nil, func(w *world) { w.tree.Chunks[0].Digest.Algorithm = 0 }, index.ErrCorrupt},
		"two sizes":      {nil, func(w *world) { w.tree.Chunks[1].Digest = w.tree.Chunks[0].Digest }, index.ErrCorrupt},
		"too many blobs": {nil, func(w *world) { w.tree.Blobs = make([]index.Blob, maxBlobs+1) }, index.ErrLimit},
		"a chunk of too many spans": {nil, func(w *world) {
			w.tree.Blobs[0].Spans = nil
			for range 11000 { // what both have
				w.tree.Blobs[0].Append(index.Span{Size: 1, Length: 1, Offset: w.tree.Blobs[0].StreamSize()})
			}
		}, index.ErrCorrupt},
		"too many spans": {nil, func(w *world) {
			spans := make([]index.Span, index.MaxImageSpans/64) // of no blob that anybody looks at
			for range 65 {
				w.tree.Blobs = append(w.tree.Blobs, index.Blob{Spans: spans})
			}
		}, index.ErrLimit},
		"long names": {nil, func(w *world) {
			for i := range 40 {
				w.tree.Blobs = append(w.tree.Blobs, index.Blob{Digest: strings.Repeat("x", 1<<20+i)})
			}
		}, index.ErrLimit},
	} {
		w, p, dir := newWorld(1), openPool(t), t.TempDir()
		w.file("f", w.chunk(0, 1, 5000), w.chunk(0, 2, 6000))
		test.spoil(w)
		if test.ctx == nil {
			test.ctx = t.Context()
		}
		if err := Link(test.ctx, w.tree, p, filepath.Join(dir, "im")); !errors.Is(err, test.want) {
			t.Errorf("%s: %v, want %v", name, err, test.want)
		}
		nothing(t, name, p, dir)
	}
}

func nothing(t *testing.T, name string, p *pool.Pool, dir string) {
	t.Helper()
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 0 || p.Usage().Segments != 0 {
		t.Errorf("%s: left behind: %v, %d segments, %v", name, left, p.Usage().Segments, err)
	}
}

func TestExists(t *testing.T) {
	w, p, dir := newWorld(1), openPool(t), t.TempDir()
	w.file("f", w.chunk(0, 1, 5000))
	if err := Link(t.Context(), w.tree, p, dir); !errors.Is(err, os.ErrExist) {
		t.Error(err)
	}
	nothing(t, "exists", p, dir)
}

// The disk becomes full at any point of Link.
func TestFull(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting a tmpfs needs root")
	}
	mnt := t.TempDir()
	if err := unix.Mount("shale-test", mnt, "tmpfs", 0, "size=4m"); err != nil {
		t.Skipf("cannot mount a tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(mnt, 0); err != nil {
			t.Errorf("unmount: %v", err)
			unix.Unmount(mnt, unix.MNT_DETACH)
		}
	})
	p, err := pool.Open(filepath.Join(mnt, "pool"))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	w := newWorld(1)
	var cs []uint32
	for i := range 500 {
		cs = append(cs, w.chunk(0, uint64(i), 100))
	}
	for i := range 100 {
		w.file(fmt.Sprintf("%0200d", i), cs[i*5:i*5+5]...)
	}
	dir := filepath.Join(mnt, "images")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	ballast := filepath.Join(mnt, "ballast")
	failed := 0
	for spare := int64(0); ; spare += 4096 {
		if spare > 1<<20 {
			t.Fatal("it never fits")
		}
		var st unix.Statfs_t
		if err := unix.Statfs(mnt, &st); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(ballast, make([]byte, int64(st.Bavail)*4096-spare), 0o600); err != nil {
			t.Fatal(err)
		}
		err := Link(t.Context(), w.tree, p, filepath.Join(dir, "im"))
		if err == nil {
			break
		}
		if failed++; !errors.Is(err, pool.ErrNoSpace) {
			t.Errorf("with %d bytes: %v", spare, err)
		}
		if err := os.Remove(ballast); err != nil {
			t.Fatal(err)
		}
		nothing(t, fmt.Sprint("with ", spare), p, dir)
	}
	if failed < 10 {
		t.Errorf("it fits after %d pages", failed)
	}
	// Opened elsewhere: a map is unmapped when nothing refers to it, which is
	// too late for unmounting here.
	other := filepath.Join(t.TempDir(), "im")
	if err := os.CopyFS(other, os.DirFS(filepath.Join(dir, "im"))); err != nil {
		t.Fatal(err)
	}
	im, err := Open(other)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(im.Verify(), im.Close()); err != nil {
		t.Error(err)
	}
}
