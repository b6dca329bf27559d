package trace

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

var update = flag.Bool("update", false, "write the golden file anew")

const manifest = "sha256:0000000000000000000000000000000000000000000000000000000000000001"

func digest(s string) chunk.Digest { return chunk.Sum(chunk.BLAKE3, []byte(s)) }

// run is run n of all there are.
func run(n int) Run {
	return Run{ID: fmt.Sprintf("run%03d", n), Started: time.Date(2026, 11, 27, 12, 0, n, 0, time.UTC), Arch: "amd64", ReadAhead: 4}
}

// size is that of a chunk: the image's affair, whatever cut is ours.
const size = 8 * chunk.Block

// read is the trace of one run that has read these blocks, "file/block", each of
// a chunk of that size.
func read(n int, blocks ...string) *Trace {
	t := &Trace{Manifest: manifest, Runs: []Run{run(n)}}
	for i, s := range blocks {
		var k int
		name, at, _ := strings.Cut(s, "/")
		fmt.Sscan(at, &k)
		t.Blocks = append(t.Blocks, Block{
			Chunk: digest(name), Size: size, Index: k, Path: name, Offset: int64(k) * chunk.Block,
			At: time.Duration(i) * time.Millisecond, Wait: time.Duration(n) * 10 * time.Microsecond, Runs: 1, By: 1,
		})
	}
	return t
}

// show is what a trace has, block by block: file, block, runs.
func show(t *Trace) (out []string) {
	for _, b := range t.Blocks {
		var ids []string
		for i, r := range t.Runs {
			if b.By.Has(i) {
				ids = append(ids, strings.TrimLeft(r.ID, "run0"))
			}
		}
		if len(ids) != b.Runs {
			ids = append(ids, fmt.Sprint("but it says ", b.Runs))
		}
		out = append(out, fmt.Sprintf("%s/%d:%s", b.Path, b.Index, strings.Join(ids, ",")))
	}
	return out
}

// names are the files of a trace.
func names(t *Trace) (out []string) {
	for _, f := range t.ByFile() {
		out = append(out, f.Path)
	}
	return out
}

func merge(t testing.TB, all ...*Trace) *Trace {
	t.Helper()
	m, err := Merge(all...)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestMerge(t *testing.T) {
	a, b, c := read(1, "ld/0", "sh/0", "sh/1", "libc/3"), read(2, "ld/0", "ls/0", "libc/3"), read(3, "libc/3", "ls/0", "x/7")
	ab := merge(t, a, b)
	want := []string{"ld/0:1,2", "sh/0:1", "ls/0:2", "sh/1:1", "libc/3:1,2"}
	if got := show(ab); !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	abc := merge(t, ab, c)
	want = []string{"ld/0:1,2", "libc/3:1,2,3", "sh/0:1", "ls/0:2,3", "x/7:3", "sh/1:1"}
	if got := show(abc); !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	if w := abc.Blocks[1].Wait; w != 30*time.Microsecond {
		t.Errorf("whoever was first, the third, waited %v", w)
	}
	if abc.Bytes() != 6*chunk.Block || !slices.Equal(names(abc), []string{"ld", "libc", "sh", "ls", "x"}) {
		t.Errorf("%d bytes of %q", abc.Bytes(), names(abc))
	}
	if _, err := Merge(a, &Trace{Manifest: "sha256:other"}); !errors.Is(err, ErrMismatch) {
		t.Error(err)
	}
	if _, err := Merge(); err == nil {
		t.Error("a trace of nothing")
	}
}

// What was merged already changes nothing, so that nodes may merge what others
// have merged, in any order.
func TestMergeAgain(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		var all []*Trace
		for n := range rapid.IntRange(1, 6).Draw(rt, "runs") {
			blocks := rapid.SliceOfNDistinct(rapid.IntRange(0, 7), 0, 8, rapid.ID).Draw(rt, "blocks")
			var names []string
			for _, b := range blocks {
				names = append(names, fmt.Sprintf("f/%d", b))
			}
			all = append(all, read(n, names...))
		}
		once := merge(t, all...)
		some := rapid.Permutation(all).Draw(rt, "order")
		k := rapid.IntRange(1, len(some)).Draw(rt, "some")
		left, right := merge(t, some[:k]...), merge(t, some[k-1:]...)
		again := merge(t, left, right, left)
		sorted := func(t *Trace) []string { s := show(t); slices.Sort(s); return s }
		if d := cmp.Diff(sorted(once), sorted(again)); d != "" {
			rt.Errorf("merged in another way, by %d of %d: %s", k, len(some), d)
		}
		if d := cmp.Diff(once.Runs, again.Runs); d != "" {
			rt.Error(d)
		}
		if d := cmp.Diff(again, merge(t, again, again)); d != "" {
			rt.Errorf("merged with itself: %s", d)
		}
	})
}

// Of more runs than are told apart the earliest are forgotten, but not what they
// have read.
func TestMergeMany(t *testing.T) {
	node := read(0, "rare/0", "always/0")
	for n := 1; n < MaxRuns+10; n++ {
		node = merge(t, node, read(n, "always/0"))
	}
	if len(node.Runs) != MaxRuns || node.Runs[0].ID != "run010" {
		t.Errorf("%d runs, the first %s", len(node.Runs), node.Runs[0].ID)
	}
	runs := map[string]int{}
	for _, b := range node.Blocks {
		runs[b.Path] = b.Runs
	}
	if want := map[string]int{"rare": 0, "always": MaxRuns}; !cmp.Equal(runs, want) {
		t.Errorf("%v, want %v", runs, want)
	}
	if d := cmp.Diff(node, recode(t, node)); d != "" {
		t.Error(d)
	}
}

func TestMergeTooMuch(t *testing.T) {
	big := func(n int, from int) *Trace {
		t := &Trace{Manifest: manifest, Runs: []Run{run(n)}}
		for i := range MaxBlocks - 1 {
			t.Blocks = append(t.Blocks, Block{Chunk: digest("huge"), Size: chunk.Size, Index: from + i, Path: "huge", Runs: 1, By: 1})
		}
		return t
	}
	m := merge(t, big(1, 0), big(2, 1), read(3, "x/0"))
	if len(m.Blocks) != MaxBlocks || m.Runs[0].Lost || !m.Runs[1].Lost || m.Runs[2].Lost {
		t.Errorf("%d blocks, of runs %+v", len(m.Blocks), m.Runs)
	}
}

func recode(t testing.TB, tr *Trace) *Trace {
	t.Helper()
	var b bytes.Buffer
	if err := tr.Encode(&b); err != nil {
		t.Fatal(err)
	}
	out, err := Decode(&b, "again")
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// golden is a trace that has one of each.
func golden(t testing.TB) *Trace {
	a, b := read(1, "usr/bin/sh", "x/0"), read(2, "x/0", "x/1", "x/2", "x/4")
	a.Runs[0].Command, a.Runs[0].CPU = []string{"sh", "-c", "true"}, "AMD EPYC"
	b.Runs[0].Lost, b.Runs[0].ReadAhead = true, 128
	a.Blocks[0].Path, a.Blocks[0].Offset = "usr/bin/sh", 3*size
	a.Blocks[0].Size, a.Blocks[0].Others, a.Blocks[0].Also = 777, 2, []string{"bin/ash", "bin/bash"}
	return merge(t, a, b)
}

func TestGolden(t *testing.T) {
	tr := golden(t)
	var b bytes.Buffer
	if err := tr.Encode(&b); err != nil {
		t.Fatal(err)
	}
	const name = "testdata/trace.json"
	if *update {
		if err := os.WriteFile(name, b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), b.String()); d != "" {
		t.Error(d)
	}
	// Blocks that are one touch share a time; nothing else is lost.
	got := recode(t, tr)
	for i := range got.Blocks {
		if got.Blocks[i].Chunk == digest("x") && i > 0 {
			got.Blocks[i].At, got.Blocks[i].Wait = tr.Blocks[i].At, tr.Blocks[i].Wait
		}
	}
	if d := cmp.Diff(tr, got); d != "" {
		t.Error(d)
	}
	page, err := os.ReadFile("../docs/formats/trace.md")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(want)) {
		if !strings.Contains(string(page), line) {
			t.Errorf("the page lacks %s", line)
		}
	}
}

// What does not fit is left out, and who has read it is told.
func TestEncodeTooMuch(t *testing.T) {
	for what, path := range map[string]string{
		"bytes": strings.Repeat("\x01", maxPath-10), // six times as long in JSON
		"names": strings.Repeat("d", maxPath-10),
	} {
		tr := &Trace{Manifest: manifest, Runs: []Run{run(1), run(2)}}
		for i := range MaxEncoded / maxPath {
			tr.Blocks = append(tr.Blocks, Block{Chunk: digest(fmt.Sprint(i)), Size: 1, Path: path + fmt.Sprintf("%08d", i), Runs: 1, By: 1})
		}
		tr.Blocks[len(tr.Blocks)-1].By = 2
		got := recode(t, tr)
		if n := len(got.Blocks); n == 0 || n >= len(tr.Blocks) || !cmp.Equal(got.Blocks, tr.Blocks[:n]) {
			t.Errorf("%s: %d blocks of %d, or others", what, n, len(tr.Blocks))
		}
		if !got.Runs[0].Lost || !got.Runs[1].Lost || tr.Runs[0].Lost {
			t.Errorf("%s: runs %+v", what, got.Runs)
		}
	}
	// As many touches as there may be, none beside another.
	tr := &Trace{Manifest: manifest, Runs: []Run{run(1)}}
	for i := range MaxBlocks {
		tr.Blocks = append(tr.Blocks, Block{Chunk: digest(fmt.Sprint(i)), Size: chunk.Size, Path: fmt.Sprintf("usr/lib/python3/dist-packages/a/file%d", i%9000), Runs: 1, By: 1})
	}
	if got := recode(t, tr); len(got.Blocks) < MaxBlocks*3/4 || len(got.Blocks) < MaxBlocks && !got.Runs[0].Lost {
		t.Errorf("%d blocks", len(got.Blocks))
	}
}

// Chunks of which nobody has told a digest are in traces, too: of SOCI indexes, say.
func TestOrigin(t *testing.T) {
	tr := read(1, "x/0", "x/1", "y/0")
	tr.Blocks[2].Chunk.Algorithm = chunk.Origin
	if d := cmp.Diff(tr.Blocks[2], recode(t, tr).Blocks[len(recode(t, tr).Blocks)-1]); d != "" {
		t.Error(d)
	}
	if got := merge(t, tr, recode(t, tr)); len(got.Blocks) != 3 {
		t.Errorf("%q", show(got))
	}
}

// ids are runs in JSON.
func ids(n int) (s string) {
	for i := range n {
		s += fmt.Sprintf(`{"id":"%d"},`, i)
	}
	return s
}

func TestDecodeBad(t *testing.T) {
	good, err := os.ReadFile("testdata/trace.json")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		what, old, new string
		err            error
		text           string
	}{
		{"no JSON", "]}", "]", index.ErrCorrupt, "invalid character"},
		{"format", "shale-trace", "trace", index.ErrCorrupt, `format "trace"`},
		{"version", `"version":1`, `"version":2`, index.ErrUnsupported, "version 2"},
		{"chunk", "blake3:", "md5:", index.ErrCorrupt, "touch 0"},
		{"empty chunk", `"size":777`, `"size":0`, index.ErrCorrupt, "chunk of 0 bytes"},
		{"huge chunk", `"size":777`, `"size":16777217`, index.ErrCorrupt, "chunk of 16777217"},
		{"no blocks", `"blocks":1`, `"blocks":0`, index.ErrCorrupt, "0 blocks"},
		{"blocks behind the chunk", `"blocks":1`, `"blocks":2`, index.ErrCorrupt, "2 blocks from 0"},
		{"a block too far", `"block":4`, `"block":8`, index.ErrCorrupt, "from 8 on"},
		{"a block before", `"block":4`, `"block":-1`, index.ErrCorrupt, "from -1 on"},
		{"the same block", `"block":4`, `"block":0`, index.ErrCorrupt, "second time"},
		{"offset", `"offset":393216`, `"offset":-1`, index.ErrCorrupt, "offset -1"},
		{"offset far", `"offset":393216`, `"offset":9223372036854775807`, index.ErrCorrupt, "offset 9223"},
		{"others", `"others":2`, `"others":1`, index.ErrCorrupt, "1 other files, 2"},
		{"absolute", `"path":"usr`, `"path":"/usr`, index.ErrCorrupt, "below the root"},
		{"out of the root", `"path":"usr`, `"path":"../usr`, index.ErrCorrupt, "below the root"},
		{"another out", `"bin/ash"`, `"bin/../../ash"`, index.ErrCorrupt, "below the root"},
		{"no path", `"path":"x"`, `"path":""`, index.ErrCorrupt, "below the root"},
		{"long path", `"path":"x"`, `"path":"` + strings.Repeat("x", maxPath+1) + `"`, index.ErrCorrupt, "below the root"},
		{"time", `"at_ms":0`, `"at_ms":-1`, index.ErrCorrupt, "at -1 ms"},
		{"wait", `"wait_ms":0.01`, `"wait_ms":1e300`, index.ErrCorrupt, "waited 1e+300"},
		{"run", `"runs":[0]`, `"runs":[2]`, index.ErrCorrupt, "run 2 of 2"},
		{"run before", `"runs":[0]`, `"runs":[-1]`, index.ErrCorrupt, "run -1 of 2"},
		{"run twice", `"runs":[0]`, `"runs":[0,0]`, index.ErrCorrupt, "run 0 of 2"},
		{"no id", `"id":"run001"`, `"id":""`, index.ErrCorrupt, "run 0"},
		{"long id", `"id":"run001"`, `"id":"` + strings.Repeat("1", 65) + `"`, index.ErrCorrupt, "run 0"},
		{"the same id", `"id":"run002"`, `"id":"run001"`, index.ErrCorrupt, "run 1"},
		{"no version", `"version":1,`, ``, index.ErrCorrupt, "version 0"},
		{"no runs yet", `"runs":[{`, `"touches":[],"runs":[{`, index.ErrCorrupt, "runs behind touches"},
		{"runs again", `"runs":[{`, `"runs":[],"runs":[{`, index.ErrCorrupt, "or other runs"},
		{"touches again", `"touches":[`, `"touches":[],"touches":[`, index.ErrCorrupt, "behind other touches"},
		{"no list", `"touches":[`, `"touches":7,"x":[`, index.ErrCorrupt, `"7", want "["`},
		{"no object", `{"path":"usr`, `7,{"path":"usr`, index.ErrCorrupt, "number"},
		{"origin", "blake3:", "origin:x", index.ErrCorrupt, "touch 0"},
		{"many runs", `"runs":[{`, `"runs":[` + ids(MaxRuns) + `{`, index.ErrLimit, "more than 64 runs"},
	} {
		bad := strings.Replace(string(good), c.old, c.new, 1)
		if bad == string(good) {
			t.Errorf("%s: the golden file lacks %s", c.what, c.old)
		}
		_, err := Decode(strings.NewReader(bad), "the file")
		if !errors.Is(err, c.err) || !strings.Contains(fmt.Sprint(err), c.text) || !strings.Contains(fmt.Sprint(err), "the file") {
			t.Errorf("%s: %v, want %v ... %s", c.what, err, c.err, c.text)
		}
	}
	if _, err := Decode(bytes.NewReader(append(good, good...)), "x"); !errors.Is(err, index.ErrCorrupt) || !strings.Contains(err.Error(), "behind the end") {
		t.Error(err)
	}
	if _, err := Decode(bytes.NewReader(good[:len(good)-3]), "x"); !errors.Is(err, index.ErrCorrupt) || !strings.Contains(err.Error(), "unexpected EOF") {
		t.Error(err)
	}
	broken := errors.New("broken")
	if _, err := Decode(io.MultiReader(bytes.NewReader(good[:300]), iotest.ErrReader(broken)), "x"); !errors.Is(err, broken) {
		t.Error(err)
	}
	more := bytes.Replace(good, []byte(`"runs":[{`), []byte(`"later":{"a":[1,{"b":2}]},"runs":[{`), 1) // what a later program may add
	if _, err := Decode(bytes.NewReader(more), "x"); err != nil {
		t.Error(err)
	}
}

// endless repeats a text up to a length.
func endless(s string, length int64) io.Reader {
	return io.LimitReader(&repeat{s: s}, length)
}

type repeat struct {
	s  string
	at int
}

func (r *repeat) Read(p []byte) (n int, err error) {
	for n < len(p) {
		k := copy(p[n:], r.s[r.at:])
		n, r.at = n+k, (r.at+k)%len(r.s)
	}
	return n, nil
}

// Whatever a trace is, to read it takes little memory: of those that break a rule
// next to nothing, of others what their blocks take.
func TestDecodeMemory(t *testing.T) {
	const head = `{"format":"shale-trace","version":1,"manifest":"x","runs":[],`
	touch := func(path string) string {
		return `{"path":"` + path + `","chunk":"blake3:` + strings.Repeat("0", 64) + `","size":16777216,"block":0,"blocks":1,`
	}
	for what, c := range map[string]struct {
		in  io.Reader
		err error
		max int // MiB that are allocated in all
	}{
		"spaces":       {endless(" ", 1<<40), index.ErrLimit, 4},
		"spaces later": {io.MultiReader(strings.NewReader(head), endless(" ", 1<<40)), index.ErrLimit, 4},
		"empty":        {io.MultiReader(strings.NewReader(head+`"touches":[`), endless("{},", 1<<40)), index.ErrCorrupt, 4},
		"runs":         {io.MultiReader(strings.NewReader(`{"runs":[`), endless("{},", 1<<40)), index.ErrCorrupt, 4},
		"a string":     {io.MultiReader(strings.NewReader(`{"x":"`), endless("x", 1<<40)), index.ErrLimit, 4},
		"a key":        {io.MultiReader(strings.NewReader(`{"`), endless("x", 1<<40)), index.ErrLimit, 4},
		"a number":     {io.MultiReader(strings.NewReader(`{"version":`), endless("1", 1<<40)), index.ErrLimit, 4},
		"deep":         {io.MultiReader(strings.NewReader(`{"x":`), endless("[", 1<<40)), index.ErrCorrupt, 4},
		"also":         {io.MultiReader(strings.NewReader(head+`"touches":[`+touch("a")+`"others":9,"also":[`), endless(`"",`, 1<<40)), index.ErrLimit, 8},
		"its runs":     {io.MultiReader(strings.NewReader(head+`"touches":[`+touch("a")+`"runs":[`), endless(`0,`, 1<<40)), index.ErrLimit, 8},
		"a command":    {io.MultiReader(strings.NewReader(`{"runs":[{"id":"x","command":[`), endless(`"",`, 1<<40)), index.ErrLimit, 8},
		"many fields":  {io.MultiReader(strings.NewReader(`{"x":0`), endless(`,"x":0`, 1<<40)), index.ErrLimit, 4},
		"many blocks": {strings.NewReader(head + `"touches":[` + strings.TrimSuffix(strings.Repeat(strings.Replace(
			touch("a"), `"blocks":1`, `"blocks":1024`, 1)+`"at_ms":0},`, 1000), ",") + "]}"), index.ErrCorrupt, 8},
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := Decode(c.in, "x")
		runtime.ReadMemStats(&after)
		if got := int(after.TotalAlloc-before.TotalAlloc) >> 20; !errors.Is(err, c.err) || got > c.max {
			t.Errorf("%s: %v, %d MiB allocated; want %v and at most %d", what, err, got, c.err, c.max)
		}
	}
	// As much as may be: names that differ, and blocks.
	var b bytes.Buffer
	b.WriteString(head + `"touches":[`)
	for i := range MaxBlocks / 4 {
		fmt.Fprintf(&b, `{"path":"%0480d","chunk":"%s","size":131072,"block":0,"blocks":4,"at_ms":0},`, i, digest(fmt.Sprint(i)))
	}
	b.Truncate(b.Len() - 1)
	b.WriteString("]}")
	tr, err := Decode(&b, "x")
	if err != nil || len(tr.Blocks) != MaxBlocks {
		t.Fatal(err)
	}
}

func FuzzDecode(f *testing.F) {
	good, err := os.ReadFile("testdata/trace.json")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(bytes.Replace(good, []byte(`"runs":[0]`), []byte(`"runs":[]`), 1))
	f.Add(bytes.ReplaceAll(good, []byte("blake3:"), []byte("origin:")))
	f.Fuzz(func(t *testing.T, p []byte) {
		tr, err := Decode(bytes.NewReader(p), "x")
		if err != nil {
			if !errors.Is(err, index.ErrCorrupt) && !errors.Is(err, index.ErrLimit) && !errors.Is(err, index.ErrUnsupported) {
				t.Fatal(err)
			}
			return
		}
		for _, b := range tr.Blocks {
			if n := b.Bytes(); n <= 0 || n > chunk.Block || b.Offset < 0 || b.Runs > len(tr.Runs) {
				t.Fatalf("%+v", b)
			}
		}
		again := recode(t, merge(t, tr, tr))
		if len(again.Blocks) != len(tr.Blocks) || len(again.Runs) != len(tr.Runs) {
			t.Fatalf("%d blocks of %d runs became %d of %d", len(tr.Blocks), len(tr.Runs), len(again.Blocks), len(again.Runs))
		}
	})
}
