package artifact

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// place is a chunk as a file has it: no number.
type place struct {
	Path  string
	Off   int64
	Chunk index.Chunk
}

func placesOf(t *index.Tree) (all []place) {
	t.Walk(func(path string, ino *index.Inode) error {
		for _, x := range ino.Extents {
			all = append(all, place{path, x.Off, t.Chunks[x.Chunk]})
		}
		return nil
	})
	return all
}

// roundTrip encodes, decodes and compares everything, and encodes once more.
func roundTrip(t *testing.T, tr *index.Tree, info Info) []byte {
	t.Helper()
	p, err := Encode(tr, info, index.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	got, gotInfo, err := Decode(p, "test", index.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	if err := index.Equal(tr, got); err != nil {
		t.Fatal(err)
	}
	if want := placesOf(tr); !slices.Equal(want, placesOf(got)) {
		t.Fatalf("places: %s", cmp.Diff(want, placesOf(got)))
	}
	if diff := cmp.Diff(tr.Blobs, got.Blobs, cmpopts.EquateEmpty()); diff != "" {
		t.Fatalf("blobs: %s", diff)
	}
	if diff := cmp.Diff(info, gotInfo, cmpopts.EquateEmpty()); diff != "" {
		t.Fatalf("info: %s", diff)
	}
	again, err := Encode(got, gotInfo, index.Limits{})
	if err != nil || !bytes.Equal(p, again) {
		t.Fatalf("encoded again: %d bytes of %d, or others: %v", len(again), len(p), err)
	}
	return p
}

func digest(n int) string { return fmt.Sprintf("sha256:%064x", n) }

func content(n int) chunk.Digest { return chunk.Sum(chunk.BLAKE3, fmt.Append(nil, n)) }

var someInfo = Info{Manifest: digest(1), DiffIDs: []string{digest(2), digest(3)}}

// big returns a tree of n files of one chunk each.
func big(n int) *index.Tree {
	t := index.NewTree()
	t.Root.Children = map[string]*index.Inode{}
	b := index.Blob{Digest: digest(4), Size: 1 << 40}
	var dir *index.Inode
	var off int64
	for i := range n {
		if i%50 == 0 {
			dir = &index.Inode{Mode: syscall.S_IFDIR | 0o755, Children: map[string]*index.Inode{}}
			t.Root.Children[fmt.Sprintf("d%06x", i*2654435761%0xffffff)] = dir
		}
		size := uint32(i*7919%100000 + 1)
		t.Chunks = append(t.Chunks, index.Chunk{Digest: content(i), Size: size, Offset: off})
		off += (int64(size)+511)&^511 + 512
		dir.Children[fmt.Sprintf("file-%x.py", i*40503%1000003)] = &index.Inode{
			Mode: syscall.S_IFREG | 0o644, Mtime: index.Time{Sec: 1.7e9 + int64(i/1000)}, Size: int64(size), Extents: []index.Extent{{Chunk: uint32(i)}},
		}
	}
	for at := int64(0); at < off; at += 1 << 20 {
		b.Append(index.Span{Size: 1 << 20, Offset: at / 3, Length: 1<<20/3 + 1, Codec: chunk.Gzip, Bits: 1})
	}
	t.Blobs = []index.Blob{b}
	return t
}

func benchmark(b *testing.B, tr *index.Tree, info Info) {
	p, err := Encode(tr, info, index.Limits{})
	if err != nil {
		b.Fatal(err)
	}
	b.Run("Decode", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, _, err := Decode(p, "test", index.Limits{}); err != nil {
				b.Fatal(err)
			}
		}
		b.ReportMetric(float64(len(p)), "bytes")
	})
	b.Run("Encode", func(b *testing.B) {
		for b.Loop() {
			if _, err := Encode(tr, info, index.Limits{}); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func Benchmark100k(b *testing.B) {
	benchmark(b, big(100_000), Info{Manifest: digest(1)})
}

// awkward returns a tree of everything a tree can have.
func awkward() *index.Tree {
	t := index.NewTree()
	file := func(size int64, x ...index.Extent) *index.Inode {
		return &index.Inode{Mode: syscall.S_IFREG | 0o644, Size: size, Extents: x}
	}
	dir := func(children map[string]*index.Inode) *index.Inode {
		return &index.Inode{Mode: syscall.S_IFDIR | 0o1777, Children: children}
	}
	t.Blobs = []index.Blob{
		{Digest: digest(10), Size: 3000, Spans: []index.Span{
			{Size: 1 << 20, Offset: 10, Length: 1000, Codec: chunk.Gzip},
			{Start: 1 << 20, Size: 100_000, Offset: 1009, Length: 991, Codec: chunk.Gzip, Bits: 3, Window: index.Window{Blob: 3, Offset: 7, Length: 300}},
			{Start: 1<<20 + 100_000, Size: 100_000, Offset: 2100, Length: 900, Codec: chunk.Gzip, Window: index.Window{Blob: 3, Offset: 0, Length: 7}},
		}},
		{Digest: digest(11), Size: 1 << 40, Spans: []index.Span{
			{Size: 5000, Offset: 100, Length: 900, Codec: chunk.Zstd},
			{Start: 5000, Size: 1 << 35, Offset: 1000, Length: 1 << 30, Codec: chunk.Zstd},
		}},
		{Digest: digest(12), Spans: []index.Span{{Size: 1 << 30, Length: 1 << 30}}},
		{Digest: digest(13), Size: 307},
	}
	sha := func(n int) chunk.Digest { return chunk.Sum(chunk.SHA256, fmt.Append(nil, n)) }
	t.Chunks = []index.Chunk{
		{Digest: content(1), Size: chunk.Size, Blob: 2, Offset: chunk.Size * 3}, // in no good order
		{Digest: content(2), Size: chunk.Size, Blob: 2, Offset: 512},
		{Digest: content(3), Size: chunk.Size, Blob: 2, Offset: chunk.Size + 512},
		{Digest: content(4), Size: 77, Blob: 2, Offset: 2*chunk.Size + 512},
		{Digest: sha(5), Size: 4096, Blob: 1, Offset: 4097}, // in two spans
		{Digest: sha(6), Size: chunk.MaxSize, Blob: 1, Offset: 1 << 34},
		{Digest: content(7), Size: 5, Blob: 1, Offset: 1<<34 + 77}, // in another
		{Digest: content(8), Size: 9, Blob: 0, Offset: 0},          // not used
		{Digest: content(9), Size: 3, Blob: 0, Offset: 1<<20 - 1},
		{Digest: content(9), Size: 3, Blob: 0, Offset: 1<<20 - 1}, // once more
		{Digest: content(9), Size: 3, Blob: 2, Offset: 1<<30 - 3}, // and elsewhere
	}
	linked := file(5, index.Extent{Chunk: 6})
	linked.Xattrs = []index.Xattr{{Name: "user.z", Value: ""}, {Name: "security.capability", Value: "\x01\x00\x00\x02\x00\xff"}}
	pipe := &index.Inode{Mode: syscall.S_IFIFO | 0o600}
	deep := dir(map[string]*index.Inode{strings.Repeat("y", 255): pipe})
	for range 15 {
		deep = dir(map[string]*index.Inode{strings.Repeat("x", 255): deep})
	}
	t.Root.Mtime = index.Time{Sec: -1, Nsec: 999_999_999}
	t.Root.Xattrs = []index.Xattr{{Name: "user.root", Value: strings.Repeat("v", 60<<10)}}
	t.Root.Children = map[string]*index.Inode{
		"a":      dir(map[string]*index.Inode{"link": linked, "\xff\xfe": file(0), "\x01\n": pipe}),
		"b":      linked,
		"a.b":    linked, // sorts before what is in a, in paths
		"empty":  dir(nil),
		"hole":   file(16 << 40),
		"large":  file(16<<40, index.Extent{Off: 4096, Chunk: 0}, index.Extent{Off: 16<<40 - 4096, Chunk: 4}),
		"plain":  file(2*chunk.Size+77, index.Extent{Chunk: 1}, index.Extent{Off: chunk.Size, Chunk: 2}, index.Extent{Off: 2 * chunk.Size, Chunk: 3}),
		"same":   file(2*chunk.Size, index.Extent{Chunk: 1}, index.Extent{Off: chunk.Size, Chunk: 1}),
		"tail":   file(2*chunk.Size, index.Extent{Chunk: 1}),
		"wide":   file(chunk.MaxSize+5, index.Extent{Chunk: 5}, index.Extent{Off: chunk.MaxSize, Chunk: 6}),
		"pieces": file(4096*3, index.Extent{Chunk: 8}, index.Extent{Off: 4096, Chunk: 9}, index.Extent{Off: 8192, Chunk: 10}),
		"null":   {Mode: syscall.S_IFCHR | 0o666, Rdev: 0x103},
		"disk":   {Mode: syscall.S_IFBLK | 0o660, Rdev: 1<<64 - 1, GID: 6},
		"socket": {Mode: syscall.S_IFSOCK | 0o777},
		"symbol": {Mode: syscall.S_IFLNK | 0o777, Target: strings.Repeat("/\xff", 2047), UID: 1<<32 - 1, GID: 1 << 31},
		"setuid": {Mode: syscall.S_IFREG | 0o7777, Mtime: index.Time{Sec: -1 << 63}},
		"future": {Mode: syscall.S_IFREG, Mtime: index.Time{Sec: 1<<63 - 1, Nsec: 1}},
		"deep":   deep,
	}
	return t
}

func TestAwkward(t *testing.T) {
	roundTrip(t, awkward(), someInfo)
	roundTrip(t, index.NewTree(), Info{Manifest: digest(1)})
	roundTrip(t, big(3000), Info{Manifest: digest(1)})
}

// TestNumbersDoNotMatter numbers chunks differently.
func TestNumbersDoNotMatter(t *testing.T) {
	want := roundTrip(t, awkward(), someInfo)
	tr := awkward()
	n := uint32(len(tr.Chunks))
	slices.Reverse(tr.Chunks)
	seen := map[*index.Inode]bool{}
	tr.Walk(func(_ string, ino *index.Inode) error {
		for i := range ino.Extents {
			if !seen[ino] {
				ino.Extents[i].Chunk = n - 1 - ino.Extents[i].Chunk
			}
		}
		slices.Reverse(ino.Xattrs) // of the linked file three times
		seen[ino] = true
		return nil
	})
	if got := roundTrip(t, tr, someInfo); !bytes.Equal(got, want) {
		t.Errorf("%d bytes, want the same %d", len(got), len(want))
	}
	got, _, err := Decode(want, "test", index.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Chunks) != 9 { // without one not used and one there twice
		t.Errorf("%d chunks", len(got.Chunks))
	}
}
