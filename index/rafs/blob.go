package rafs

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// ErrEmpty is returned by BlobWriter.Close if no chunk was added: RAFS has no
// empty blobs, the layer needs none.
var ErrEmpty = errors.New("blob without chunks")

// BlobOptions are the properties all chunks of a blob share.
type BlobOptions struct {
	ChunkSize  uint32          // bytes of every chunk but the last of a file; a power of two, MinChunkSize to MaxChunkSize
	Compressor chunk.Codec     // of the chunks that are compressed, and of the chunk info
	Digester   chunk.Algorithm // of all chunks
}

// ChunkRef is one chunk as its blob knows it: its index, its stored bytes and
// its address. Chunks of a batch have the same stored bytes.
type ChunkRef struct {
	Index      uint32 // in the blob, from 0
	Length     uint32 // stored bytes
	Size       uint32 // bytes of the content
	Compressed bool
	Batch      bool
	In         uint32 // of a batch's content: where this chunk's begins
	Offset     uint64 // of the first stored byte in the blob
	Addr       uint64 // of the content in the blob's address space; a multiple of 4 KiB
	Pos        int64  // of the content in the stream, in a zran blob
}

// follows tells whether c lies in the batch that the chunk before it began.
func (c *ChunkRef) follows(before *ChunkRef) bool {
	return c.Batch && before.Batch && c.Offset == before.Offset
}

// compare is the order of chunks in a blob.
func (c *ChunkRef) compare(d *ChunkRef) int {
	return cmp.Or(cmp.Compare(c.Pos, d.Pos), cmp.Compare(c.Offset, d.Offset), cmp.Compare(c.In, d.In))
}

// Same tells whether two say the same of a chunk. Where in its stream it lies is
// not told everywhere.
func (c *ChunkRef) Same(d *ChunkRef) bool {
	e := *d
	e.Pos = c.Pos
	return *c == e
}

// BlobInfo describes a blob: what the bootstrap's blob table says of it.
type BlobInfo struct {
	ID         string // sha256 of the whole blob, 64 hex digits, without an algorithm
	Size       int64  // bytes of the whole blob
	ChunkSize  uint32
	ChunkCount uint32
	Compressor chunk.Codec
	Digester   chunk.Algorithm
	Features   uint32 // Feature bits
	Span       uint64 // bytes of the address space; a multiple of 4 KiB
	InfoCodec  chunk.Codec
	InfoOffset uint64 // of the stored chunk info in the blob; its header follows it
	InfoLength uint64 // bytes stored, without the header
	InfoSize   uint64 // bytes decoded
	TOCSize    uint32 // bytes of the table of contents with its tar header; 0 if there is none
	TOCDigest  [32]byte
	MetaSum    [32]byte // sha256 of the blob that the chunk info is in, if that is another (MetaDigest)
	MetaSize   int64    // its bytes

	// Chunks lists chunks by ascending Offset, those of a batch by In: all that
	// the blob has (BlobWriter, ReadBlobMeta), or all that the image lists
	// (Image.Blobs).
	Chunks []ChunkRef

	spans   []index.Span // of a zran blob; the offsets of their windows are in
	windows []byte       // these, compressed
}

// Spans returns the spans of the stream that Chunks make, one for each batch
// and each chunk in none, and where in it the chunks begin. Spans of a zran blob
// are those of the layer.
func (b *BlobInfo) Spans() (spans []index.Span, offsets []int64) {
	offsets = make([]int64, len(b.Chunks))
	if b.spans != nil {
		for i := range b.Chunks {
			offsets[i] = b.Chunks[i].Pos
		}
		return b.spans, offsets
	}
	n := 0
	for i := range b.Chunks {
		if i == 0 || !b.Chunks[i].follows(&b.Chunks[i-1]) {
			n++
		}
	}
	spans = make([]index.Span, 0, n)
	var end int64
	for i := range b.Chunks {
		c := &b.Chunks[i]
		if i == 0 || !c.follows(&b.Chunks[i-1]) {
			codec := chunk.None
			if c.Compressed {
				codec = b.Compressor
			}
			spans = append(spans, index.Span{Start: end, Offset: int64(c.Offset), Length: int64(c.Length), Codec: codec})
		}
		s := &spans[len(spans)-1]
		offsets[i] = s.Start + int64(c.In)
		s.Size = max(s.Size, int64(c.In)+int64(c.Size))
		end = s.End()
	}
	return spans, offsets
}

// Referable tells whether the bootstrap of another image can say where the chunks
// lie that this one has in the blob.
func (b *BlobInfo) Referable() bool {
	return b.spans == nil && b.Features&FeatureSeparate == 0 && b.Compressor != chunk.Gzip
}

// batches is how many batches there are.
func (b *BlobInfo) batches() (n uint64) {
	for i := range b.Chunks {
		if c := &b.Chunks[i]; c.Batch && (i == 0 || !c.follows(&b.Chunks[i-1])) {
			n++
		}
	}
	return n
}

// infoFits tells whether the chunk info has a size that it can have.
func (b *BlobInfo) infoFits() bool {
	n := uint64(b.ChunkCount) * uint64(b.infoEntry())
	switch {
	case b.Features&FeatureZran != 0:
		return b.InfoSize >= n && (b.InfoSize-n)/(pointSize+maxWindow) <= uint64(b.ChunkCount)
	case b.Features&FeatureBatch != 0:
		return b.InfoSize >= n && (b.InfoSize-n)%batchSize == 0 && (b.InfoSize-n)/batchSize <= uint64(b.ChunkCount)
	}
	return b.InfoSize == n
}

// Digest returns the ID as manifests write it, or "" if the ID is only the
// placeholder of a bootstrap that lies in the blob itself.
func (b *BlobInfo) Digest() string {
	if !isHex(b.ID) {
		return ""
	}
	return "sha256:" + b.ID
}

// MetaDigest returns the digest of the blob that the chunk info is in, if that is
// a blob of its own: "" if it is not, or if the bootstrap lies in that blob itself
// and cannot know.
func (b *BlobInfo) MetaDigest() string {
	if b.Features&FeatureSeparate == 0 || b.MetaSum == [32]byte{} {
		return ""
	}
	return fmt.Sprintf("sha256:%x", b.MetaSum)
}

// infoEntry is the size of an entry of the chunk info.
func (b *BlobInfo) infoEntry() int {
	if b.Features&FeatureChunkInfoV2 != 0 {
		return infoV2Size
	}
	return infoV1Size
}

// BlobWriter writes a blob in one pass. It is not safe for concurrent use.
type BlobWriter struct {
	w       io.Writer
	o       BlobOptions
	h       hash.Hash // of everything written
	off     uint64    // bytes written
	addr    uint64    // next free address
	chunks  []ChunkRef
	digests []byte
	err     error // of w; sticks
}

// NewBlobWriter starts a blob that is written to w. Errors in o are returned
// by the first call of Add.
func NewBlobWriter(w io.Writer, o BlobOptions) *BlobWriter {
	b := &BlobWriter{w: w, o: o, h: sha256.New()}
	b.err = o.check()
	return b
}

func (o BlobOptions) check() error {
	if err := checkChunkSize(o.ChunkSize); err != nil {
		return err
	}
	if _, _, err := codecNumber(o.Compressor); err != nil {
		return err
	}
	_, _, err := digesterNumber(o.Digester)
	return err
}

// Add appends a chunk: size bytes of content with digest d, stored as the
// given bytes in codec, which is chunk.None or the writer's compressor. stored
// is not kept. Add fails with ErrLimit when the blob is full (MaxChunks
// chunks); the caller starts another blob then. An error of the underlying
// writer is final.
func (b *BlobWriter) Add(size uint32, d chunk.Digest, codec chunk.Codec, stored []byte) (ChunkRef, error) {
	if err := b.check(size, d, 1, len(stored)); err != nil {
		return ChunkRef{}, err
	}
	switch {
	case codec == chunk.None && len(stored) != int(size):
		return ChunkRef{}, fmt.Errorf("chunk of %d bytes stored as %d", size, len(stored))
	case codec != chunk.None && codec != b.o.Compressor:
		return ChunkRef{}, fmt.Errorf("chunk stored as %v in a blob of %v", codec, b.o.Compressor)
	case codec != chunk.None && (len(stored) == 0 || len(stored) >= int(size)):
		// Chunk info tells compressed chunks by their being smaller.
		return ChunkRef{}, fmt.Errorf("chunk of %d bytes compressed to %d, want less", size, len(stored))
	}
	off := b.off
	if err := b.write(stored); err != nil {
		return ChunkRef{}, err
	}
	c := ChunkRef{Length: uint32(len(stored)), Size: size, Compressed: codec != chunk.None, Offset: off}
	return b.list(c, d), nil
}

// Piece is a chunk of a batch.
type Piece struct {
	Size   uint32
	Digest chunk.Digest
}

// AddBatch appends chunks whose contents, one behind the other, were compressed
// together, by the writer's compressor, to the stored bytes. A batch has at most
// MaxChunkSize bytes of content. Errors are those of Add.
func (b *BlobWriter) AddBatch(pieces []Piece, stored []byte) ([]ChunkRef, error) {
	var size uint64
	for _, p := range pieces {
		if err := b.check(p.Size, p.Digest, len(pieces), len(stored)); err != nil {
			return nil, err
		}
		size += uint64(p.Size)
	}
	if size > MaxChunkSize || len(stored) == 0 || uint64(len(stored)) >= size || b.o.Compressor == chunk.None {
		return nil, fmt.Errorf("batch of %d bytes, at most %d are possible, compressed to %d by %v", size, MaxChunkSize, len(stored), b.o.Compressor)
	}
	off := b.off
	if err := b.write(stored); err != nil {
		return nil, err
	}
	refs := make([]ChunkRef, len(pieces))
	in := uint32(0)
	for i, p := range pieces {
		refs[i] = b.list(ChunkRef{Length: uint32(len(stored)), Size: p.Size, Compressed: true, Batch: true, In: in, Offset: off}, p.Digest)
		in += p.Size
	}
	return refs, nil
}

// check tells what forbids another n chunks, of which this is one.
func (b *BlobWriter) check(size uint32, d chunk.Digest, n, stored int) error {
	switch {
	case b.err != nil:
		return b.err
	case size == 0 || size > b.o.ChunkSize:
		return fmt.Errorf("chunk of %d bytes, want 1 to %d", size, b.o.ChunkSize)
	case d.Algorithm != b.o.Digester:
		return fmt.Errorf("chunk digest %v, want %v", d.Algorithm, b.o.Digester)
	case len(b.chunks)+n > MaxChunks:
		return fmt.Errorf("%w: more than %d chunks in a blob", index.ErrLimit, MaxChunks)
	case b.off+uint64(stored) > maxBlobSize/2:
		return fmt.Errorf("%w: more than %d bytes in a blob", index.ErrLimit, uint64(maxBlobSize/2))
	}
	return nil
}

// list enters a chunk that was written, at the next address.
func (b *BlobWriter) list(c ChunkRef, d chunk.Digest) ChunkRef {
	c.Index, c.Addr = uint32(len(b.chunks)), b.addr
	b.addr += roundUp(uint64(c.Size))
	b.chunks = append(b.chunks, c)
	b.digests = append(b.digests, d.Sum[:]...)
	return c
}

// AddZeros appends a whole chunk of zeros, which WriteBootstrap puts into the
// holes of files (NeedsZeros).
func (b *BlobWriter) AddZeros() (ChunkRef, chunk.Digest, chunk.Codec, error) {
	if b.err != nil {
		return ChunkRef{}, chunk.Digest{}, 0, b.err
	}
	raw := make([]byte, b.o.ChunkSize)
	d := chunk.Sum(b.o.Digester, raw)
	codec := b.o.Compressor
	stored, ok := codec.Encode(nil, raw)
	if !ok {
		codec, stored = chunk.None, raw
	}
	c, err := b.Add(b.o.ChunkSize, d, codec, stored)
	return c, d, codec, err
}

// write does nothing after an error, so that Close need look once only.
func (b *BlobWriter) write(p []byte) error {
	if b.err != nil {
		return b.err
	}
	if _, err := b.w.Write(p); err != nil {
		b.err = err
		return err
	}
	b.h.Write(p)
	b.off += uint64(len(p))
	return nil
}

// Close writes what follows the chunks and returns the description of the
// blob, whose Chunks it owns no longer. It does not close the underlying
// writer. A blob without chunks is ErrEmpty.
func (b *BlobWriter) Close() (BlobInfo, error) {
	if b.err != nil {
		return BlobInfo{}, b.err
	}
	if len(b.chunks) == 0 {
		return BlobInfo{}, ErrEmpty
	}
	info := BlobInfo{
		ChunkSize: b.o.ChunkSize, ChunkCount: uint32(len(b.chunks)),
		Compressor: b.o.Compressor, Digester: b.o.Digester,
		Features: featuresWritten, Span: b.addr, Chunks: b.chunks,
		InfoCodec: b.o.Compressor,
	}
	if info.batches() > 0 {
		info.Features |= FeatureChunkInfoV2 | FeatureBatch
	}
	var toc []byte
	part := func(name string, codec chunk.Codec, sum [32]byte, off, stored, size uint64) {
		toc = appendEntry(toc, Entry{name, codec, sum, off, stored, size})
	}

	// The digest of image.blob covers its tar header too, as nydus-image has it.
	data := b.off
	b.write(tarHeader(tocBlob, data))
	part(tocBlob, chunk.None, [32]byte(b.h.Sum(nil)), 0, data, b.addr)

	raw := info.encodeInfo()
	info.InfoSize = uint64(len(raw))
	stored, ok := info.InfoCodec.Encode(nil, raw)
	if !ok {
		info.InfoCodec, stored = chunk.None, raw
	}
	info.InfoOffset, info.InfoLength = b.off, uint64(len(stored))
	header := encodeHeader(&info)
	part(tocMeta, info.InfoCodec, sha256.Sum256(raw), b.off, info.InfoLength, info.InfoSize)
	part(tocMetaHeader, chunk.None, sha256.Sum256(header), b.off+info.InfoLength, headerSize, headerSize)
	b.write(stored)
	b.write(header)
	b.write(tarHeader(tocMeta, info.InfoLength+headerSize))

	n := uint64(len(b.digests))
	part(tocDigests, chunk.None, sha256.Sum256(b.digests), b.off, n, n)
	b.write(b.digests)
	b.write(tarHeader(tocDigests, n))

	toc = append(toc, tarHeader(tocName, uint64(len(toc)))...)
	info.TOCSize, info.TOCDigest = uint32(len(toc)), sha256.Sum256(toc)
	if err := b.write(toc); err != nil {
		return BlobInfo{}, err
	}
	info.Size, info.ID = int64(b.off), hex.EncodeToString(b.h.Sum(nil))
	b.err = errors.New("blob is closed")
	return info, nil
}

func roundUp(n uint64) uint64 { return (n + blockSize - 1) &^ (blockSize - 1) }
