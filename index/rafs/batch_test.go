package rafs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// withBatches is an image of ours with batches, one of which has a chunk that no
// file uses at its end; bootstrap and blob.
func withBatches(t testing.TB, codec chunk.Codec) *written {
	b := newBuilder(t, BlobOptions{ChunkSize: 4096, Compressor: codec, Digester: chunk.BLAKE3}, 1)
	b.batch = 3000
	for i := range 7 {
		b.tree.Root.Children[fmt.Sprint("small", i)] = b.file(0, bytes.Repeat(fmt.Appendf(nil, "%d like the others ", i), 20+13*i))
	}
	b.small(0, []byte("unused, at the end of a batch"))
	b.tree.Root.Children["large"] = b.file(0, bytes.Repeat([]byte("large "), 1000))
	b.tree.Root.Children["sparse"] = b.file(0, append(make([]byte, 8192), "end"...))
	return b.finish()
}

func batchSources(t testing.TB) map[string][3][]byte {
	m := map[string][3][]byte{}
	for _, codec := range []chunk.Codec{chunk.Zstd, chunk.LZ4} {
		w := withBatches(t, codec)
		m["batches "+codec.String()] = [3][]byte{w.boot, w.blobs[0], nil}
	}
	return m
}

// TestUnusedInBatch: what no file uses is listed all the same if files use its
// batch, and a batch that none does use is not.
func TestUnusedInBatch(t *testing.T) {
	b := newBuilder(t, BlobOptions{ChunkSize: 4096, Compressor: chunk.Zstd, Digester: chunk.BLAKE3}, 1)
	b.batch = 1000
	put := func(words ...string) (all []*index.Inode) {
		for _, w := range words {
			all = append(all, b.file(0, bytes.Repeat([]byte(w), 50)))
		}
		b.flush(0)
		return all
	}
	used, unused := put("first ", "second ", "third "), put("fourth ", "fifth ")
	b.tree.Root.Children["f"] = used[1]
	w := b.finish()
	im := open(t, w.boot)
	tr := tree(t, w.boot)
	if len(tr.Chunks) != 3 || len(im.Blobs()[0].Chunks) != 3 || len(tr.Blobs[0].Spans) != 1 {
		t.Fatalf("%d chunks, spans %+v", len(tr.Chunks), tr.Blobs[0].Spans)
	}
	for _, c := range tr.Chunks {
		if p, err := decode(tr, c, w.blobs[0]); err != nil || c.Digest.Verify(p) != nil {
			t.Errorf("%+v: %v", c, err)
		}
	}
	meta, err := ReadBlobMeta(bytes.NewReader(w.blobs[0]), int64(len(w.blobs[0])), "blob", nil)
	if err != nil || len(meta.Chunks) != 5 || meta.batches() != 2 || meta.Features&(FeatureBatch|FeatureChunkInfoV2) != FeatureBatch|FeatureChunkInfoV2 {
		t.Errorf("%+v, %v", meta, err)
	}
	// The tree lacks a chunk of the batch: nobody could tell what it decodes to.
	b.tree.Root.Children["g"] = unused[0]
	for i := range w.tree.Chunks {
		less := *w.tree
		less.Chunks = slices.Delete(slices.Clone(less.Chunks), i, i+1)
		f, g := *used[1], *unused[0]
		less.Root = dir(0o755, nil)
		for n, ino := range map[uint32]*index.Inode{1: &f, 3: &g} {
			if uint32(i) == n {
				continue
			}
			if uint32(i) < n {
				n--
			}
			ino.Extents = []index.Extent{{Chunk: n}}
			less.Root.Children[fmt.Sprint(n)] = ino
		}
		err := WriteBootstrap(io.Discard, &less, w.infos, b.o)
		if len(less.Root.Children) == 2 == (err == nil) || err != nil && !strings.Contains(err.Error(), "1 chunks less than the batch") {
			t.Errorf("without chunk %d: %v", i, err)
		}
	}
}

// TestHostileChunkTable sets fields of chunks in batches.
func TestHostileChunkTable(t *testing.T) {
	w := withBatches(t, chunk.Zstd)
	im := open(t, w.boot)
	refs := im.Blobs()[0].Chunks
	entry := func(k int) int { // of chunk k as the blob has them
		for i := range im.chunks {
			at := int(im.ext.chunkOff) + i*chunkEntrySize
			if binary.LittleEndian.Uint32(w.boot[at+72:]) == refs[k].Index {
				return at
			}
		}
		t.Fatalf("no chunk %d", k)
		return 0
	}
	k := slices.IndexFunc(refs, func(r ChunkRef) bool { return r.In > 0 }) // the second of a batch
	before, this := entry(k-1), entry(k)
	r, alone := refs[k], slices.IndexFunc(refs, func(r ChunkRef) bool { return !r.Batch })
	if alone < 0 || !refs[k-1].Batch {
		t.Fatalf("%+v", refs)
	}
	for _, c := range []struct {
		what  string
		at, n int
		v     uint64
		kind  error
		text  string
	}{
		{"no flag", this + 36, 4, chunkFlagCompressed, index.ErrCorrupt, ""},
		{"a flag more", this + 36, 4, chunkFlagCompressed | chunkFlagBatch | 4, index.ErrUnsupported, "flags"},
		{"not compressed", this + 36, 4, chunkFlagBatch, index.ErrCorrupt, "of a batch"},
		{"nothing stored", this + 40, 4, 0, index.ErrUnsupported, "not at hand"},
		{"other stored size", this + 40, 4, uint64(r.Length - 1), index.ErrCorrupt, "of a batch stored in"},
		{"stored more than a batch", this + 40, 4, MaxChunkSize + 1, index.ErrCorrupt, "stored"},
		{"stored behind the blob", this + 40, 4, MaxChunkSize, index.ErrCorrupt, "stored bytes at"},
		{"empty", this + 44, 4, 0, index.ErrCorrupt, "0 bytes"},
		{"into the next", before + 44, 4, uint64(refs[k-1].Size + 1), index.ErrCorrupt, "behind"},
		{"huge", this + 44, 4, 1<<32 - 1, index.ErrCorrupt, ""},
		{"in the one before", this + 76, 4, uint64(r.In - 1), index.ErrCorrupt, "behind"},
		{"in the same place", this + 76, 4, 0, index.ErrCorrupt, "behind"},
		{"behind all batches", this + 76, 4, uint64(MaxChunkSize - r.Size + 1), index.ErrCorrupt, "of a batch"},
		{"far behind", this + 76, 4, 1<<32 - 1, index.ErrCorrupt, "of a batch"},
		{"in another batch", this + 48, 8, r.Offset + 1, index.ErrCorrupt, "stored bytes at"},
		{"behind the blob", this + 48, 8, 1 << 39, index.ErrCorrupt, "stored bytes at"},
		{"one alone in a batch", entry(alone) + 48, 8, r.Offset, index.ErrCorrupt, "stored bytes at"},
		{"a blob without batches", int(im.ext.blobOff) + 84, 4, uint64(im.blobs[0].Features &^ FeatureBatch), index.ErrCorrupt, ""},
		{"without chunk info that tells", int(im.ext.blobOff) + 84, 4, uint64(im.blobs[0].Features &^ FeatureChunkInfoV2), index.ErrCorrupt, "batches"},
		{"chunk info of another size", int(im.ext.blobOff) + 128, 8, im.blobs[0].InfoSize + 1, index.ErrCorrupt, "chunk info"},
		{"chunk info of more batches than chunks", int(im.ext.blobOff) + 128, 8, im.blobs[0].InfoSize + 40*1000, index.ErrCorrupt, "chunk info"},
		{"chunk info too small", int(im.ext.blobOff) + 128, 8, uint64(im.blobs[0].ChunkCount)*infoV2Size - 1, index.ErrCorrupt, "chunk info"},
	} {
		p := patched(w.boot, c.at, c.v, c.n)
		_, err := Open(bytes.NewReader(p), int64(len(p)), "boot", nil)
		var at *index.Error
		if !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.text) || !errors.As(err, &at) || at.Offset < 0 {
			t.Errorf("%s: %v, want %v, %q and an offset", c.what, err, c.kind, c.text)
		}
	}
	// The last one of a batch tells how long it is: then that is wrong.
	last := slices.IndexFunc(refs, func(r ChunkRef) bool { return !r.Batch || r.Offset > refs[0].Offset }) - 1
	for _, change := range []uint64{uint64(refs[last].In) + 1, 1 << 20} {
		p := patched(w.boot, entry(last)+76, change, 4)
		if _, err := readAll(p, w.blobs[0], nil, map[stored][]byte{}); !errors.Is(err, index.ErrCorrupt) {
			t.Errorf("last chunk at %d of the batch: %v", change, err)
		}
	}
}

// TestHostileChunkInfo sets fields of the chunk info and its header.
func TestHostileChunkInfo(t *testing.T) {
	b := BlobInfo{Features: FeatureAligned | FeatureChunkInfoV2 | FeatureBatch | FeatureCapTarTOC, ChunkCount: 4, InfoOffset: 5000, InfoCodec: chunk.None, Chunks: []ChunkRef{
		{Size: 1000, Length: 700, Compressed: true, Batch: true},
		{Index: 1, Size: 500, Length: 700, Compressed: true, Batch: true, In: 1000, Addr: 4096},
		{Index: 2, Size: 4096, Length: 900, Compressed: true, Offset: 700, Addr: 8192},
		{Index: 3, Size: 300, Length: 300, Batch: true, Offset: 1600, Addr: 12288}, // not compressed
	}}
	raw := b.encodeInfo()
	b.InfoLength, b.InfoSize = uint64(len(raw)), uint64(len(raw))
	whole := append(append(make([]byte, 5000), raw...), encodeHeader(&b)...)
	known := b
	known.Chunks, known.Span = nil, 16384
	read := func(p []byte) (*BlobInfo, error) {
		return ReadBlobMeta(bytes.NewReader(p), int64(len(p)), "blob", &known)
	}
	if got, err := read(whole); err != nil || !reflect.DeepEqual(got.Chunks, b.Chunks) {
		t.Fatalf("%+v, %v, want %+v", got, err, b.Chunks)
	}
	const header = 5000 + 4*infoV2Size + 2*batchSize
	info := func(k, at int) int { return 5000 + k*infoV2Size + at }
	batch := func(k, at int) int { return 5000 + 4*infoV2Size + k*batchSize + at }
	for _, c := range []struct {
		what  string
		at, n int
		v     uint64
		text  string
	}{
		{"no batch of that number", info(3, 20), 4, 2, "batch 2"},
		{"far from any number", info(3, 20), 4, 1<<32 - 1, "batch 4294967295"},
		{"first not the first", info(0, 20), 4, 1, "after batch -1"},
		{"back to a batch", info(3, 20), 4, 0, "batch 0"},
		{"too far in it", info(1, 16), 4, 1001, "500 bytes at 1001 of a batch of 1500"},
		{"very far in it", info(1, 16), 4, 1<<32 - 1, "of a batch"},
		{"in the one before", info(1, 16), 4, 999, "behind"},
		{"at another offset", info(1, 8), 4, 1, "behind"},
		{"next in the stored bytes", info(2, 8), 4, 699, "699"},
		{"next at the same place", info(2, 8), 4, 0, "chunk before ends"},
		{"not in a batch", info(1, 7), 1, infoCompressed, "chunk 1"},
		{"longer than the batch", info(1, 4), 3, 500, "501 bytes at 1000"},
		{"batch of nothing", batch(0, 0), 4, 0, "chunk 0"},
		{"batch stored in more", batch(0, 0), 4, 1501, "chunk 0"},
		{"batch over the next", batch(0, 0), 4, 701, "chunk 2"},
		{"batch too small", batch(0, 4), 4, 1499, "of a batch of 1499"},
		{"batch too large", batch(0, 4), 4, MaxChunkSize + 1, "of a batch"},
		{"batch huge", batch(0, 4), 4, 1<<32 - 1, "of a batch"},
		{"batches elsewhere", header + 40, 8, 95, "batches"},
		{"batches of other size", header + 48, 8, 40, "batches"},
		{"other number", header + 56, 4, 3, "batches"},
		{"number that wraps", header + 56, 4, 1<<31 + 2, "batches"},
		{"no batches", header + 4, 4, uint64(b.Features &^ FeatureBatch), "features"},
		{"chunks", header + 12, 4, 5, "chunks"},
		{"size", header + 32, 8, b.InfoSize - 40, "chunk info"},
	} {
		if _, err := read(patched(whole, c.at, c.v, c.n)); !errors.Is(err, index.ErrCorrupt) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v, want it to say %q", c.what, err, c.text)
		}
	}
}

func TestAddBatchRefuses(t *testing.T) {
	o := BlobOptions{ChunkSize: 4096, Compressor: chunk.Zstd, Digester: chunk.BLAKE3}
	p := make([]byte, 100)
	one := Piece{100, chunk.Sum(chunk.BLAKE3, p)}
	w := NewBlobWriter(new(bytes.Buffer), o)
	add := func(w *BlobWriter, pieces []Piece, stored []byte) error {
		_, err := w.AddBatch(pieces, stored)
		return err
	}
	for name, err := range map[string]error{
		"nothing":      add(w, nil, nil),
		"no chunk":     add(w, nil, p),
		"not less":     add(w, []Piece{one}, p),
		"nothing left": add(w, []Piece{one, one}, nil),
		"empty chunk":  add(w, []Piece{one, {0, one.Digest}}, p),
		"large chunk":  add(w, []Piece{one, {4097, one.Digest}}, p),
		"digester":     add(w, []Piece{one, {100, chunk.Sum(chunk.SHA256, p)}}, p),
		"large":        add(w, slices.Repeat([]Piece{{4096, one.Digest}}, MaxChunkSize/4096+1), p),
		"compressor":   add(NewBlobWriter(new(bytes.Buffer), BlobOptions{4096, chunk.None, chunk.BLAKE3}), []Piece{one, one}, p),
		"writer":       add(NewBlobWriter(broken{}, o), []Piece{one, one}, p),
	} {
		if err == nil {
			t.Errorf("%s: accepted", name)
		}
		if name == "writer" && !errors.Is(err, os.ErrClosed) {
			t.Errorf("%s: %v", name, err)
		}
	}
	refs, err := w.AddBatch([]Piece{one, one}, p)
	if want := []ChunkRef{{Length: 100, Size: 100, Compressed: true, Batch: true}, {Index: 1, Length: 100, Size: 100, Compressed: true, Batch: true, In: 100, Addr: 4096}}; err != nil || !slices.Equal(refs, want) {
		t.Errorf("after refusals: %+v, %v, want %+v", refs, err, want)
	}
	if err := add(w, slices.Repeat([]Piece{{4096, one.Digest}}, MaxChunkSize/4096), p); err != nil {
		t.Errorf("the largest batch: %v", err)
	}
	if _, err := w.Close(); err != nil {
		t.Error(err)
	}
	if add(w, []Piece{one, one}, p) == nil {
		t.Error("after Close: accepted")
	}
}
