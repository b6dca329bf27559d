package rafs

import (
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
// its address.
type ChunkRef struct {
	Index      uint32 // in the blob, from 0
	Length     uint32 // stored bytes
	Size       uint32 // bytes of the content
	Compressed bool
	Offset     uint64 // of the first stored byte in the blob
	Addr       uint64 // of the content in the blob's address space; a multiple of 4 KiB
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

	// Chunks lists chunks by ascending Offset: all that the blob has
	// (BlobWriter, ReadBlobMeta), or all that the image uses (Image.Blobs).
	Chunks []ChunkRef
}

// Digest returns the ID as manifests write it, or "" if the ID is only the
// placeholder of a bootstrap that lies in the blob itself.
func (b *BlobInfo) Digest() string {
	if !isHex(b.ID) {
		return ""
	}
	return "sha256:" + b.ID
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
	if b.err != nil {
		return ChunkRef{}, b.err
	}
	c := ChunkRef{
		Index: uint32(len(b.chunks)), Length: uint32(len(stored)), Size: size,
		Compressed: codec != chunk.None, Offset: b.off, Addr: b.addr,
	}
	switch {
	case size == 0 || size > b.o.ChunkSize:
		return ChunkRef{}, fmt.Errorf("chunk of %d bytes, want 1 to %d", size, b.o.ChunkSize)
	case d.Algorithm != b.o.Digester:
		return ChunkRef{}, fmt.Errorf("chunk digest %v, want %v", d.Algorithm, b.o.Digester)
	case codec != chunk.None && codec != b.o.Compressor:
		return ChunkRef{}, fmt.Errorf("chunk stored as %v in a blob of %v", codec, b.o.Compressor)
	case codec == chunk.None && len(stored) != int(size):
		return ChunkRef{}, fmt.Errorf("chunk of %d bytes stored as %d", size, len(stored))
	case codec != chunk.None && (len(stored) == 0 || len(stored) >= int(size)):
		// Chunk info tells compressed chunks by their being smaller.
		return ChunkRef{}, fmt.Errorf("chunk of %d bytes compressed to %d, want less", size, len(stored))
	case len(b.chunks) == MaxChunks:
		return ChunkRef{}, fmt.Errorf("%w: more than %d chunks in a blob", index.ErrLimit, MaxChunks)
	case b.off+uint64(len(stored)) > maxBlobSize/2:
		return ChunkRef{}, fmt.Errorf("%w: more than %d bytes in a blob", index.ErrLimit, uint64(maxBlobSize/2))
	}
	if err := b.write(stored); err != nil {
		return ChunkRef{}, err
	}
	b.addr += roundUp(uint64(size))
	b.chunks = append(b.chunks, c)
	b.digests = append(b.digests, d.Sum[:]...)
	return c, nil
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
		InfoCodec: b.o.Compressor, InfoSize: uint64(len(b.chunks)) * infoV1Size,
	}
	var toc []byte
	part := func(name string, codec chunk.Codec, sum [32]byte, off, stored, size uint64) {
		toc = appendEntry(toc, Entry{name, codec, sum, off, stored, size})
	}

	// The digest of image.blob covers its tar header too, as nydus-image has it.
	data := b.off
	b.write(tarHeader(tocBlob, data))
	part(tocBlob, chunk.None, [32]byte(b.h.Sum(nil)), 0, data, b.addr)

	raw := make([]byte, 0, info.InfoSize)
	for i := range b.chunks {
		raw = appendInfoV1(raw, &b.chunks[i])
	}
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
