package rafs

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io"

	"github.com/klauspost/compress/zstd"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

const (
	headerMagic = 0xb10bb10b // at both ends of the header
	headerSize  = 4096
	infoV1Size  = 16
	infoV2Size  = 24
)

// encodeHeader makes the header that follows the chunk info.
//
//	 0 u32 magic          16 u64 info offset         40 u64 zran offset
//	 4 u32 features       24 u64 info stored size    48 u64 zran size
//	 8 u32 info codec     32 u64 info size           56 u32 zran entries
//	12 u32 chunks                                  4092 u32 magic
func encodeHeader(b *BlobInfo) []byte {
	p := make([]byte, headerSize)
	codec, _, _ := codecNumber(b.InfoCodec)
	le := binary.LittleEndian
	le.PutUint32(p, headerMagic)
	le.PutUint32(p[4:], b.Features)
	le.PutUint32(p[8:], codec)
	le.PutUint32(p[12:], b.ChunkCount)
	le.PutUint64(p[16:], b.InfoOffset)
	le.PutUint64(p[24:], b.InfoLength)
	le.PutUint64(p[32:], b.InfoSize)
	le.PutUint32(p[headerSize-4:], headerMagic)
	return p
}

// appendInfoV1 appends the 16-byte form of c: two words, the first of the
// content, the second of the stored bytes. Sizes are stored minus one.
//
//	63      44 43          12 11   8 7    0     63      44 43    40 39      0
//	size 0-19  address / 4096  size   zero      len 0-19   len      offset
//	                           20-23                       20-23
func appendInfoV1(dst []byte, c *ChunkRef) []byte {
	size, length := uint64(c.Size-1), uint64(c.Length-1)
	dst = binary.LittleEndian.AppendUint64(dst, size<<44|c.Addr|size>>20<<8)
	return binary.LittleEndian.AppendUint64(dst, length<<44|length>>20<<40|c.Offset)
}

func decodeInfoV1(p []byte) ChunkRef {
	u, s := binary.LittleEndian.Uint64(p), binary.LittleEndian.Uint64(p[8:])
	c := ChunkRef{
		Size:   uint32(u>>44|u>>8&0xf<<20) + 1,
		Addr:   u & 0xffffffff000,
		Length: uint32(s>>44|s>>40&0xf<<20) + 1,
		Offset: s & 0xffffffffff,
	}
	c.Compressed = c.Size != c.Length
	return c
}

// Flags of the 24-byte form.
const (
	infoCompressed = 1
	infoZran       = 2
	infoBatch      = 4
	infoEncrypted  = 8
	infoCRC        = 16
)

// decodeInfoV2 reads the 24-byte form: only the size of the content is stored
// minus one. The third word is a checksum or belongs to forms we refuse.
//
//	63   56 55    32 31            0     63    40 39      0
//	flags   size     address / 4096      length   offset
func decodeInfoV2(p []byte) (c ChunkRef, flags byte) {
	u, s := binary.LittleEndian.Uint64(p), binary.LittleEndian.Uint64(p[8:])
	flags = byte(u >> 56)
	return ChunkRef{
		Size:       uint32(u>>32&0xffffff) + 1,
		Addr:       u & 0xffffffff << 12,
		Length:     uint32(s >> 40),
		Offset:     s & 0xffffffffff,
		Compressed: flags&infoCompressed != 0,
	}, flags
}

// ReadBlobMeta reads the chunk info of a blob of size bytes; name is for
// errors. b is what the bootstrap says of the blob, and anything the blob says
// otherwise is ErrCorrupt; if b is nil, the chunk info is found through the
// table of contents. Digests that the table of contents has are verified, and
// its own if b has one. The result has all of the blob's chunks, by index; as
// the blob does not tell them, ID, Compressor and Digester are b's.
func ReadBlobMeta(r io.ReaderAt, size int64, name string, b *BlobInfo) (*BlobInfo, error) {
	var out BlobInfo
	if b != nil {
		out = *b
	}
	var part Entry
	if b == nil || b.Features&FeatureTOC != 0 {
		toc, err := ReadTOC(r, size, name)
		if err != nil {
			return nil, err
		}
		if b != nil && b.TOCSize != 0 && (toc.Size != b.TOCSize || toc.Digest != b.TOCDigest) {
			return nil, index.Errorf(index.ErrCorrupt, name, size-int64(toc.Size), "table of contents has sha256 %x, want %x", toc.Digest, b.TOCDigest)
		}
		var ok bool
		if part, ok = toc.Entry(tocMeta); !ok {
			return nil, index.Errorf(index.ErrCorrupt, name, -1, "table of contents without %s", tocMeta)
		}
		if b == nil {
			out = BlobInfo{Size: size, InfoOffset: part.Offset, InfoLength: part.Length, InfoSize: part.Size, InfoCodec: part.Codec,
				TOCSize: toc.Size, TOCDigest: toc.Digest}
		}
	}
	if out.InfoLength > uint64(size) || out.InfoOffset > uint64(size)-out.InfoLength {
		return nil, index.Errorf(index.ErrCorrupt, name, int64(out.InfoOffset), "chunk info of %d bytes passes the end at %d", out.InfoLength, size)
	}
	if err := out.readHeader(r, size, name, b != nil); err != nil {
		return nil, err
	}
	p, err := readStored(r, name, int64(out.InfoOffset), out.InfoLength, out.InfoSize, out.InfoCodec)
	if err != nil {
		return nil, err
	}
	if part.Name != "" && sha256.Sum256(p) != part.Digest {
		return nil, index.Errorf(index.ErrCorrupt, name, int64(out.InfoOffset), "chunk info is not what the table of contents has sha256 %x of", part.Digest)
	}
	if err := out.decodeInfo(p, name); err != nil {
		return nil, err
	}
	return &out, nil
}

// readHeader reads the header behind the chunk info and compares it with b.
func (b *BlobInfo) readHeader(r io.ReaderAt, size int64, name string, known bool) error {
	off := int64(b.InfoOffset + b.InfoLength)
	corrupt := func(at int64, format string, args ...any) error {
		return index.Errorf(index.ErrCorrupt, name, off+at, format, args...)
	}
	if off > size-headerSize {
		return corrupt(0, "meta header passes the end at %d", size)
	}
	h := make([]byte, headerSize)
	if err := readAt(r, h, off, name); err != nil {
		return err
	}
	le := binary.LittleEndian
	if le.Uint32(h) != headerMagic || le.Uint32(h[headerSize-4:]) != headerMagic {
		return corrupt(0, "meta header has magic %#x and %#x, want %#x", le.Uint32(h), le.Uint32(h[headerSize-4:]), headerMagic)
	}
	features, count := le.Uint32(h[4:]), le.Uint32(h[12:])
	if err := checkFeatures(features, name, off+4); err != nil {
		return err
	}
	if !known {
		b.Features, b.ChunkCount = features, count
	}
	codec, err := codecOf(le.Uint32(h[8:]), name, off+8)
	switch {
	case err != nil:
		return err
	case codec != b.InfoCodec:
		return corrupt(8, "chunk info is %v, want %v", codec, b.InfoCodec)
	case features != b.Features:
		return corrupt(4, "features %#x, want %#x", features, b.Features)
	case count != b.ChunkCount || count == 0 || count > MaxChunks:
		return corrupt(12, "%d chunks, want %d, from 1 to %d", count, b.ChunkCount, MaxChunks)
	case le.Uint64(h[16:]) != b.InfoOffset || le.Uint64(h[24:]) != b.InfoLength || le.Uint64(h[32:]) != b.InfoSize:
		return corrupt(16, "chunk info at %d, %d bytes of %d; want %d, %d of %d",
			le.Uint64(h[16:]), le.Uint64(h[24:]), le.Uint64(h[32:]), b.InfoOffset, b.InfoLength, b.InfoSize)
	case b.InfoSize != uint64(count)*uint64(b.infoEntry()):
		return corrupt(32, "chunk info of %d bytes, want %d for each of %d chunks", b.InfoSize, b.infoEntry(), count)
	}
	return nil
}

// decodeInfo fills in Chunks and, where unknown, Span.
func (b *BlobInfo) decodeInfo(p []byte, name string) error {
	step := b.infoEntry()
	b.Chunks = make([]ChunkRef, 0, len(p)/step)
	var end, addr uint64
	for i := 0; len(p) > 0; i, p = i+1, p[step:] {
		var c ChunkRef
		if step == infoV1Size {
			c = decodeInfoV1(p)
		} else {
			var flags byte
			if c, flags = decodeInfoV2(p); flags&^(infoCompressed|infoCRC) != 0 {
				return index.Errorf(index.ErrUnsupported, name, int64(b.InfoOffset), "flags %#x of chunk %d (batch, zran or encryption)", flags, i)
			}
		}
		c.Index = uint32(i)
		if c.Length == 0 || c.Length > c.Size || c.Compressed != (c.Length < c.Size) ||
			c.Offset < end || c.Addr < addr || c.Addr%blockSize != 0 ||
			c.Offset+uint64(c.Length) > b.InfoOffset || b.Span != 0 && c.Addr+uint64(c.Size) > b.Span {
			return index.Errorf(index.ErrCorrupt, name, int64(b.InfoOffset), "chunk %d: %d bytes at %d for %d bytes at address %d; chunk before ends at %d and %d",
				i, c.Length, c.Offset, c.Size, c.Addr, end, addr)
		}
		end, addr = c.Offset+uint64(c.Length), c.Addr+roundUp(uint64(c.Size))
		b.Chunks = append(b.Chunks, c)
	}
	if b.Span == 0 {
		b.Span = addr
	}
	return nil
}

// maxPart bounds what is decoded into memory at once: the chunk info of a full
// blob is 384 MiB.
const maxPart = infoV2Size * MaxChunks

// readStored reads and decodes length bytes at off, which are size bytes
// decoded. The caller has checked that they lie in the file.
func readStored(r io.ReaderAt, name string, off int64, length, size uint64, codec chunk.Codec) ([]byte, error) {
	if size > maxPart || length > size {
		return nil, index.Errorf(index.ErrLimit, name, off, "%d bytes, %d stored, at most %d are read", size, length, maxPart)
	}
	if codec == chunk.LZ4 && size/256 > length { // what LZ4 cannot reach
		return nil, index.Errorf(index.ErrCorrupt, name, off, "%d bytes of lz4 from %d", size, length)
	}
	stored := make([]byte, length)
	if err := readAt(r, stored, off, name); err != nil {
		return nil, err
	}
	if codec == chunk.None && length == size {
		return stored, nil
	}
	var out []byte
	var err error
	if codec == chunk.Zstd {
		// Not chunk's decoder, which stops at chunk.MaxSize.
		var d *zstd.Decoder
		if d, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecodeAllCapLimit(true)); err == nil {
			out, err = d.DecodeAll(stored, make([]byte, 0, size))
			d.Close()
		}
		if err == nil && uint64(len(out)) != size {
			err = io.ErrUnexpectedEOF
		}
	} else {
		out = make([]byte, size)
		err = codec.Decode(out, stored)
	}
	if err != nil {
		return nil, index.Errorf(index.ErrCorrupt, name, off, "%v of %d bytes: %v", codec, size, err)
	}
	return out, nil
}

// readAt fills p. A file that ends early is corrupt, any other error is not.
func readAt(r io.ReaderAt, p []byte, off int64, name string) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return index.Errorf(index.ErrCorrupt, name, off+int64(n), "file ends, %d bytes are missing", len(p)-n)
	}
	return &index.Error{Name: name, Offset: off, Err: err}
}
