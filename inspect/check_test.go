package inspect

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/blobtest"
	"github.com/shale-image/shale/blob/memblob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/rafs"
)

func check(t *testing.T, im *Image) *Result {
	t.Helper()
	r, err := Check(t.Context(), im, nil)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

var goldens = []string{"zstd", "lz4", "none", "inline"}

func TestCheckGolden(t *testing.T) {
	for _, name := range goldens {
		boot, _ := goldenFiles(t, name)
		r := check(t, openFile(t, boot))
		// nydus-image's ids are not always digests of the whole file.
		if len(r.Defects) != 0 || len(r.Notes) > 1 || r.Objects != 1 || r.Chunks == 0 {
			t.Errorf("%s: %+v", name, r)
		}
	}
}

// TestCheckFixture has a blob whose name is not its digest.
func TestCheckFixture(t *testing.T) {
	base := os.Getenv("SHALE_FIXTURES")
	if base == "" {
		base = "../../shared/fixtures"
	}
	im, err := OpenFile(filepath.Join(base, "nydus", "rafs-v6-2.2.boot"), "")
	if err != nil {
		t.Skipf("no fixtures (set SHALE_FIXTURES to the directory that has nydus/): %v", err)
	}
	defer im.Close()
	r := check(t, im)
	if len(r.Defects) != 0 || r.Chunks != 2 || len(r.Notes) != 1 || !strings.Contains(r.Notes[0], "not its digest") {
		t.Errorf("%+v", r)
	}
}

// TestCheckFlips flips bytes of blobs that nothing else vouches for: not even
// their names do. Whatever the parts of a blob say of each other must show it.
func TestCheckFlips(t *testing.T) {
	for _, name := range goldens {
		boot, data := goldenFiles(t, name)
		whole, err := os.ReadFile(data)
		if err != nil {
			t.Fatal(err)
		}
		im := openFile(t, boot)
		info := im.RAFS.Blobs()[0]
		var toc *rafs.TOC // the blob of lz4 has none
		if info.Features&rafs.FeatureTOC != 0 {
			if toc, err = rafs.ReadTOC(bytes.NewReader(whole), int64(len(whole)), name); err != nil {
				t.Fatal(err)
			}
		}
		covered := func(off int) bool {
			if toc == nil {
				return off < int(info.InfoOffset+info.InfoLength)
			}
			for _, e := range toc.Entries {
				if off >= int(e.Offset) && off < int(e.Offset+e.Length) {
					return true
				}
			}
			return off >= len(whole)-int(toc.Size) && off < len(whole)-512 && name != "inline" // whose table nothing vouches for
		}
		for off := 0; off < len(whole); off += 37 {
			if !covered(off) {
				continue
			}
			p := bytes.Clone(whole)
			p[off] ^= 0x10
			write(t, data, p)
			im, err := OpenFile(boot, "")
			if err != nil { // the bootstrap is in the blob
				if name != "inline" || !errors.Is(err, index.ErrCorrupt) || !strings.Contains(err.Error(), data) {
					t.Errorf("%s, byte %d: %v", name, off, err)
				}
				continue
			}
			r := check(t, im)
			im.Close()
			if len(r.Defects) == 0 {
				t.Errorf("%s: byte %d flipped, no defect", name, off)
			}
			for _, d := range r.Defects {
				if !strings.Contains(d.Object, filepath.Base(data)) {
					t.Errorf("%s, byte %d: %+v does not name the blob", name, off, d)
				}
			}
		}
		write(t, data, whole)
	}
}

// TestCheckTables flips each byte of the blob and chunk tables of a bare
// bootstrap: it is an error, a defect, or nothing that reading depends on.
func TestCheckTables(t *testing.T) {
	boot, _ := goldenFiles(t, "zstd")
	whole, err := os.ReadFile(boot)
	if err != nil {
		t.Fatal(err)
	}
	want := sums(t, openFile(t, boot))
	head := whole[1152:1408] // the extended super block
	le := func(p []byte) (n int) {
		for i := 7; i >= 0; i-- {
			n = n<<8 | int(p[i])
		}
		return n
	}
	for _, table := range [][2]int{{le(head[8:]), 256}, {le(head[24:]), le(head[32:])}} {
		for off := table[0]; off < table[0]+table[1]; off++ {
			p := bytes.Clone(whole)
			p[off] ^= 0x01
			write(t, boot, p)
			im, err := OpenFile(boot, "")
			if err != nil {
				if !strings.Contains(err.Error(), boot) {
					t.Errorf("byte %d: %v does not name the bootstrap", off, err)
				}
				continue
			}
			if r := check(t, im); len(r.Defects) == 0 && sums(t, im) != want {
				t.Errorf("byte %d flipped: no defect, but other content", off)
			}
			im.Close()
		}
	}
}

// sums digests the content of all files.
func sums(t *testing.T, im *Image) string {
	t.Helper()
	var b strings.Builder
	err := im.Tree.Walk(func(path string, ino *index.Inode) error {
		s, err := sum(t.Context(), im.Tree, im.Source, ino)
		fmt.Fprintf(&b, "%s %d %x\n", path, ino.Size, s)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// TestOpenFileTruncated cuts a bare bootstrap and a blob with one.
func TestOpenFileTruncated(t *testing.T) {
	for _, name := range []string{"zstd", "inline"} {
		boot, _ := goldenFiles(t, name)
		whole, err := os.ReadFile(boot)
		if err != nil {
			t.Fatal(err)
		}
		for n := 0; n < len(whole); n += 512 {
			write(t, boot, whole[:n])
			im, err := OpenFile(boot, "")
			if err == nil { // what is missing may be padding
				if r := check(t, im); len(r.Defects) == 0 && name == "inline" {
					t.Errorf("%s: %d of %d bytes: no error", name, n, len(whole))
				}
				im.Close()
			} else if !errors.Is(err, index.ErrCorrupt) && !errors.Is(err, image.ErrNotImage) || !strings.Contains(err.Error(), boot) {
				t.Errorf("%s: %d bytes: %v", name, n, err)
			}
		}
	}
}

// TestCheckNames expects the place, the chunk and the files of a defect, once a
// chunk, in order, although windows are read several at a time.
func TestCheckNames(t *testing.T) {
	b := newBuilder(chunk.BLAKE3, 64<<10)
	p := random(20 << 20)
	b.add("a", b.file(p[:10<<20], nil))
	twice := b.add("b", b.file(p[10<<20:], nil))
	b.add("c", twice)
	im := b.image()
	bad := bytes.Clone(b.data.Bytes())
	bad[5<<20+3] ^= 1
	bad[15<<20] ^= 1
	im.Source = memblob.New(map[string][]byte{b.tree.Blobs[0].Digest: bad})
	var last int64
	r, err := Check(t.Context(), im, func(done, total int64) {
		if done <= last || total != 20<<20 {
			t.Errorf("progress %d of %d after %d", done, total, last)
		}
		last = done
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Defects) != 2 || len(r.Notes) != 1 || last != 20<<20 {
		t.Fatalf("%+v, progress %d", r, last)
	}
	for i, want := range []struct {
		off   int64
		files string
	}{{5 << 20, "/a"}, {15 << 20, "/b /c"}} {
		d := r.Defects[i]
		ch := im.Tree.Chunks[want.off>>16]
		if d.Offset != want.off || d.Length != 64<<10 || d.Chunk != ch.Digest.String() || strings.Join(d.Files, " ") != want.files {
			t.Errorf("%+v, want offset %d, files %s", d, want.off, want.files)
		}
	}
}

// TestCheckShort expects one defect of a blob that ends early, with the files
// that lose something.
func TestCheckShort(t *testing.T) {
	b := newBuilder(chunk.BLAKE3, 4096)
	b.add("a", b.file(random(8192), nil))
	b.add("b", b.file(random(12288), nil))
	im := b.image()
	for n, files := range map[int]string{0: "/a /b", 4095: "/a /b", 8192: "/b", 20479: "/b"} {
		im.Source = memblob.New(map[string][]byte{b.tree.Blobs[0].Digest: b.data.Bytes()[:n]})
		r := check(t, im)
		if len(r.Defects) != 1 || strings.Join(r.Defects[0].Files, " ") != files || r.Defects[0].Offset != int64(n) {
			t.Errorf("%d bytes: %+v, want files %s", n, r.Defects, files)
		}
	}
	im.Source = memblob.New(nil)
	if r := check(t, im); len(r.Defects) != 1 || len(r.Defects[0].Files) != 2 {
		t.Errorf("no blob: %+v", r.Defects)
	}
	im.Source = memblob.New(map[string][]byte{b.tree.Blobs[0].Digest: append(bytes.Clone(b.data.Bytes()), 0)})
	if r := check(t, im); len(r.Defects) != 1 || !strings.Contains(r.Defects[0].Problem, "goes on") {
		t.Errorf("longer blob: %+v", r.Defects)
	}
}

// failing fails each request that reaches past an offset.
type failing struct {
	blob.Source
	after int64
	err   error
}

func (f failing) Range(ctx context.Context, ref blob.Ref, off, n int64) (io.ReadCloser, error) {
	if off+n > f.after && off < 20<<20 {
		return nil, f.err
	}
	return f.Source.Range(ctx, ref, off, n)
}

// TestCheckFails tells failures to read from defects.
func TestCheckFails(t *testing.T) {
	b := newBuilder(chunk.BLAKE3, 1<<20)
	b.add("a", b.file(random(20<<20), nil))
	for _, after := range []int64{0, 9 << 20, 20<<20 - 1} {
		im := b.image()
		im.Source = failing{im.Source, after, blob.ErrUnavailable}
		if _, err := Check(t.Context(), im, nil); !errors.Is(err, blob.ErrUnavailable) {
			t.Errorf("after %d: %v", after, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	if _, err := Check(ctx, b.image(), func(int64, int64) { cancel() }); !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: %v", err)
	}
}

// TestCheckBatch expects the files of a batch with a defect, and of one chunk in
// it that has another digest only those of the chunk.
func TestCheckBatch(t *testing.T) {
	b := newBuilder(chunk.BLAKE3, 4096)
	text := func(s string) []byte { return bytes.Repeat([]byte(s), 500) }
	for i, ino := range b.batch(text("a"), text("b"), text("c")) {
		b.add(string(rune('a'+i)), ino)
	}
	for i, ino := range b.batch(text("d"), text("e")) {
		b.add(string(rune('d'+i)), ino)
	}
	b.add("f", b.file(random(5000), nil))
	im := b.image()
	if r := check(t, im); len(r.Defects) != 0 || r.Chunks != 7 || len(r.Notes) != 0 {
		t.Errorf("%+v", r)
	}
	first := b.blob.Spans[0]
	bad := bytes.Clone(b.data.Bytes())
	bad[first.Offset] ^= 1
	im.Source = memblob.New(map[string][]byte{b.blob.Digest: bad})
	r := check(t, im)
	if len(r.Defects) != 1 || strings.Join(r.Defects[0].Files, " ") != "/a /b /c" || r.Defects[0].Offset != first.Offset || r.Defects[0].Length != first.Length {
		t.Errorf("%+v", r.Defects)
	}
	im = b.image()
	im.Tree.Chunks[1].Digest.Sum[7] ^= 1
	if r = check(t, im); len(r.Defects) != 1 || strings.Join(r.Defects[0].Files, " ") != "/b" || r.Defects[0].Chunk != im.Tree.Chunks[1].Digest.String() {
		t.Errorf("%+v", r.Defects)
	}
	im.Tree.Chunks[1].Digest.Sum[7] ^= 1
	// What a batch takes is shared by its chunks.
	rep := Inspect(im)
	if got, most := rep.Content.Stored, b.blob.Spans[2].Length+b.blob.Spans[3].Length+first.Length+b.blob.Spans[1].Length; got > most || got < most-5 {
		t.Errorf("%d stored bytes, want %d or hardly less", got, most)
	}
	for i, n := range []int64{first.Offset, first.Offset + first.Length - 1} { // cut in the first batch
		im.Source = memblob.New(map[string][]byte{b.blob.Digest: b.data.Bytes()[:n]})
		if r := check(t, im); len(r.Defects) != 1 || len(r.Defects[0].Files) != 6 {
			t.Errorf("%d: %+v", i, r.Defects)
		}
	}
}

// TestPlan cuts objects with spans and gaps of any size, and objects that end
// early: windows tile the object, are not endless, and have their spans inside.
func TestPlan(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	for round := range 300 {
		b := index.Blob{}
		im := &Image{Tree: &index.Tree{}}
		end := int64(0)
		for range rnd.IntN(60) {
			n := 1 + rnd.Int64N(1<<(4+rnd.Uint32N(21)))
			if rnd.IntN(3) == 0 {
				end += rnd.Int64N(1 << (1 + rnd.Uint32N(23)))
			}
			im.Tree.Chunks = append(im.Tree.Chunks, index.Chunk{Size: 1, Offset: b.Append(index.Span{Size: 2 * n, Offset: end, Length: n, Codec: chunk.Zstd})})
			end += n
		}
		size := end + rnd.Int64N(5<<20) + 1
		b.Size, im.Tree.Blobs = size, []index.Blob{b}
		if rnd.IntN(3) == 0 {
			size = 1 + rnd.Int64N(size)
		}
		if err := im.Tree.CheckSpans(); err != nil {
			t.Fatal(err)
		}
		c := &checker{im: im, res: &Result{}}
		c.list()
		o := c.objects[0]
		o.size = size
		end = 0
		planned := map[int64]bool{}
		chunks := 0
		for _, w := range c.plan(o) {
			if w.off != end || w.n <= 0 || w.n > windowSize+chunk.MaxSize {
				t.Fatalf("round %d: window at %d of %d bytes after %d", round, w.off, w.n, end)
			}
			end = w.off + w.n
			for _, s := range w.spans {
				if s.Offset+s.Length > size {
					continue // cut off
				}
				if s.Offset < w.off || s.Offset+s.Length > end || planned[s.Start] {
					t.Fatalf("round %d: span %+v is not in window %d+%d, or planned twice", round, s, w.off, w.n)
				}
				planned[s.Start] = true
				chunks += len(c.chunksIn(o, &s))
			}
		}
		cut := 0
		for _, s := range b.Spans {
			if s.Offset+s.Length > size {
				cut++
			}
		}
		if end != size || len(planned)+cut != len(b.Spans) || chunks != len(planned) || len(c.res.Defects) != 0 {
			t.Fatalf("round %d: windows end at %d of %d; %d spans, %d planned with %d chunks, %d cut off", round, end, size, len(b.Spans), len(planned), chunks, cut)
		}
	}
}

func TestLength(t *testing.T) {
	p := random(1000)
	ref := blobtest.Ref(p)
	for _, size := range []int64{0, 1, 999, 1000, 1001, 5000, 1 << 40} {
		src := memblob.New(map[string][]byte{ref.Digest: p})
		got, err := length(t.Context(), src, blob.Ref{Digest: ref.Digest, Size: size})
		if want := min(size+1, 1000); err != nil || got != want {
			t.Errorf("size %d: %d, %v; want %d", size, got, err, want)
		}
	}
}
