package inspect

import (
	"bytes"
	"compress/gzip"
	"io"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"go.uber.org/goleak"

	"github.com/shale-image/shale/blob/blobtest"
	"github.com/shale-image/shale/blob/memblob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// golden reads a file that nydus-image made.
func golden(t *testing.T, name string) []byte {
	t.Helper()
	f, err := os.Open(filepath.Join("../index/rafs/testdata", name+".gz"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	p, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// goldenFiles writes a golden bootstrap and its blob, under the blob's id, and
// returns the bootstrap's name and the blob's.
func goldenFiles(t *testing.T, name string) (boot, data string) {
	t.Helper()
	dir := t.TempDir()
	boot, data = filepath.Join(dir, "image.boot"), filepath.Join(dir, "inline.blob")
	if name == "inline" {
		write(t, data, golden(t, "inline.blob"))
		return data, data
	}
	write(t, boot, golden(t, name+".boot"))
	im, err := OpenFile(boot, dir)
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	data = filepath.Join(dir, im.RAFS.Blobs()[0].ID)
	write(t, data, golden(t, name+".blob"))
	return boot, data
}

func write(t *testing.T, name string, p []byte) {
	t.Helper()
	if err := os.WriteFile(name, p, 0o644); err != nil {
		t.Fatal(err)
	}
}

func openFile(t *testing.T, name string) *Image {
	t.Helper()
	im, err := OpenFile(name, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { im.Close() })
	return im
}

// builder makes images by hand whose one blob is in memory.
type builder struct {
	tree index.Tree
	data bytes.Buffer
	blob index.Blob // data's
	alg  chunk.Algorithm
	step int // bytes of a chunk
}

func newBuilder(alg chunk.Algorithm, step int) *builder {
	return &builder{tree: index.Tree{Root: dir()}, alg: alg, step: step}
}

func dir() *index.Inode {
	return &index.Inode{Mode: syscall.S_IFDIR | 0o755, Children: map[string]*index.Inode{}}
}

// file makes a file of content; hole tells which of its chunks are none.
func (b *builder) file(content []byte, hole func(off int) bool) *index.Inode {
	ino := &index.Inode{Mode: syscall.S_IFREG | 0o644, Size: int64(len(content))}
	for off := 0; off < len(content); off += b.step {
		p := content[off:min(off+b.step, len(content))]
		if hole != nil && hole(off) {
			continue
		}
		ino.Extents = append(ino.Extents, index.Extent{Off: int64(off), Chunk: uint32(len(b.tree.Chunks))})
		b.tree.Chunks = append(b.tree.Chunks, index.Chunk{Digest: chunk.Sum(b.alg, p), Size: uint32(len(p)),
			Offset: b.blob.Append(index.Span{Size: int64(len(p)), Offset: int64(b.data.Len()), Length: int64(len(p))})})
		b.data.Write(p)
	}
	return ino
}

// batch makes files that are compressed together.
func (b *builder) batch(files ...[]byte) (all []*index.Inode) {
	raw := bytes.Join(files, nil)
	stored, ok := chunk.Zstd.Encode(nil, raw)
	if !ok {
		panic("the content of a batch does not become less")
	}
	at := b.blob.Append(index.Span{Size: int64(len(raw)), Offset: int64(b.data.Len()), Length: int64(len(stored)), Codec: chunk.Zstd})
	b.data.Write(stored)
	for _, p := range files {
		all = append(all, &index.Inode{Mode: syscall.S_IFREG | 0o644, Size: int64(len(p)), Extents: []index.Extent{{Chunk: uint32(len(b.tree.Chunks))}}})
		b.tree.Chunks = append(b.tree.Chunks, index.Chunk{Digest: chunk.Sum(b.alg, p), Size: uint32(len(p)), Offset: at})
		at += int64(len(p))
	}
	return all
}

// add gives an inode a name in the root.
func (b *builder) add(name string, ino *index.Inode) *index.Inode {
	b.tree.Root.Children[name] = ino
	return ino
}

func (b *builder) image() *Image {
	ref := blobtest.Ref(b.data.Bytes())
	b.blob.Digest, b.blob.Size = ref.Digest, ref.Size
	b.tree.Blobs = []index.Blob{b.blob}
	return &Image{Name: "built", Tree: &b.tree, Source: memblob.New(map[string][]byte{ref.Digest: b.data.Bytes()})}
}
