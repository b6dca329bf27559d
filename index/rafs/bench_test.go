package rafs

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"syscall"
	"testing"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// large makes an image of files with 1.3 chunks each, whose content does
// not exist.
func large(t testing.TB, files int) (*index.Tree, []BlobInfo, BlobOptions) {
	o := BlobOptions{ChunkSize: 64 << 10, Compressor: chunk.Zstd, Digester: chunk.BLAKE3}
	tr := &index.Tree{Root: dir(0o755, nil), Blobs: make([]index.Blob, 1)}
	b := BlobInfo{ID: fmt.Sprintf("%064x", 1), ChunkSize: o.ChunkSize, Compressor: o.Compressor, Digester: o.Digester, Features: featuresWritten}
	rnd := rand.New(rand.NewPCG(1, 2))
	var stream int64
	var d *index.Inode
	for i := range files {
		if i%50 == 0 {
			d = dir(0o755, nil)
			tr.Root.Children[fmt.Sprintf("directory-%05d", i/50)] = d
		}
		ino := &index.Inode{Mode: syscall.S_IFREG | 0o644}
		d.Children[fmt.Sprintf("file-%06d.txt", i)] = ino
		for k := range 1 + i%10/7 { // 7 of 10 files have one chunk
			size := o.ChunkSize
			if k == i%10/7 {
				size = 1 + rnd.Uint32N(o.ChunkSize)
			}
			r := ChunkRef{Index: b.ChunkCount, Length: (size + 1) / 2, Size: size, Compressed: size > 1, Offset: uint64(b.Size), Addr: b.Span}
			c := index.Chunk{Size: size, Offset: stream, Digest: chunk.Digest{Algorithm: chunk.BLAKE3}}
			stream += int64(size)
			binary.LittleEndian.PutUint64(c.Digest.Sum[:], rnd.Uint64())
			ino.Extents = append(ino.Extents, index.Extent{Off: ino.Size, Chunk: uint32(len(tr.Chunks))})
			ino.Size += int64(size)
			tr.Chunks = append(tr.Chunks, c)
			b.Chunks = append(b.Chunks, r)
			b.ChunkCount++
			b.Size += int64(r.Length)
			b.Span += roundUp(uint64(size))
		}
	}
	b.InfoSize = uint64(b.ChunkCount) * infoV1Size
	return tr, []BlobInfo{b}, o
}

func BenchmarkRead(b *testing.B) {
	tr, blobs, o := large(b, 100_000)
	var boot bytes.Buffer
	if err := WriteBootstrap(&boot, tr, blobs, o); err != nil {
		b.Fatal(err)
	}
	b.Logf("%d chunks, %d bytes", len(tr.Chunks), boot.Len())
	b.ReportAllocs()
	for b.Loop() {
		tree(b, boot.Bytes())
	}
}

func BenchmarkWrite(b *testing.B) {
	tr, blobs, o := large(b, 100_000)
	b.ReportAllocs()
	for b.Loop() {
		var boot bytes.Buffer
		if err := WriteBootstrap(&boot, tr, blobs, o); err != nil {
			b.Fatal(err)
		}
	}
}

// TestLarge reads back a tenth of what BenchmarkRead reads.
func TestLarge(t *testing.T) {
	tr, blobs, o := large(t, 10_000)
	var boot bytes.Buffer
	if err := WriteBootstrap(&boot, tr, blobs, o); err != nil {
		t.Fatal(err)
	}
	got := tree(t, boot.Bytes())
	tr.Blobs[0] = got.Blobs[0]
	if list(got) != list(tr) {
		t.Error("the tree differs")
	}
}
