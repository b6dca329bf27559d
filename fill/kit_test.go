package fill

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/memblob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/link"
	"github.com/shale-image/shale/pool"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// content is n bytes that compress by half and that the seed decides.
func content(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	p := make([]byte, (n+7)&^7)
	for i := 0; i < len(p); i += 8 {
		binary.LittleEndian.PutUint32(p[i:], r.Uint32())
	}
	return p[:n]
}

// cut is the size of the chunks in these tests.
const cut = 64 << 10

// builder makes a tree whose files are cut into chunks of that size.
type builder struct {
	tree  index.Tree
	blobs [][]byte
	spans []index.Blob // of blobs
	codec chunk.Codec
	data  map[chunk.Digest][]byte // of packed files

	seed   uint64 // of the last file of files
	number int    // of the file that was added last
	broken func() // makes the index lie, once all is known
}

func newBuilder(codec chunk.Codec) *builder {
	root := &index.Inode{Mode: syscall.S_IFDIR | 0o755, Children: map[string]*index.Inode{}}
	return &builder{tree: index.Tree{Root: root}, codec: codec, data: map[chunk.Digest][]byte{}}
}

// blob begins a new blob; gap leaves bytes out that belong to no chunk.
func (b *builder) blob()     { b.blobs, b.spans = append(b.blobs, nil), append(b.spans, index.Blob{}) }
func (b *builder) gap(n int) { b.last(make([]byte, n)) }

func (b *builder) last(p []byte) (off int64) {
	k := len(b.blobs) - 1
	off = int64(len(b.blobs[k]))
	b.blobs[k] = append(b.blobs[k], p...)
	return off
}

func (b *builder) file(p []byte) {
	ino := &index.Inode{Mode: syscall.S_IFREG | 0o644, Size: int64(len(p))}
	for off := 0; off < len(p); off += cut {
		piece := p[off:min(off+cut, len(p))]
		stored, codec := piece, chunk.None
		if out, ok := b.codec.Encode(nil, piece); ok {
			stored, codec = out, b.codec
		}
		ino.Extents = append(ino.Extents, index.Extent{Off: int64(off), Chunk: uint32(len(b.tree.Chunks))})
		k := len(b.blobs) - 1
		b.tree.Chunks = append(b.tree.Chunks, index.Chunk{Digest: chunk.Sum(chunk.BLAKE3, piece), Size: uint32(len(piece)), Blob: uint32(k),
			Offset: b.spans[k].Append(index.Span{Size: int64(len(piece)), Codec: codec, Length: int64(len(stored)), Offset: b.last(stored)})})
	}
	b.number++
	b.tree.Root.Children[fmt.Sprintf("f%05d", b.number)] = ino
}

// pack adds small files that are compressed together.
func (b *builder) pack(files ...[]byte) {
	raw := bytes.Join(files, nil)
	stored, ok := b.codec.Encode(nil, raw)
	if !ok {
		for _, p := range files {
			b.file(p)
		}
		return
	}
	k := len(b.blobs) - 1
	at := b.spans[k].Append(index.Span{Size: int64(len(raw)), Codec: b.codec, Length: int64(len(stored)), Offset: b.last(stored)})
	for _, p := range files {
		ino := &index.Inode{Mode: syscall.S_IFREG | 0o644, Size: int64(len(p)), Extents: []index.Extent{{Chunk: uint32(len(b.tree.Chunks))}}}
		d := chunk.Sum(chunk.BLAKE3, p)
		b.data[d] = p
		b.tree.Chunks = append(b.tree.Chunks, index.Chunk{Digest: d, Size: uint32(len(p)), Blob: uint32(k), Offset: at})
		at += int64(len(p))
		b.number++
		b.tree.Root.Children[fmt.Sprintf("f%05d", b.number)] = ino
	}
}

// batch adds a batch of files of the given sizes.
func (b *builder) batch(sizes ...int) {
	var files [][]byte
	for _, n := range sizes {
		b.seed++
		files = append(files, content(b.seed, n))
	}
	b.pack(files...)
}

// files adds files of the given sizes.
func (b *builder) files(sizes ...int) {
	for _, n := range sizes {
		b.seed++
		b.file(content(b.seed, n))
	}
}

// node is a pool, an engine, and blobs that can be had.
type node struct {
	t      testing.TB
	dir    string
	pool   *pool.Pool
	engine *Engine
	source *memblob.Source
	pieces map[chunk.Digest][]byte
	blobs  [][]byte // of source

	mu    sync.Mutex
	fault func(ctx context.Context, ref blob.Ref, off, n int64) *memblob.Fault
	log   []asked
}

type asked struct {
	blob   string
	off, n int64
}

func newNode(t testing.TB, o Options) *node { return newNodeIn(t, t.TempDir(), o) }

func newNodeIn(t testing.TB, dir string, o Options) *node {
	t.Helper()
	n := &node{t: t, dir: dir, source: memblob.New(nil), pieces: map[chunk.Digest][]byte{}}
	n.source.Fault = func(ctx context.Context, ref blob.Ref, off, size int64) *memblob.Fault {
		n.mu.Lock()
		n.log = append(n.log, asked{ref.Digest, off, size})
		f := n.fault
		n.mu.Unlock()
		if f == nil {
			return nil
		}
		return f(ctx, ref, off, size)
	}
	n.reopen(o)
	t.Cleanup(func() { must(t, n.pool.Close()) })
	return n
}

func (n *node) reopen(o Options) {
	n.t.Helper()
	p, err := pool.Open(filepath.Join(n.dir, "pool"))
	must(n.t, err)
	n.pool, n.engine = p, New(p, o)
}

// setFault has f decide about requests from now on; nil lets them be.
func (n *node) setFault(f func(ctx context.Context, ref blob.Ref, off, n int64) *memblob.Fault) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.fault = f
}

// asked returns the requests since the last call.
func (n *node) asked() []asked {
	n.mu.Lock()
	defer n.mu.Unlock()
	log := n.log
	n.log = nil
	return log
}

// link makes an image of what b built.
func (n *node) link(b *builder) string {
	n.t.Helper()
	n.store(b)
	dir, err := os.MkdirTemp(n.dir, "image-")
	must(n.t, err)
	dir = filepath.Join(dir, "linked")
	must(n.t, link.Link(context.Background(), &b.tree, n.pool, dir))
	return dir
}

// store puts what b built into the source.
func (n *node) store(b *builder) {
	n.t.Helper()
	b.tree.Blobs = nil
	for i, p := range b.blobs {
		ref := n.source.Put(p)
		n.blobs = append(n.blobs, p)
		b.tree.Blobs = append(b.tree.Blobs, index.Blob{Digest: ref.Digest, Size: ref.Size, Spans: b.spans[i].Spans})
	}
	must(n.t, b.tree.Walk(func(_ string, ino *index.Inode) error {
		for _, e := range ino.Extents {
			c := b.tree.Chunks[e.Chunk]
			if p, ok := b.data[c.Digest]; ok {
				n.pieces[c.Digest] = p
				continue
			}
			blob := &b.tree.Blobs[c.Blob]
			s := blob.Spans[blob.Find(c.Offset)]
			data := make([]byte, s.Size)
			must(n.t, s.Codec.Decode(data, b.blobs[c.Blob][s.Offset:s.Offset+s.Length]))
			n.pieces[c.Digest] = data[c.Offset-s.Start:][:c.Size]
		}
		return nil
	}))
	if b.broken != nil {
		b.broken()
	}
}

// img is an open image and what its bytes ought to be.
type img struct {
	*Image
	truth []byte
}

// open opens an image. It is closed when the test ends, unless the test does.
func (n *node) open(dir string, source blob.Source) *img {
	n.t.Helper()
	l, err := link.Open(dir)
	must(n.t, err)
	im, err := n.engine.Open(l, source)
	must(n.t, err)
	truth := make([]byte, im.Size())
	_, err = l.Meta().ReadAt(truth[:l.MetaSize], 0)
	must(n.t, err)
	for i := range l.Chunks() {
		c := l.Chunk(i)
		copy(truth[c.Flat:], n.pieces[c.Digest])
	}
	x := &img{im, truth}
	n.t.Cleanup(func() { x.close(n.t) })
	return x
}

func (n *node) image(b *builder) *img {
	n.t.Helper()
	return n.open(n.link(b), n.source)
}

func (x *img) close(t testing.TB) {
	if x.Image != nil {
		must(t, x.Image.Close())
		x.Image = nil
	}
}

// read reads [off, off+n) as a face does and fails the test on a wrong byte.
func (x *img) read(ctx context.Context, t testing.TB, off, n int64) error {
	p := bytes.Repeat([]byte{0xa5}, int(n))
	ok, err := x.TryReadAt(p, off)
	if err == nil && !ok {
		err = x.ReadAt(ctx, p, off)
	}
	if err == nil && !bytes.Equal(p, x.truth[off:off+n]) {
		t.Errorf("wrong bytes in %d bytes at %d", n, off)
	}
	return err
}

// chunk reads all of chunk i.
func (x *img) chunk(t testing.TB, i int) error {
	c := x.linked.Chunk(i)
	return x.read(context.Background(), t, c.Flat, int64(c.Size))
}

// all reads all chunks and fails the test if one cannot be had.
func (x *img) all(t testing.TB) {
	t.Helper()
	for i := range x.linked.Chunks() {
		must(t, x.chunk(t, i))
	}
}

// present lists the chunks that are here.
func (x *img) present() (list []int) {
	for i := range x.linked.Chunks() {
		c := x.linked.Chunk(i)
		if s, at := x.address(c); s.present(at, c) {
			list = append(list, i)
		}
	}
	return list
}

// settle waits for the requests in flight.
func (x *img) settle() { x.requests.Wait() }

// sourceFunc is a source in one function.
type sourceFunc func(ctx context.Context, ref blob.Ref, off, n int64) (io.ReadCloser, error)

func (f sourceFunc) Range(ctx context.Context, ref blob.Ref, off, n int64) (io.ReadCloser, error) {
	return f(ctx, ref, off, n)
}

// wire is a source over a modelled network, for use in a synctest bubble: a
// request costs delay, and then all share the rate.
type wire struct {
	blob.Source
	delay time.Duration
	rate  float64 // bytes a second

	mu       sync.Mutex
	free     time.Time
	requests int
	bytes    int64
}

func (w *wire) Range(ctx context.Context, ref blob.Ref, off, n int64) (io.ReadCloser, error) {
	w.mu.Lock()
	w.requests++
	w.mu.Unlock()
	time.Sleep(w.delay)
	r, err := w.Source.Range(ctx, ref, off, n)
	if err != nil {
		return nil, err
	}
	return &wireReader{r, w}, nil
}

type wireReader struct {
	io.ReadCloser
	wire *wire
}

// Read gives at most 16 KiB, when they have passed.
func (r *wireReader) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p[:min(len(p), 16<<10)])
	w := r.wire
	w.mu.Lock()
	if now := time.Now(); w.free.Before(now) {
		w.free = now
	}
	w.free = w.free.Add(time.Duration(float64(n) / w.rate * float64(time.Second)))
	w.bytes += int64(n)
	due := w.free
	w.mu.Unlock()
	time.Sleep(time.Until(due))
	return n, err
}
