package reader

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/shale-image/shale/blob/memblob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/content"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/artifact"
)

// text is n bytes that compress to less than half.
func text(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, 7))
	p := make([]byte, 0, n+16)
	for len(p) < n {
		for x := r.Uint64() & r.Uint64(); x != 0; x >>= 4 {
			p = append(p, "etaoin shrdlu\n,."[x&15])
		}
	}
	return p[:n]
}

// files are the content of a tree: two layers, the second over the first.
var files = []map[string][]byte{
	{"empty": nil, "small": text(1, 100), "chunk": text(2, chunk.Size), "more": text(3, chunk.Size+1), "big": text(4, 1<<20+5),
		"hidden": text(5, 700_000), "zeros": make([]byte, 300_000), "a/b/deep": text(6, 50_000), "same": text(4, 1<<20+5)},
	{"small": text(7, 200), "upper": text(8, 1<<20), "twice": text(3, chunk.Size+1), ".wh.hidden": nil},
}

func archive(t testing.TB, files map[string][]byte) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for name, p := range files {
		if err := errors.Join(w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(p)), Typeflag: tar.TypeReg})); err != nil {
			t.Fatal(err)
		}
		w.Write(p)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// sparse is an archive of a file with holes that begin and end anywhere.
func sparse(t testing.TB) (tarball, want []byte) {
	dir := t.TempDir()
	want = make([]byte, 1<<20)
	for _, at := range []int{0, 5000, 150_000, 700_001} {
		copy(want[at/4096*4096:], text(uint64(at), 9000))
	}
	f, err := os.Create(filepath.Join(dir, "sparse"))
	if err != nil {
		t.Fatal(err)
	}
	for off := 0; off < len(want); off += 4096 {
		if p := want[off : off+4096]; len(bytes.Trim(p, "\x00")) > 0 {
			f.WriteAt(p, int64(off))
		}
	}
	f.Truncate(int64(len(want)))
	f.Close()
	if tarball, err = exec.Command("tar", "-C", dir, "-S", "-cf", "-", "sparse").Output(); err != nil {
		t.Skip("tar:", err)
	}
	return tarball, want
}

type job struct {
	Job
	src *memblob.Source
}

// newJob makes an image of archives, compressed.
func newJob(compress func([]byte) []byte, archives ...[]byte) *job {
	j := &job{src: memblob.New(nil)}
	var stored [][]byte
	for _, a := range archives {
		p := compress(a)
		ref := j.src.Put(p)
		stored = append(stored, p)
		j.Layers = append(j.Layers, image.Descriptor{Digest: ref.Digest, Size: ref.Size})
		j.DiffIDs = append(j.DiffIDs, fmt.Sprintf("sha256:%x", sha256.Sum256(a)))
	}
	j.Manifest = "sha256:" + strings.Repeat("0", 64)
	j.Open = func(_ context.Context, n int) (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(stored[n])), nil
	}
	return j
}

// make makes the index, and returns the tree as another node would read it.
func (j *job) make(t *testing.T) (*Made, *index.Tree) {
	t.Helper()
	m, err := Make(t.Context(), j.Job)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	if m.Side.Size > 0 {
		r, err := m.OpenSide()
		if err != nil {
			t.Fatal(err)
		}
		p, err := io.ReadAll(r)
		if ref := j.src.Put(p); err != nil || ref.Digest != m.Side.Digest {
			t.Fatalf("the side is %s, want %s; %v", ref.Digest, m.Side.Digest, err)
		}
	}
	tree, err := j.local(t, m).Tree()
	if err != nil {
		t.Fatal(err)
	}
	return m, tree
}

func (j *job) check(t *testing.T, tree *index.Tree, path string, want []byte) {
	t.Helper()
	ino, err := tree.Lookup(path)
	if err != nil {
		t.Fatal(err)
	}
	var got bytes.Buffer
	if err := content.Copy(t.Context(), &got, tree, j.src, ino); err != nil || !bytes.Equal(got.Bytes(), want) {
		t.Errorf("%s: %d bytes, want %d; %v", path, got.Len(), len(want), err)
	}
}

func gzipped(p []byte) []byte {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	w.Write(p)
	w.Close()
	return b.Bytes()
}

func zstded(frame int) func([]byte) []byte {
	return func(p []byte) []byte {
		e, _ := zstd.NewWriter(nil)
		var out []byte
		for len(p) > 0 {
			n := min(frame, len(p))
			out = e.EncodeAll(p[:n], out)
			out = append(out, "\x50\x2a\x4d\x18\x03\x00\x00\x00abc"...) // a skippable frame
			p = p[n:]
		}
		return out
	}
}

func piped(t *testing.T, args ...string) func([]byte) []byte {
	return func(p []byte) []byte {
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Stdin = bytes.NewReader(p)
		out, err := cmd.Output()
		if err != nil {
			t.Skip(args[0], err)
		}
		return out
	}
}

func TestMake(t *testing.T) {
	for name, compress := range map[string]func(*testing.T) func([]byte) []byte{
		"plain":     func(*testing.T) func([]byte) []byte { return func(p []byte) []byte { return p } },
		"gzip":      func(*testing.T) func([]byte) []byte { return gzipped },
		"gzip -1":   func(t *testing.T) func([]byte) []byte { return piped(t, "gzip", "-1") },
		"pigz":      func(t *testing.T) func([]byte) []byte { return piped(t, "pigz", "-p2") },
		"bgzip":     func(t *testing.T) func([]byte) []byte { return piped(t, "bgzip") },
		"zstd":      func(*testing.T) func([]byte) []byte { return zstded(1 << 30) },
		"zstd 64K":  func(*testing.T) func([]byte) []byte { return zstded(64 << 10) },
		"zstd 900K": func(*testing.T) func([]byte) []byte { return zstded(900_001) },
	} {
		t.Run(name, func(t *testing.T) {
			odd, want := sparse(t)
			j := newJob(compress(t), archive(t, files[0]), archive(t, files[1]), odd)
			_, tree := j.make(t)
			for name, p := range files[0] {
				if name != "small" && name != "hidden" {
					j.check(t, tree, name, p)
				}
			}
			for _, name := range []string{"small", "upper", "twice"} {
				j.check(t, tree, name, files[1][name])
			}
			j.check(t, tree, "sparse", want)
			if _, err := tree.Lookup("hidden"); err == nil {
				t.Error("a file that is whited out is there")
			}
			if ino, _ := tree.Lookup("zeros"); len(ino.Extents) > 0 {
				t.Error("zeros are no hole")
			}
		})
	}
}

// The same image gives the same bytes; what is kept is what files have.
func TestMakeIsReproducible(t *testing.T) {
	var first *Made
	for range 4 {
		j := newJob(gzipped, archive0, archive1)
		kept := make(chan chunk.Digest, 1000)
		j.Keep = func(d chunk.Digest, p []byte) error {
			kept <- d
			return d.Verify(p)
		}
		m, tree := j.make(t)
		close(kept)
		have := map[chunk.Digest]bool{}
		for d := range kept {
			have[d] = true
		}
		for _, c := range tree.Chunks {
			if !have[c.Digest] {
				t.Fatalf("chunk %v was not kept", c.Digest)
			}
		}
		if first == nil {
			first = m
		}
		if !bytes.Equal(m.Encoded, first.Encoded) || m.Side.Digest != first.Side.Digest {
			t.Fatal("another index of the same image")
		}
	}
}

// archives in an order that does not change.
var archive0, archive1 = fixed(files[0]), fixed(files[1])

func fixed(files map[string][]byte) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, name := range []string{"small", "chunk", "more", "big", "upper", "twice"} {
		if p, ok := files[name]; ok {
			w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(p)), Typeflag: tar.TypeReg})
			w.Write(p)
		}
	}
	w.Close()
	return b.Bytes()
}

func TestMakeRefuses(t *testing.T) {
	bomb := func(p []byte) []byte {
		e, _ := zstd.NewWriter(nil)
		return e.EncodeAll(make([]byte, 400<<20), nil)
	}
	broken := errors.New("the network is gone")
	for name, c := range map[string]struct {
		change func(*job)
		want   error
	}{
		"another DiffID":     {func(j *job) { j.DiffIDs[1] = "sha256:" + strings.Repeat("1", 64) }, index.ErrCorrupt},
		"fewer DiffIDs":      {func(j *job) { j.DiffIDs = j.DiffIDs[1:] }, index.ErrCorrupt},
		"cut off":            {func(j *job) { j.cut(1, func(p []byte) []byte { return p[:len(p)-20] }) }, index.ErrCorrupt},
		"not an archive":     {func(j *job) { j.cut(0, func([]byte) []byte { return gzipped(text(1, 5000)) }) }, index.ErrCorrupt},
		"a bomb":             {func(j *job) { j.cut(0, bomb) }, index.ErrLimit},
		"too many entries":   {func(j *job) { j.Limits = index.Limits{Entries: 3} }, index.ErrLimit},
		"too many in all":    {func(j *job) { j.Limits = index.Limits{Entries: 5} }, index.ErrLimit},
		"cannot be opened":   {func(j *job) { j.Open = func(context.Context, int) (io.ReadCloser, error) { return nil, broken } }, broken},
		"cannot be kept":     {func(j *job) { j.Keep = func(chunk.Digest, []byte) error { return broken } }, broken},
		"fails half-way":     {func(j *job) { j.fail(1, broken) }, broken},
		"fails at its start": {func(j *job) { j.Open = opensBroken(broken) }, broken},
	} {
		t.Run(name, func(t *testing.T) {
			j := newJob(gzipped, archive0, archive1)
			c.change(j)
			if _, err := Make(t.Context(), j.Job); !errors.Is(err, c.want) {
				t.Errorf("%v, want %v", err, c.want)
			}
		})
	}
}

// cut has layer n read as something else.
func (j *job) cut(n int, change func([]byte) []byte) {
	open := j.Open
	j.Open = func(ctx context.Context, i int) (io.ReadCloser, error) {
		r, err := open(ctx, i)
		if err != nil || i != n {
			return r, err
		}
		p, err := io.ReadAll(r)
		return io.NopCloser(bytes.NewReader(change(p))), err
	}
}

// fail has reading layer n fail after some bytes.
func (j *job) fail(n int, with error) {
	open := j.Open
	j.Open = func(ctx context.Context, i int) (io.ReadCloser, error) {
		r, err := open(ctx, i)
		if err != nil || i != n {
			return r, err
		}
		return io.NopCloser(io.MultiReader(io.LimitReader(r, 100_000), brokenReader{with})), nil
	}
}

func opensBroken(err error) func(context.Context, int) (io.ReadCloser, error) {
	return func(context.Context, int) (io.ReadCloser, error) { return io.NopCloser(brokenReader{err}), nil }
}

type brokenReader struct{ err error }

func (e brokenReader) Read([]byte) (int, error) { return 0, e.err }

// An index that is not the image's is refused before anything is made of it.
func TestForeignIndex(t *testing.T) {
	j := newJob(gzipped, archive0, archive1)
	m, _ := j.make(t)
	read := func(manifest string, layers []image.Descriptor, side image.Descriptor, encoded []byte) error {
		f, err := os.Create(filepath.Join(t.TempDir(), "index"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		f.Write(encoded)
		raw, err := LocalIndex(manifest, layers, f, side)
		if err != nil {
			t.Fatal(err)
		}
		_, err = raw.Tree()
		return err
	}
	other := "sha256:" + strings.Repeat("f", 64)
	swapped := []image.Descriptor{j.Layers[1], j.Layers[0]}
	short := []image.Descriptor{j.Layers[0], {Digest: j.Layers[1].Digest, Size: 100}}
	beyond, err := artifact.Encode(func() *index.Tree {
		tree := *m.Tree
		tree.Blobs = append([]index.Blob(nil), tree.Blobs...)
		spans := append([]index.Span(nil), tree.Blobs[0].Spans...)
		spans[len(spans)-1].Length += 1 << 30
		tree.Blobs[0].Spans = spans
		tree.Blobs[0].Size = 0
		return &tree
	}(), artifact.Info{Manifest: j.Manifest, DiffIDs: j.DiffIDs}, index.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	for name, err := range map[string]error{
		"of another image":  read(other, j.Layers, m.Side, m.Encoded),
		"of other layers":   read(j.Manifest, swapped, m.Side, m.Encoded),
		"of fewer layers":   read(j.Manifest, j.Layers[:1], m.Side, m.Encoded),
		"of shorter layers": read(j.Manifest, short, m.Side, m.Encoded),
		"with another side": read(j.Manifest, j.Layers, image.Descriptor{Digest: other, Size: m.Side.Size}, m.Encoded),
		"beyond its layers": read(j.Manifest, j.Layers, m.Side, beyond),
		"cut off":           read(j.Manifest, j.Layers, m.Side, m.Encoded[:len(m.Encoded)/2]),
		"nothing":           read(j.Manifest, j.Layers, m.Side, nil),
	} {
		if !errors.Is(err, index.ErrCorrupt) {
			t.Errorf("an index %s: %v", name, err)
		}
	}
	if err := read(j.Manifest, j.Layers, m.Side, m.Encoded); err != nil {
		t.Error(err)
	}
}

// TestCutLike: what Shale has never cut says nothing.
func TestCutLike(t *testing.T) {
	for want, all := range map[uint32][][]uint32{
		chunk.Size:    {nil, {1, chunk.Size}, {chunk.Earlier, chunk.Earlier + 1}, {chunk.MaxSize}},
		chunk.Earlier: {{1, chunk.Size + 1}, {chunk.Earlier, 5}},
	} {
		for _, sizes := range all {
			if got := CutLike(len(sizes), func(i int) uint32 { return sizes[i] }); got != want {
				t.Errorf("%v: %d, want %d", sizes, got, want)
			}
		}
	}
}
