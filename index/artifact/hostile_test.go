package artifact

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"lukechampine.com/blake3"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// forge encodes a tree without looking at it, after change.
func forge(t testing.TB, tr *index.Tree, change func(e *encoder)) []byte {
	t.Helper()
	e := &encoder{t: tr}
	if err := e.encode(someInfo); err != nil {
		t.Fatal(err)
	}
	change(e)
	return seal(1, e.sums(), e.content()...)
}

// reseal makes the checksum right.
func reseal(p []byte) []byte {
	end := len(p) - sumSize
	sum := blake3.Sum256(p[:end])
	return append(bytes.Clone(p[:end]), sum[:]...)
}

// refused fails unless Decode gives an error of a kind that has the words.
func refused(t *testing.T, p []byte, lim index.Limits, kind error, words string) {
	t.Helper()
	_, _, err := Decode(p, "some-index", lim)
	var where *index.Error
	if !errors.Is(err, kind) || !strings.Contains(err.Error(), words) || !errors.As(err, &where) || where.Name != "some-index" {
		t.Errorf("%v, want %v with %q", err, kind, words)
	}
}

func numbers(v ...uint64) (p []byte) {
	for _, v := range v {
		p = binary.AppendUvarint(p, v)
	}
	return p
}

// small has two files of two chunks in a layer of 64 KiB, a link to one of them,
// and a directory.
func small() *index.Tree {
	t := index.NewTree()
	t.Blobs = []index.Blob{{Digest: digest(5), Size: 65536, Spans: []index.Span{{Size: 65536, Length: 65536}}}, {Digest: digest(6)}}
	t.Chunks = []index.Chunk{{Digest: content(1), Size: 4096, Offset: 512}, {Digest: content(2), Size: 4096, Offset: 4608}}
	f := &index.Inode{Mode: syscall.S_IFREG, Size: 4096, Extents: []index.Extent{{Chunk: 0}}}
	g := &index.Inode{Mode: syscall.S_IFREG, Size: 8192, Extents: []index.Extent{{Off: 4096, Chunk: 1}}}
	d := &index.Inode{Mode: syscall.S_IFDIR, Children: map[string]*index.Inode{"g": g}}
	s := &index.Inode{Mode: syscall.S_IFLNK, Target: "t"}
	t.Root.Children = map[string]*index.Inode{"d": d, "f": f, "h": f, "s": s}
	return t
}

// blocks is small where the layer is a zstd frame, of which two spans need states.
func blocks() *index.Tree {
	t := small()
	t.Blobs[0].Size, t.Blobs[0].Spans = 3100, []index.Span{
		{Size: 30_000, Offset: 20, Length: 1000, Codec: chunk.ZstdBlocks},
		{Start: 30_000, Size: 30_000, Offset: 1020, Length: 1000, Codec: chunk.ZstdBlocks, Window: index.Window{Blob: 1, Offset: 9, Length: 31_024}},
		{Start: 60_000, Size: 5536, Offset: 2080, Length: 1000, Codec: chunk.ZstdBlocks, Window: index.Window{Blob: 1, Offset: 31_033, Length: 300}},
	}
	return t
}

// TestVersion: an index says the first version that can say what it does, so that who knows
// no other reads all those that it can.
func TestVersion(t *testing.T) {
	for what, c := range map[string]struct {
		tree *index.Tree
		want byte
	}{"plain": {small(), 1}, "gzip": {awkward(), 1}, "zstd": {index.NewTree(), 1}, "blocks": {blocks(), 2}} {
		p := roundTrip(t, c.tree, Info{Manifest: digest(1)})
		if p[8] != c.want || p[9] != 0 || p[10] != 0 || p[11] != 0 {
			t.Errorf("%s: version %d, want %d", what, p[8], c.want)
		}
	}
}

// TestHostileBlocks: what is wrong with blocks of zstd frames is refused.
func TestHostileBlocks(t *testing.T) {
	for _, c := range []struct {
		change func(s []index.Span)
		words  string
	}{
		{func(s []index.Span) { s[1].Codec = chunk.Deflate }, "span 1 of blob " + digest(5) + " is stored as codec(4)"},
		{func(s []index.Span) { s[1].Codec = chunk.ZstdBlocks + 1 }, "is stored as codec(6)"},
		{func(s []index.Span) { s[2].Bits = 1 }, "zstd blocks with 1 bits"},
		{func(s []index.Span) { s[1].Window.Length++ }, "a window of 31025 bytes"},
		{func(s []index.Span) { s[2].Window.Offset++ }, "want it at 31033 of blob 1"},
		{func(s []index.Span) { s[2].Window.Blob = 0 }, "of blob 0, want it at 31033 of blob 1"},
		{func(s []index.Span) { s[1].Window.Blob, s[2].Window.Blob = 2, 2 }, "blob 2 of 2"},
		{func(s []index.Span) { s[1].Window.Offset, s[2].Window.Offset = -1, 31_023 }, "a window of 31024 bytes at -1"},
		{func(s []index.Span) { s[1].Codec, s[1].Window = chunk.Gzip, index.Window{} }, "windows of another kind"},
	} {
		refused(t, forge(t, blocks(), func(e *encoder) {
			c.change(e.t.Blobs[0].Spans)
			e.sec[secSpans] = nil
			e.spans()
		}), index.Limits{}, index.ErrCorrupt, c.words)
	}
	large := blocks()
	large.Blobs[0].Spans[2].Size = 1<<20 + 1
	if _, err := Encode(large, someInfo, index.Limits{}); err == nil {
		t.Error("a large span is written")
	}
}

func TestHostile(t *testing.T) {
	set := func(id int, v ...uint64) func(*encoder) { return func(e *encoder) { e.sec[id] = numbers(v...) } }
	text := func(id int, s string) func(*encoder) { return func(e *encoder) { e.sec[id] = []byte(s) } }
	gone := func(id int) func(*encoder) { return func(e *encoder) { e.sec[id] = nil } }
	long := strings.Repeat("n", 256)
	names := func(s string) func(*encoder) { return text(secNames, strings.ReplaceAll(s, " ", "\x00")) }
	chunks := func(change func(c []index.Chunk)) func(*encoder) {
		return func(e *encoder) {
			change(e.chunks)
			for _, id := range []int{secBlobs, secSizes, secGaps, secAlgorithms} {
				e.sec[id] = nil
			}
			if err := e.blobs(); err != nil {
				t.Fatal(err)
			}
			e.places()
		}
	}
	spans := func(change func(s *index.Span)) func(*encoder) {
		return func(e *encoder) {
			change(&e.t.Blobs[0].Spans[0])
			e.sec[secSpans] = nil
			e.spans()
		}
	}
	zz := func(v int64) uint64 { return uint64(v)<<1 ^ uint64(v>>63) }
	for _, c := range []struct {
		change func(e *encoder)
		words  string
	}{
		// In order: d d/g f h s. Classes: the root, directories, files, links.
		{names("d / f h s "), `name "/"`},
		{names("d  f h s "), `name ""`},
		{names("d . f h s "), `name "."`},
		{names("d .. f h s "), `name ".."`},
		{names("d a/b f h s "), `name "a/b"`},
		{names("d g f " + long + " s "), "of 256 bytes"},
		{names("d g f f s "), `name "f" behind "f"`},
		{names("d g f e s "), `name "e" behind "f"`},
		{names("d g f h s"), "names"},
		{names("d g f h s t "), "6 inodes"},
		{names("d g f h "), "names 1, want at most 0"},
		{set(secChildren, 5, 1), "names 1, want at most 0"},
		{set(secChildren, 3, 1), "are in no directory"},
		{set(secChildren, 0, 0), "are in no directory"},
		{set(secChildren, 4, 1, 1), "1 bytes too many"},
		{gone(secChildren), "no number"},
		{set(secLinks, 3, 1), "no file before it"}, // a directory
		{set(secLinks, 3, 0), "no file before it"}, // the root
		{set(secLinks, 3, 9), "no file before it"},
		{set(secLinks, 0, 1), "no file before it"}, // itself
		{set(secLinks, 9, 1), "names before a link 9"},
		{set(secLinks, 3, 1, 4, 1), "is a link, there are"},
		{gone(secLinks), "inodes"},
		{set(secClass, 2, 1, 2, 2, 3), "the root is no directory"},
		{set(secClass, 0, 1, 2, 2, 7), "class 7"},
		{set(secClass, 0, 1, 2, 2, 3, 3), "too many"},
		{set(secTime, 0, 0, 0, 0, 1), "time 1"},
		{set(secTimes, 0, 1e9), "nanoseconds"},
		{set(secClasses, 0o40755, 0, 0, 0, 0o100000, 0, 0, 0, 0o30000, 0, 0, 0), "file type 030000"},
		{set(secClasses, 0o240755, 0, 0, 0), "mode"},
		{set(secClasses, 0o40755, 1<<32, 0, 0), "user"},
		{set(secClasses, 0o40755, 0, 1<<32, 0), "group"},
		{set(secClasses, 0o40755, 0, 0, 1), "set of attributes"},
		{text(secXattrs, "\x02\x01a\x00\x01a\x00"), `"a" behind "a"`},
		{text(secXattrs, "\x01\x00\x00"), `attribute ""`},
		{text(secXattrs, "\x01\x01\x00\x00"), `attribute "\x00"`},
		{text(secXattrs, "\x01\x01a\x05b"), "1 bytes, want 5"},
		{text(secXattrs, "\x7f\x01a\x05b"), "attributes 127"},
		{text(secXattrs, "\x00"), "a set of no attributes"},
		{text(secTargets, "\x00"), "target of 0 bytes"},
		{text(secTargets, strings.Repeat("t", 4096)+"\x00"), "target of 4096 bytes"},
		{gone(secTargets), "no string"},
		{text(secTargets, "t\x00u\x00"), "too many"},
		{set(secFiles, 1, 4), "3 chunks from 0"},
		{set(secFiles, 1, 1<<63+1), "chunks from"},
		{set(secFiles, 0, 2), "too many"},
		{set(secStarts, 0, zz(2), 0, 0), "1 chunks from 2"},
		{set(secStarts, 0, zz(-1), 0, 0), "1 chunks from -1"},
		{set(secStarts, 2, 0, 0, 0), "blob 2"},
		{set(secRuns, 8192, 9, 4096, 1), "runs 9"},
		{set(secRuns, 8192, 1, 4096, 0), "0 chunks"},
		{set(secRuns, 8192, 1, 512, 1), "content at 512"},
		{set(secRuns, 8192, 1, 8192, 1), "content up to 12288 in a file of 8192"},
		{set(secRuns, 8192, 1, 1<<63, 1), "hole"},
		{chunks(func(c []index.Chunk) { c[1].Offset = 65536 - 4095 }), "4096 bytes at 61441"},
		{chunks(func(c []index.Chunk) { c[1].Offset = -1 }), "at -1 of the stream"},
		{chunks(func(c []index.Chunk) { c[0].Offset = 8192 }), "that before at 8192"},
		{chunks(func(c []index.Chunk) { c[0].Size = 0 }), "0 bytes, want 1"},
		{chunks(func(c []index.Chunk) { c[0].Size = chunk.MaxSize + 1 }), "size 16777217"},
		{chunks(func(c []index.Chunk) { c[1].Blob = 1 }), "of a stream of 0"},
		{chunks(func(c []index.Chunk) { c[1].Digest.Algorithm = 3 }), "unknown digest"},
		{set(secAlgorithms, 1, 3), "chunks 3"},
		{set(secAlgorithms, 1, 1), "no number"},
		{set(secAlgorithms, 1, 2, 1), "too many"},
		{gone(secGaps), "no number"},
		{gone(secSizes), "no number"},
		{gone(secBlobs), "0 layers"},
		{gone(secSpans), "1 spans in a section of 0"},
		{spans(func(s *index.Span) { s.Size = 65535 }), "65535 bytes stored as 65536"},
		{spans(func(s *index.Span) { s.Size, s.Length = 0, 0 }), "0 bytes at 0"},
		{spans(func(s *index.Span) { s.Size = -1 }), "-1 bytes at 0"},
		{spans(func(s *index.Span) { s.Offset = 1 }), "65536 stored bytes at 1 of 65536"},
		{spans(func(s *index.Span) { s.Offset = -1 }), "stored bytes at -1"},
		{spans(func(s *index.Span) { s.Codec = 4 }), "codec(4)"},
		{spans(func(s *index.Span) { s.Codec, s.Bits = chunk.Gzip, 8 }), "8 bits"},
		{spans(func(s *index.Span) { s.Codec, s.Window = chunk.Gzip, index.Window{Blob: 2, Length: 9} }), "blob 2 of 2"},
		{spans(func(s *index.Span) { s.Codec, s.Window = chunk.Gzip, index.Window{Blob: 1, Length: 1 << 20} }), "window of 1048576"},
		{gone(secImage), "0 bytes, want 32"},
	} {
		tr := small()
		if p := forge(t, tr, c.change); len(p) > 0 {
			refused(t, p, index.Limits{}, index.ErrCorrupt, c.words)
		}
	}
}

func TestHeader(t *testing.T) {
	good, err := Encode(awkward(), someInfo, index.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	put := func(at int, v byte) []byte {
		p := bytes.Clone(good)
		p[at] = v
		return reseal(p)
	}
	refused(t, nil, index.Limits{}, index.ErrCorrupt, "SHALEIDX")
	refused(t, put(0, 's'), index.Limits{}, index.ErrCorrupt, "SHALEIDX")
	refused(t, put(8, 0), index.Limits{}, index.ErrCorrupt, "version 0")
	refused(t, put(8, 3), index.Limits{}, index.ErrUnsupported, "index of version 3, want at most 2")
	refused(t, put(8, 3)[:12], index.Limits{}, index.ErrUnsupported, "index of version 3, want at most 2")
	refused(t, put(12, good[12]+1), index.Limits{}, index.ErrCorrupt, "zstd")
	refused(t, put(14, 1), index.Limits{}, index.ErrCorrupt, "chunks in")
	refused(t, put(15, 1), index.Limits{}, index.ErrCorrupt, "chunks in")
	refused(t, put(15, 1), index.Limits{Memory: 1 << 20}, index.ErrCorrupt, "chunks in")
	refused(t, put(16, good[16]-1), index.Limits{}, index.ErrCorrupt, "zstd")
	refused(t, put(16, good[16]+1), index.Limits{}, index.ErrCorrupt, "bytes decoded")
	refused(t, put(18, 64), index.Limits{}, index.ErrLimit, "bytes decoded") // 64 times the index
	refused(t, put(23, 1), index.Limits{}, index.ErrLimit, "bytes decoded")
	refused(t, good[:headerSize], index.Limits{}, index.ErrCorrupt, "cut off")
	refused(t, append(bytes.Clone(good), 0), index.Limits{}, index.ErrCorrupt, "checksum")
	refused(t, seal(1, nil, numbers(secDevices+1, 0)), index.Limits{}, index.ErrUnsupported, "section 20")
	refused(t, seal(1, nil, numbers(secNames, 0, secTimes, 0)), index.Limits{}, index.ErrCorrupt, "section 9 behind section 10")
	refused(t, seal(1, nil, numbers(secNames, 1)), index.Limits{}, index.ErrCorrupt, "section 10 of 1 bytes")
	refused(t, seal(1, nil, []byte{0x80}), index.Limits{}, index.ErrCorrupt, "section")
	// What need not be understood is skipped.
	p := forge(t, small(), func(e *encoder) { e.sec[secDevices] = nil })
	e := &encoder{t: small()}
	if err := e.encode(someInfo); err != nil {
		t.Fatal(err)
	}
	more := seal(1, e.sums(), append(slices.Clone(e.content()), numbers(64, 2, 1, 1, 1000, 0))...)
	want, _, err := Decode(p, "test", index.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	if got, _, err := Decode(more, "test", index.Limits{}); err != nil || index.Equal(want, got) != nil {
		t.Error("with sections to skip:", err)
	}
}

func TestLimits(t *testing.T) {
	p, err := Encode(awkward(), someInfo, index.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		lim, enough index.Limits
		name        string
	}{
		{index.Limits{Entries: 36}, index.Limits{Entries: 37}, "Entries"},
		{index.Limits{XattrBytes: 60<<10 + 8}, index.Limits{XattrBytes: 60<<10 + 9}, "XattrBytes"},
		{index.Limits{FileSize: 16<<40 - 1}, index.Limits{FileSize: 16 << 40}, "FileSize"},
		{index.Limits{Memory: 1000}, index.Limits{Memory: 1 << 20}, "Memory"},
	} {
		refused(t, p, c.lim, index.ErrLimit, "("+c.name+")")
		if _, _, err := Decode(p, "test", c.enough); err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	// A few bytes that name many extents.
	tr := big(1000)
	x := index.Inode{Mode: syscall.S_IFREG}
	for i := range tr.Chunks {
		tr.Chunks[i].Size, tr.Chunks[i].Offset = 4096, int64(i)*4096
		x.Extents = append(x.Extents, index.Extent{Off: x.Size, Chunk: uint32(i)})
		x.Size += 4096
	}
	tr.Root.Children = map[string]*index.Inode{}
	for i := range 100 {
		y := x
		tr.Root.Children[string(rune('0'+i))] = &y
	}
	p = roundTrip(t, tr, Info{Manifest: digest(1)})
	refused(t, p, index.Limits{Memory: 100_000 * extentBytes}, index.ErrLimit, "(Memory)")
	// A bomb.
	tr = index.NewTree()
	tr.Root.Children = map[string]*index.Inode{}
	for i := range 1000 {
		tr.Root.Children[string(rune('0'+i))] = &index.Inode{Mode: syscall.S_IFLNK, Target: strings.Repeat("x", maxTarget)}
	}
	if _, err := Encode(tr, Info{Manifest: digest(1)}, index.Limits{}); !errors.Is(err, index.ErrLimit) {
		t.Error(err)
	}
}

// TestMemory has indexes that stand for much more than they are: what is
// allocated is in proportion to the limit.
func TestMemory(t *testing.T) {
	const memory = 16 << 20
	pad := make([]byte, 256<<10) // frames decode to 64 times the index
	rand.NewChaCha8([32]byte{}).Read(pad)
	many := func(id, n int, p ...byte) func(map[int][]byte) {
		return func(sec map[int][]byte) { sec[id] = bytes.Repeat(p, n) }
	}
	all := func(f ...func(map[int][]byte)) func(map[int][]byte) {
		return func(sec map[int][]byte) {
			for _, f := range f {
				f(sec)
			}
		}
	}
	const n = 2 << 20
	dir := numbers(0o40755, 0, 0, 0)
	for what, change := range map[string]func(map[int][]byte){
		"sets of attributes":     many(secXattrs, n, 1, 1, 'a', 0),
		"attributes of a set":    all(many(secXattrs, n, 1, 'a', 0), func(sec map[int][]byte) { sec[secXattrs] = append(numbers(n), sec[secXattrs]...) }),
		"classes":                many(secClasses, n, dir...),
		"times":                  many(secTimes, n, 0, 0),
		"links":                  all(many(secNames, n, 0), many(secLinks, n, 0, 0)),
		"inodes":                 all(many(secNames, n, 0), many(secClass, n+1, 0), many(secTime, n+1, 0)),
		"digests of layers":      many(secImage, n/16, make([]byte, sumSize)...),
		"blobs":                  many(secBlobs, n/16, append(make([]byte, sumSize), 0, 0, 0, 0)...),
		"spans":                  all(func(sec map[int][]byte) { sec[secBlobs] = append(make([]byte, sumSize), numbers(0, n/4, 0, 0)...) }, many(secSpans, n, 0)),
		"names":                  many(secNames, n, 'a', 'b', 'c'),
		"names in a directory":   all(many(secNames, n/8, 0), many(secClass, n/8+1, 0), many(secTime, n/8+1, 0), func(sec map[int][]byte) { sec[secChildren] = numbers(n / 8) }),
		"targets":                many(secTargets, 4*n, 't'),
		"bytes of one attribute": many(secXattrs, 4*n, 0x7f),
	} {
		t.Run(what, func(t *testing.T) {
			sec := map[int][]byte{secImage: make([]byte, sumSize), secClasses: dir, secTimes: {0, 0}, secClass: {0}, secTime: {0}, secChildren: {0}}
			change(sec)
			var content []byte
			for id := range sections {
				if p := sec[id]; len(p) > 0 {
					content = append(append(content, numbers(uint64(id), uint64(len(p)))...), p...)
				}
			}
			p := seal(1, nil, content, append(numbers(optional, uint64(len(pad))), pad...))
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			_, _, err := Decode(p, "test", index.Limits{Memory: memory})
			runtime.ReadMemStats(&after)
			if err == nil {
				t.Error("it is taken")
			}
			got := after.TotalAlloc - before.TotalAlloc
			t.Logf("%d bytes stored, %d allocated: %v", len(p), got, err)
			if got > 3*memory { // all that was ever allocated: lists that grow are garbage, again and again
				t.Errorf("%d bytes allocated", got)
			}
		})
	}
}

// TestEncodeRefuses gives Encode trees that are none.
func TestEncodeRefuses(t *testing.T) {
	file := func(size int64, x ...index.Extent) *index.Inode {
		return &index.Inode{Mode: syscall.S_IFREG, Size: size, Extents: x}
	}
	for words, change := range map[string]func(tr *index.Tree, info *Info){
		"further name of a directory": func(tr *index.Tree, _ *Info) { tr.Root.Children["d"].Children["loop"] = tr.Root },
		"a further name":              func(tr *index.Tree, _ *Info) { tr.Root.Children["e"] = tr.Root.Children["d"] },
		"with a NUL":                  func(tr *index.Tree, _ *Info) { tr.Root.Children["a\x00"] = file(0) },
		`name "a/b"`:                  func(tr *index.Tree, _ *Info) { tr.Root.Children["a/b"] = file(0) },
		"target with a NUL":           func(tr *index.Tree, _ *Info) { tr.Root.Children["s"].Target = "a\x00b" },
		"target of 0":                 func(tr *index.Tree, _ *Info) { tr.Root.Children["s"].Target = "" },
		"link target is":              func(tr *index.Tree, _ *Info) { tr.Root.Children["f"].Target = "s" },
		"file type":                   func(tr *index.Tree, _ *Info) { tr.Root.Children["s"].Mode = 0o644 },
		"no directory":                func(tr *index.Tree, _ *Info) { tr.Root = tr.Root.Children["f"] },
		"nanoseconds":                 func(tr *index.Tree, _ *Info) { tr.Root.Mtime.Nsec = 1e9 },
		"chunk 9 of 2":                func(tr *index.Tree, _ *Info) { tr.Root.Children["x"] = file(4096, index.Extent{Chunk: 9}) },
		"behind the end":              func(tr *index.Tree, _ *Info) { tr.Root.Children["x"] = file(4095, index.Extent{}) },
		"overlaps": func(tr *index.Tree, _ *Info) {
			tr.Root.Children["x"] = file(8192, index.Extent{}, index.Extent{Off: 4000})
		},
		"overlaps that before":   func(tr *index.Tree, _ *Info) { tr.Root.Children["x"] = file(8192, index.Extent{Off: -4096}) },
		"content at 4000":        func(tr *index.Tree, _ *Info) { tr.Root.Children["x"] = file(8192, index.Extent{Off: 4000}) },
		"(FileSize)":             func(tr *index.Tree, _ *Info) { tr.Root.Children["x"] = file(16<<40 + 1) },
		"content behind the end": func(tr *index.Tree, _ *Info) { tr.Root.Children["x"] = file(-1) },
		"(XattrBytes)": func(tr *index.Tree, _ *Info) {
			tr.Root.Xattrs = []index.Xattr{{Name: "user.a", Value: strings.Repeat("b", 64<<10)}}
		},
		"attribute": func(tr *index.Tree, _ *Info) {
			tr.Root.Xattrs = []index.Xattr{{Name: "user.a"}, {Name: "user.a"}}
		},
		"of a stream of 65536": func(tr *index.Tree, _ *Info) { tr.Chunks[0].Offset = 65536 },
		"stored bytes at 1":    func(tr *index.Tree, _ *Info) { tr.Blobs[0].Spans[0].Offset = 1 },
		"of -1 bytes":          func(tr *index.Tree, _ *Info) { tr.Blobs[1].Size = -1 },
		`digest ""`:            func(tr *index.Tree, _ *Info) { tr.Blobs[1].Digest = "" },
		"digest \"sha256:x":    func(_ *index.Tree, info *Info) { info.Manifest = "sha256:x" + strings.Repeat("0", 63) },
		"digest \"sha256:A":    func(_ *index.Tree, info *Info) { info.DiffIDs[0] = "sha256:A" + strings.Repeat("0", 63) },
		"digest \"sha512":      func(_ *index.Tree, info *Info) { info.Manifest = "sha512:" + strings.Repeat("0", 128) },
		"2 layers, of 3": func(_ *index.Tree, info *Info) {
			info.DiffIDs = []string{digest(1), digest(2), digest(3)}
		},
		"a path of": func(tr *index.Tree, _ *Info) {
			dir := tr.Root
			for range 5000 {
				dir.Children["deep"] = &index.Inode{Mode: syscall.S_IFDIR, Children: map[string]*index.Inode{}}
				dir = dir.Children["deep"]
			}
		},
	} {
		tr, info := small(), Info{Manifest: digest(1), DiffIDs: []string{digest(2)}}
		change(tr, &info)
		p, err := Encode(tr, info, index.Limits{})
		if p != nil || err == nil || !strings.Contains(err.Error(), words) {
			t.Errorf("%d bytes and %v, want an error with %q", len(p), err, words)
		}
	}
}
