package rafs

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// written is an image this package wrote.
type written struct {
	tree    *index.Tree
	boot    []byte
	blobs   [][]byte
	infos   []BlobInfo
	content map[*index.Inode][]byte // of regular files
}

// builder makes a tree and its blobs, as a converter would.
type builder struct {
	t       testing.TB
	o       BlobOptions
	batch   int // bytes of small files that are compressed together; 0: none are
	out     []*bytes.Buffer
	w       []*BlobWriter
	own     [][]uint32 // chunks of the tree, by blob and as it has them
	open    []batch    // by blob
	known   map[chunk.Digest]uint32
	tree    *index.Tree
	content map[*index.Inode][]byte
}

// batch is one that is being filled.
type batch struct {
	pieces []Piece
	raw    []byte
}

func newBuilder(t testing.TB, o BlobOptions, blobs int) *builder {
	b := &builder{t: t, o: o, known: map[chunk.Digest]uint32{}, content: map[*index.Inode][]byte{},
		tree: &index.Tree{Root: dir(0o755, nil)}, own: make([][]uint32, blobs), open: make([]batch, blobs)}
	for range blobs {
		b.out = append(b.out, new(bytes.Buffer))
		b.w = append(b.w, NewBlobWriter(b.out[len(b.out)-1], o))
	}
	return b
}

func dir(mode uint32, children map[string]*index.Inode) *index.Inode {
	if children == nil {
		children = map[string]*index.Inode{}
	}
	return &index.Inode{Mode: syscall.S_IFDIR | mode, Children: children, Mtime: index.Time{Sec: 1e9, Nsec: 5}}
}

func (b *builder) chunk(blob int, p []byte) uint32 {
	d := chunk.Sum(b.o.Digester, p)
	if at, ok := b.known[d]; ok {
		return at
	}
	codec := b.o.Compressor
	stored, ok := codec.Encode(nil, p)
	if !ok {
		codec, stored = chunk.None, p
	}
	if _, err := b.w[blob].Add(uint32(len(p)), d, codec, stored); err != nil {
		b.t.Fatal(err)
	}
	return b.add(blob, Piece{uint32(len(p)), d})
}

// small adds a chunk to the batch of a blob.
func (b *builder) small(blob int, p []byte) uint32 {
	d := chunk.Sum(b.o.Digester, p)
	if at, ok := b.known[d]; ok {
		return at
	}
	open := &b.open[blob]
	if len(open.raw)+len(p) > b.batch {
		b.flush(blob)
	}
	open.pieces, open.raw = append(open.pieces, Piece{uint32(len(p)), d}), append(open.raw, p...)
	at := uint32(len(b.tree.Chunks))
	b.known[d] = at
	b.tree.Chunks = append(b.tree.Chunks, index.Chunk{Digest: d, Size: uint32(len(p)), Blob: uint32(blob)})
	return at
}

// flush writes a batch, a single chunk as such.
func (b *builder) flush(blob int) {
	b.t.Helper()
	open := b.open[blob]
	b.open[blob] = batch{}
	stored, ok := b.o.Compressor.Encode(nil, open.raw)
	var err error
	switch {
	case len(open.pieces) == 0:
		return
	case ok && len(open.pieces) > 1:
		_, err = b.w[blob].AddBatch(open.pieces, stored)
	default:
		raw := open.raw
		for _, p := range open.pieces {
			codec, part := chunk.None, raw[:p.Size]
			if ok {
				codec, part = b.o.Compressor, stored
			}
			if _, e := b.w[blob].Add(p.Size, p.Digest, codec, part); e != nil {
				err = e
			}
			raw = raw[p.Size:]
		}
	}
	if err != nil {
		b.t.Fatal(err)
	}
	for _, p := range open.pieces {
		b.own[blob] = append(b.own[blob], b.known[p.Digest])
	}
}

// add enters a chunk that a blob has now.
func (b *builder) add(blob int, p Piece) uint32 {
	at := uint32(len(b.tree.Chunks))
	b.known[p.Digest] = at
	b.own[blob] = append(b.own[blob], at)
	b.tree.Chunks = append(b.tree.Chunks, index.Chunk{Digest: p.Digest, Size: p.Size, Blob: uint32(blob)})
	return at
}

// file makes a file; whole chunks of zeros become holes.
func (b *builder) file(blob int, p []byte) *index.Inode {
	ino := &index.Inode{Mode: syscall.S_IFREG | 0o644, Size: int64(len(p)), Mtime: index.Time{Sec: 1e9, Nsec: 5}}
	step := int(b.o.ChunkSize)
	for off := 0; off < len(p); off += step {
		part := p[off:min(off+step, len(p))]
		if len(part) == step && bytes.Count(part, []byte{0}) == step {
			continue
		}
		at := uint32(0)
		if len(p) < step && b.batch > 0 { // as convert does
			at = b.small(blob, part)
		} else {
			at = b.chunk(blob, part)
		}
		ino.Extents = append(ino.Extents, index.Extent{Off: int64(off), Chunk: at})
	}
	b.content[ino] = p
	return ino
}

func (b *builder) finish() *written {
	b.t.Helper()
	for i := range b.w {
		b.flush(i)
	}
	if NeedsZeros(b.tree) {
		r, d, _, err := b.w[0].AddZeros()
		if err != nil {
			b.t.Fatal(err)
		}
		b.add(0, Piece{r.Size, d})
	}
	w := &written{tree: b.tree, content: b.content}
	for i := range b.w {
		info, err := b.w[i].Close()
		if err != nil {
			b.t.Fatal(err)
		}
		w.infos = append(w.infos, info)
		w.blobs = append(w.blobs, b.out[i].Bytes())
		spans, offsets := info.Spans()
		for k, n := range b.own[i] {
			b.tree.Chunks[n].Offset = offsets[k]
		}
		b.tree.Blobs = append(b.tree.Blobs, index.Blob{Digest: info.Digest(), Size: info.Size, Spans: spans})
	}
	var boot bytes.Buffer
	if err := WriteBootstrap(&boot, b.tree, w.infos, b.o); err != nil {
		b.t.Fatal(err)
	}
	w.boot = boot.Bytes()
	return w
}

// sample makes an image with everything a tree may have, in two blobs.
func sample(t testing.TB, o kind) *written {
	b := newBuilder(t, o.BlobOptions, 2)
	b.batch = o.batch
	rnd := rand.NewChaCha8([32]byte{1})
	noise := make([]byte, 3*int(o.ChunkSize)+1234)
	rnd.Read(noise)
	text := []byte(strings.Repeat("all work and no play makes jack a dull boy\n", int(o.ChunkSize)/16))
	sparse := make([]byte, 6*int(o.ChunkSize)+77)
	copy(sparse[2*int(o.ChunkSize):], "middle")
	odd := append(bytes.Clone(text[:o.ChunkSize]), noise[:1]...)
	mtime := index.Time{Sec: -5, Nsec: 999999999}
	hard := b.file(0, text)
	hard.Xattrs = []index.Xattr{{Name: "security.capability", Value: "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"},
		{Name: "trusted.x", Value: ""}, {Name: "user.mime", Value: "text/plain"}}
	owned := b.file(1, noise)
	owned.UID, owned.GID, owned.Mode = 1000, 70000, syscall.S_IFREG|0o4755
	tail := make([]byte, 2*int(o.ChunkSize)) // ends in a whole hole
	copy(tail, "head")
	if o.batch > 0 { // files use the batch, but not this
		b.small(1, []byte("unused content\n"))
	}
	many := map[string]*index.Inode{}
	for i := range 400 {
		many[fmt.Sprintf("name-%04d", i)] = b.file(i%2, fmt.Appendf(nil, "content %d\n", i%50))
	}
	b.tree.Root.Children = map[string]*index.Inode{
		"a": dir(0o1777, map[string]*index.Inode{"hard": hard, "many": dir(0o700, many)}), "text": hard,
		"noise": owned, "sparse": b.file(1, sparse), "tail": b.file(0, tail), "odd": b.file(1, odd), "empty": b.file(0, nil),
		"hole": b.file(0, make([]byte, o.ChunkSize)), "same": b.file(1, text),
		"link":      {Mode: syscall.S_IFLNK | 0o777, Target: "a/hard", Mtime: mtime},
		"fifo":      {Mode: syscall.S_IFIFO | 0o600, Mtime: mtime},
		"null":      {Mode: syscall.S_IFCHR | 0o666, Rdev: 0x103, Mtime: mtime},
		"disk":      {Mode: syscall.S_IFBLK | 0o660, Rdev: 0x11110370, Mtime: mtime},
		"empty dir": dir(0o755, nil),
	}
	b.tree.Root.Children["a"].Xattrs = []index.Xattr{{Name: "trusted.overlay.opaque", Value: "y"}}
	return b.finish()
}

// kind is a kind of image.
type kind struct {
	BlobOptions
	batch int
}

func options(f func(kind)) {
	for _, codec := range []chunk.Codec{chunk.None, chunk.Zstd, chunk.LZ4} {
		for _, d := range []chunk.Algorithm{chunk.BLAKE3, chunk.SHA256} {
			f(kind{BlobOptions{ChunkSize: 16 << 10, Compressor: codec, Digester: d}, 0})
		}
	}
	f(kind{BlobOptions{ChunkSize: MinChunkSize, Compressor: chunk.Zstd, Digester: chunk.BLAKE3}, 0})
	f(kind{BlobOptions{ChunkSize: 1 << 20, Compressor: chunk.Zstd, Digester: chunk.SHA256}, 0})
	f(kind{BlobOptions{ChunkSize: 16 << 10, Compressor: chunk.Zstd, Digester: chunk.BLAKE3}, 100})
	f(kind{BlobOptions{ChunkSize: 16 << 10, Compressor: chunk.LZ4, Digester: chunk.SHA256}, 1000})
	f(kind{BlobOptions{ChunkSize: 128 << 10, Compressor: chunk.Zstd, Digester: chunk.BLAKE3}, 256 << 10})
}

func (o kind) String() string {
	s := fmt.Sprintf("%v-%v-%d", o.Compressor, o.Digester, o.ChunkSize)
	if o.batch > 0 {
		s += fmt.Sprintf("-batch-%d", o.batch)
	}
	return s
}

func TestRoundTrip(t *testing.T) {
	options(func(o kind) {
		t.Run(o.String(), func(t *testing.T) {
			t.Parallel()
			w := sample(t, o)
			im := open(t, w.boot)
			tr, err := im.Tree(index.Limits{})
			if err != nil {
				t.Fatal(err)
			}
			if got, want := list(tr), list(w.tree); got != want {
				t.Errorf("read:\n%s\nwrote:\n%s", got, want)
			}
			for i := range w.blobs {
				sub := *im
				sub.blobs = im.blobs[i : i+1]
				part := &index.Tree{Root: tr.Root, Blobs: tr.Blobs}
				for _, c := range tr.Chunks {
					if int(c.Blob) == i {
						part.Chunks = append(part.Chunks, c)
					}
				}
				checkBlob(t, &sub, part, w.blobs[i], w.blobs[i])
			}

			// What was read is enough to write it again, the same.
			var again bytes.Buffer
			if err := WriteBootstrap(&again, tr, im.Blobs(), o.BlobOptions); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(again.Bytes(), w.boot) {
				t.Error("the bootstrap differs when it is written again")
			}
		})
	})
}

func TestGoldenAgain(t *testing.T) {
	for name, s := range sources(t) {
		im, tr := open(t, s[0], s[2]), tree(t, s[0], s[2])
		if !im.Blobs()[0].Referable() {
			continue // only what its chunk table tells can be said again
		}
		var boot bytes.Buffer
		if err := WriteBootstrap(&boot, tr, im.Blobs(), BlobOptions{im.ChunkSize(), im.Compressor(), im.Digester()}); err != nil {
			t.Fatal(err)
		}
		if got, want := list(tree(t, boot.Bytes())), list(tr); got != want {
			t.Errorf("%s: read again:\n%s\nwant:\n%s", name, got, want)
		}
	}
}

func TestEmptyTree(t *testing.T) {
	tr := &index.Tree{Root: dir(0o755, nil)}
	var boot bytes.Buffer
	if err := WriteBootstrap(&boot, tr, nil, BlobOptions{1 << 20, chunk.Zstd, chunk.BLAKE3}); err != nil {
		t.Fatal(err)
	}
	if got, want := list(tree(t, boot.Bytes())), list(tr); got != want {
		t.Errorf("read %q, want %q", got, want)
	}
	if _, err := NewBlobWriter(new(bytes.Buffer), BlobOptions{1 << 20, chunk.Zstd, chunk.BLAKE3}).Close(); !errors.Is(err, ErrEmpty) {
		t.Errorf("empty blob: %v", err)
	}
}

func TestWriteRefuses(t *testing.T) {
	o := BlobOptions{ChunkSize: 4096, Compressor: chunk.Zstd, Digester: chunk.BLAKE3}
	for name, c := range map[string]struct {
		change func(w *written)
		want   error
		text   string
	}{
		"hole": {func(w *written) { w.tree.Root.Children["f"].Size += 4096 }, index.ErrUnsupported, ""},
		"cut": {func(w *written) {
			f := w.tree.Root.Children["f"]
			f.Size, f.Extents = 4100, []index.Extent{{Off: 4095, Chunk: 1}}
		}, index.ErrUnsupported, "f: "},
		"zeros": {func(w *written) {
			f := w.tree.Root.Children["f"]
			f.Size, f.Extents = 8192+5, []index.Extent{{Off: 8192, Chunk: 1}}
		}, index.ErrUnsupported, "hole"},
		"vast hole": {func(w *written) {
			r := ChunkRef{Index: 2, Length: 4096, Size: 4096, Offset: 5000, Addr: 8192}
			w.infos[0].Chunks, w.infos[0].Span = append(w.infos[0].Chunks, r), 12288
			w.tree.Chunks = append(w.tree.Chunks, index.Chunk{Digest: zeroDigest(o.Digester, 4096), Size: 4096, Offset: 4101})
			w.tree.Root.Children["f"].Size = 1 << 60
			w.tree.Root.Children["f"].Extents = nil
		}, index.ErrLimit, "holes"},
		"blobs":      {func(w *written) { w.tree.Blobs = nil }, nil, "blobs are described"},
		"chunk size": {func(w *written) { w.infos[0].ChunkSize = 8192 }, index.ErrUnsupported, "chunks of 8192"},
		"many blobs": {func(w *written) {
			w.infos = make([]BlobInfo, 255)
			w.tree.Blobs = make([]index.Blob, 255)
		}, index.ErrLimit, "254"},
		"index": {func(w *written) { w.infos[0].Chunks[0].Index = MaxChunks }, nil, "index"},
		"other": {func(w *written) { w.tree.Chunks[0].Offset++ }, nil, "no chunk at 1 of the stream"},
		"size":  {func(w *written) { w.tree.Chunks[0].Size-- }, nil, "the blob has"},
		"id":    {func(w *written) { w.infos[0].ID = "x" }, nil, "want 64 hex"},
		"range": {func(w *written) { w.tree.Root.Children["f"].Extents[0].Chunk = 9 }, index.ErrCorrupt, "chunk 9"},
	} {
		b := newBuilder(t, o, 1)
		b.tree.Root.Children["f"] = b.file(0, append(bytes.Repeat([]byte("x"), 4096), "tail!"...))
		w := b.finish()
		c.change(w)
		err := WriteBootstrap(new(bytes.Buffer), w.tree, w.infos, o)
		if err == nil || c.want != nil && !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v, want %v, %q", name, err, c.want, c.text)
		}
	}
}

func TestAddRefuses(t *testing.T) {
	o := BlobOptions{ChunkSize: 4096, Compressor: chunk.Zstd, Digester: chunk.BLAKE3}
	p := make([]byte, 100)
	d := chunk.Sum(chunk.BLAKE3, p)
	w := NewBlobWriter(new(bytes.Buffer), o)
	for name, f := range map[string]func() error{
		"empty":      func() error { _, err := w.Add(0, d, chunk.None, nil); return err },
		"large":      func() error { _, err := w.Add(4097, d, chunk.None, make([]byte, 4097)); return err },
		"length":     func() error { _, err := w.Add(101, d, chunk.None, p); return err },
		"not less":   func() error { _, err := w.Add(100, d, chunk.Zstd, p); return err },
		"compressor": func() error { _, err := w.Add(200, d, chunk.LZ4, p); return err },
		"digester":   func() error { _, err := w.Add(100, chunk.Sum(chunk.SHA256, p), chunk.None, p); return err },
		"options": func() error {
			_, err := NewBlobWriter(new(bytes.Buffer), BlobOptions{ChunkSize: 5000}).Add(100, d, chunk.None, p)
			return err
		},
		"writer": func() error {
			w := NewBlobWriter(broken{}, o)
			w.Add(100, d, chunk.None, p)
			if _, err := w.Close(); !errors.Is(err, os.ErrClosed) {
				t.Errorf("close after an error: %v", err)
			}
			_, err := w.Add(100, d, chunk.None, p)
			return err
		},
	} {
		if f() == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if _, err := w.Add(100, d, chunk.None, p); err != nil {
		t.Errorf("after refusals: %v", err)
	}
}

type broken struct{}

func (broken) Write([]byte) (int, error) { return 0, os.ErrClosed }
