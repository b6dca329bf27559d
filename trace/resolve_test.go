package trace

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/link"
	"github.com/shale-image/shale/pool"
)

// tree makes an index whose files have chunks of this many bytes, by name.
type tree struct {
	index.Tree
	chunks map[string]uint32
}

func newTree() *tree {
	t := &tree{chunks: map[string]uint32{}}
	t.Root = directory()
	t.Blobs = []index.Blob{{Digest: manifest}}
	return t
}

func directory() *index.Inode {
	return &index.Inode{Mode: syscall.S_IFDIR | 0o755, Children: map[string]*index.Inode{}}
}

// chunk is the chunk with a name, all of the size of a cut.
func (t *tree) chunk(name string) uint32 {
	n, ok := t.chunks[name]
	if !ok {
		n = uint32(len(t.Chunks))
		t.chunks[name] = n
		off := int64(n) * chunk.Size
		start := t.Blobs[0].Append(index.Span{Size: chunk.Size, Length: chunk.Size, Offset: off})
		t.Chunks = append(t.Chunks, index.Chunk{Digest: digest(name), Size: chunk.Size, Offset: start})
	}
	return n
}

// file makes a file of chunks, "" being a hole as large as one.
func (t *tree) file(chunks ...string) *index.Inode {
	f := &index.Inode{Mode: syscall.S_IFREG | 0o644, Size: int64(len(chunks)) * chunk.Size}
	for i, name := range chunks {
		if name != "" {
			f.Extents = append(f.Extents, index.Extent{Off: int64(i) * chunk.Size, Chunk: t.chunk(name)})
		}
	}
	return f
}

func (t *tree) link(tb testing.TB, p *pool.Pool) *link.Image {
	tb.Helper()
	dir := filepath.Join(tb.TempDir(), "linked")
	if err := link.Link(tb.Context(), &t.Tree, p, dir); err != nil {
		tb.Fatal(err)
	}
	l, err := link.Open(dir)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { l.Close() })
	return l
}

func openPool(tb testing.TB) *pool.Pool {
	tb.Helper()
	p, err := pool.Open(filepath.Join(tb.TempDir(), "pool"))
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { p.Close() })
	return p
}

// flat is the flat address of a block of a chunk.
func flat(t testing.TB, l *link.Image, name string, block int) Touch {
	t.Helper()
	for i := range l.Chunks() {
		if c := l.Chunk(i); c.Digest == digest(name) {
			return Touch{Flat: c.Flat + int64(block)*chunk.Block, At: time.Duration(block) * time.Millisecond, Wait: time.Millisecond}
		}
	}
	t.Fatalf("no chunk %s", name)
	return Touch{}
}

func TestResolve(t *testing.T) {
	p, tr := openPool(t), newTree()
	usr, lib := directory(), directory()
	root := tr.Root.Children
	root["usr"], root["copy"] = usr, tr.file("same")
	usr.Children["lib"] = lib
	usr.Children["empty"] = &index.Inode{Mode: syscall.S_IFREG}
	lib.Children["libc"] = tr.file("c0", "c1", "shared")
	lib.Children["sparse"] = tr.file("", "s1", "", "", "s4", "s4")
	lib.Children["sum"] = tr.file("shared", "x")
	hard := tr.file("hard")
	root["a-hard"], usr.Children["hard"] = hard, hard
	root["link"] = &index.Inode{Mode: syscall.S_IFLNK | 0o777, Target: "usr"}
	for i := range maxOwners + 10 {
		usr.Children[fmt.Sprintf("same%03d", i)] = tr.file("same")
	}
	// Chunks of another image come first in its flat address space.
	other := newTree()
	other.Root.Children["f"] = other.file("c0", "s1", "unrelated")
	other.link(t, p)
	l := tr.link(t, p)
	if len(l.Segments) != 2 {
		t.Fatalf("%d segments", len(l.Segments))
	}

	got, err := Resolve(l, manifest, run(1), []Touch{
		flat(t, l, "c1", 3), flat(t, l, "shared", 2), flat(t, l, "s1", 0), flat(t, l, "s4", 3), flat(t, l, "hard", 0), flat(t, l, "same", 1),
		{Flat: l.FlatSize}, {Flat: l.Segments[0].Flat - chunk.Block}, // no file's
	})
	if err != nil {
		t.Fatal(err)
	}
	at := func(path string, n int64) string { return fmt.Sprintf("%s@%d", path, n) }
	want := []string{
		at("usr/lib/libc", chunk.Size+3*chunk.Block),
		at("usr/lib/libc", 2*chunk.Size+2*chunk.Block), // also sum's, of which nothing else was read
		at("usr/lib/sparse", chunk.Size),
		at("usr/lib/sparse", 4*chunk.Size+3*chunk.Block), // twice in it: the first
		at("a-hard", 0),
		at("copy", chunk.Block),
	}
	var paths []string
	for _, b := range got.Blocks {
		paths = append(paths, at(b.Path, b.Offset))
		if b.Size != chunk.Size || b.Runs != 1 || b.By != 1 || b.At != time.Duration(b.Index)*time.Millisecond || b.Wait != time.Millisecond {
			t.Errorf("%+v", b)
		}
	}
	if !slices.Equal(paths, want) {
		t.Errorf("%q, want %q", paths, want)
	}
	for i, c := range []struct {
		others, also int
		first        string
	}{{0, 0, ""}, {1, 1, "usr/lib/sum"}, {0, 0, ""}, {0, 0, ""}, {0, 0, ""}, {maxOwners + 10, maxAlso, "usr/same000"}} {
		b := got.Blocks[i]
		if b.Others != c.others || len(b.Also) != c.also || c.also > 0 && b.Also[0] != c.first {
			t.Errorf("%s: %d others, %q; want %+v", b.Path, b.Others, b.Also, c)
		}
	}
	if got.Manifest != manifest || len(got.Runs) != 1 || got.Runs[0].ID != "run001" {
		t.Errorf("%s, %+v", got.Manifest, got.Runs)
	}
	recode(t, got)
}

// If sum is read for its own sake the chunk it shares with an earlier file is its.
func TestResolveLikeliest(t *testing.T) {
	p, tr := openPool(t), newTree()
	tr.Root.Children["a"], tr.Root.Children["b"] = tr.file("shared", "of a"), tr.file("shared", "of b")
	l := tr.link(t, p)
	for name, want := range map[string]string{"of a": "a", "of b": "b"} {
		got, err := Resolve(l, manifest, run(1), []Touch{flat(t, l, "shared", 0), flat(t, l, name, 0)})
		if err != nil || !slices.Equal(names(got), []string{want}) {
			t.Errorf("%q, %v; want %s", names(got), err, want)
		}
	}
}

func TestResolveNothing(t *testing.T) {
	tr := newTree()
	tr.Root.Children["a"] = tr.file("a")
	l := tr.link(t, openPool(t))
	got, err := Resolve(l, manifest, run(1), nil)
	if err != nil || len(got.Blocks) != 0 || len(names(got)) != 0 {
		t.Errorf("%+v, %v", got, err)
	}
	if l.Close(); true {
		if _, err := Resolve(l, manifest, run(1), []Touch{flat(t, l, "a", 0)}); err == nil || errors.Is(err, index.ErrCorrupt) {
			t.Errorf("of an image that is closed: %v", err)
		}
	}
}
