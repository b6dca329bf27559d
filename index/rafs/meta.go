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

// InfoHeader is the size of the header that follows the chunk info.
const InfoHeader = 4096

const (
	headerMagic = 0xb10bb10b // at both ends of the header
	headerSize  = InfoHeader
	infoV1Size  = 16
	infoV2Size  = 24
	batchSize   = 40
)

// encodeHeader makes the header that follows the chunk info.
//
//	 0 u32 magic          16 u64 info offset         40 u64 offset of batches in the info
//	 4 u32 features       24 u64 info stored size    48 u64 bytes of batches
//	 8 u32 info codec     32 u64 info size           56 u32 batches
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
	if n := b.batches(); n > 0 {
		le.PutUint64(p[40:], b.InfoSize-n*batchSize)
		le.PutUint64(p[48:], n*batchSize)
		le.PutUint32(p[56:], uint32(n))
	}
	le.PutUint32(p[headerSize-4:], headerMagic)
	return p
}

// encodeInfo makes the chunk info: an entry a chunk, and one a batch behind
// them.
//
//	0 u32 stored bytes of the batch    4 u32 bytes of its content    8 zeros
func (b *BlobInfo) encodeInfo() []byte {
	raw := make([]byte, 0, len(b.Chunks)*infoV2Size)
	if b.Features&FeatureBatch == 0 {
		for i := range b.Chunks {
			raw = appendInfoV1(raw, &b.Chunks[i])
		}
		return raw
	}
	var batches []byte
	n := uint32(0)
	le := binary.LittleEndian
	for i := range b.Chunks {
		c := &b.Chunks[i]
		raw = appendInfoV2(raw, c, n)
		if c.Batch && (i+1 == len(b.Chunks) || !b.Chunks[i+1].follows(c)) {
			batches = le.AppendUint32(batches, c.Length)
			batches = le.AppendUint32(batches, c.In+c.Size)
			batches = append(batches, make([]byte, batchSize-8)...)
			n++
		}
	}
	return append(raw, batches...)
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

// appendInfoV2 appends the 24-byte form of c: only the size of the content is
// stored minus one. The third word tells where in which batch a chunk lies; the
// stored bytes are those of the batch, and not told here. If the chunk is in no
// batch, it is zero or a checksum.
//
//	63   56 55    32 31            0     63    40 39      0     63   32 31     0
//	flags   size     address / 4096      length   offset        batch   offset in it
func appendInfoV2(dst []byte, c *ChunkRef, batch uint32) []byte {
	var flags, data uint64
	if c.Compressed {
		flags = infoCompressed
	}
	length := uint64(c.Length)
	if c.Batch {
		flags |= infoBatch
		length = 0
		data = uint64(batch)<<32 | uint64(c.In)
	}
	le := binary.LittleEndian
	dst = le.AppendUint64(dst, flags<<56|uint64(c.Size-1)<<32|c.Addr/blockSize)
	dst = le.AppendUint64(dst, length<<40|c.Offset)
	return le.AppendUint64(dst, data)
}

// decodeInfoV2 reads what appendInfoV2 writes, where a batch is only told by
// its number.
func decodeInfoV2(p []byte) (c ChunkRef, batch uint32, flags byte) {
	le := binary.LittleEndian
	u, s, data := le.Uint64(p), le.Uint64(p[8:]), le.Uint64(p[16:])
	flags = byte(u >> 56)
	c = ChunkRef{
		Size:       uint32(u>>32&0xffffff) + 1,
		Addr:       u & 0xffffffff << 12,
		Length:     uint32(s >> 40),
		Offset:     s & 0xffffffffff,
		Compressed: flags&infoCompressed != 0,
	}
	if flags&infoBatch != 0 {
		c.Batch, c.In, batch = true, uint32(data), uint32(data>>32)
	}
	return c, batch, flags
}

// ReadBlobMeta reads the chunk info that is in a blob of size bytes; name is for
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
	n, err := out.readHeader(r, size, name, b != nil)
	if err != nil {
		return nil, err
	}
	p, err := readStored(r, name, int64(out.InfoOffset), out.InfoLength, out.InfoSize, out.InfoCodec)
	if err != nil {
		return nil, err
	}
	if part.Name != "" && sha256.Sum256(p) != part.Digest {
		return nil, index.Errorf(index.ErrCorrupt, name, int64(out.InfoOffset), "chunk info is not what the table of contents has sha256 %x of", part.Digest)
	}
	if out.Features&FeatureZran != 0 {
		err = out.decodeZran(p, n, name)
	} else {
		err = out.decodeInfo(p, name)
	}
	if err != nil {
		return nil, err
	}
	return &out, nil
}

// readHeader reads the header behind the chunk info and compares it with b. It
// returns how many entries of batches, or of zran, follow those of the chunks.
func (b *BlobInfo) readHeader(r io.ReaderAt, size int64, name string, known bool) (int, error) {
	off := int64(b.InfoOffset + b.InfoLength)
	corrupt := func(at int64, format string, args ...any) (int, error) {
		return 0, index.Errorf(index.ErrCorrupt, name, off+at, format, args...)
	}
	if off > size-headerSize {
		return corrupt(0, "meta header passes the end at %d", size)
	}
	h := make([]byte, headerSize)
	if err := readAt(r, h, off, name); err != nil {
		return 0, err
	}
	le := binary.LittleEndian
	if le.Uint32(h) != headerMagic || le.Uint32(h[headerSize-4:]) != headerMagic {
		return corrupt(0, "meta header has magic %#x and %#x, want %#x", le.Uint32(h), le.Uint32(h[headerSize-4:]), headerMagic)
	}
	features, count := le.Uint32(h[4:]), le.Uint32(h[12:])
	if err := checkFeatures(features, name, off+4); err != nil {
		return 0, err
	}
	if !known {
		b.Features, b.ChunkCount = features, count
	}
	codec, err := codecOf(le.Uint32(h[8:]), name, off+8)
	switch {
	case err != nil:
		return 0, err
	case codec != b.InfoCodec:
		return corrupt(8, "chunk info is %v, want %v", codec, b.InfoCodec)
	case (features^b.Features)&^FeatureInlinedMeta != 0: // which a merged bootstrap does not say
		return corrupt(4, "features %#x, want %#x", features, b.Features)
	case count != b.ChunkCount || count == 0 || count > MaxChunks:
		return corrupt(12, "%d chunks, want %d, from 1 to %d", count, b.ChunkCount, MaxChunks)
	case le.Uint64(h[16:]) != b.InfoOffset || le.Uint64(h[24:]) != b.InfoLength || le.Uint64(h[32:]) != b.InfoSize:
		return corrupt(16, "chunk info at %d, %d bytes of %d; want %d, %d of %d",
			le.Uint64(h[16:]), le.Uint64(h[24:]), le.Uint64(h[32:]), b.InfoOffset, b.InfoLength, b.InfoSize)
	case !b.infoFits():
		return corrupt(32, "chunk info of %d bytes, want %d for each of %d chunks", b.InfoSize, b.infoEntry(), count)
	}
	if b.Features&(FeatureBatch|FeatureZran) == 0 {
		return 0, nil
	}
	n, at, more := uint64(le.Uint32(h[56:])), uint64(count)*uint64(b.infoEntry()), b.InfoSize-uint64(count)*uint64(b.infoEntry())
	zran := b.Features&FeatureZran != 0
	if le.Uint64(h[40:]) != at || le.Uint64(h[48:]) != more || !zran && n*batchSize != more || zran && (n == 0 || n > uint64(count) || n*pointSize > more) {
		return corrupt(40, "%d batches or checkpoints of %d bytes at %d of the chunk info, want them in %d bytes at %d", n, le.Uint64(h[48:]), le.Uint64(h[40:]), more, at)
	}
	return int(n), nil
}

// decodeInfo fills in Chunks and, where unknown, Span.
func (b *BlobInfo) decodeInfo(p []byte, name string) error {
	step := b.infoEntry()
	p, batches := p[:int(b.ChunkCount)*step], p[int(b.ChunkCount)*step:]
	b.Chunks = make([]ChunkRef, 0, len(p)/step)
	var end, addr uint64
	var unit, content uint32 // stored bytes and content of the chunk, or its batch
	last := int64(-1)        // batch
	most := b.InfoOffset     // where the data ends
	if b.Features&FeatureSeparate != 0 {
		most = uint64(b.Size)
	}
	for i := 0; len(p) > 0; i, p = i+1, p[step:] {
		var c ChunkRef
		corrupt := func(format string, args ...any) error {
			return index.Errorf(index.ErrCorrupt, name, int64(b.InfoOffset), "chunk %d: "+format, append([]any{i}, args...)...)
		}
		batch := uint32(0)
		if step == infoV1Size {
			c = decodeInfoV1(p)
		} else {
			var flags byte
			if c, batch, flags = decodeInfoV2(p); flags&^(infoCompressed|infoCRC|infoBatch) != 0 {
				return index.Errorf(index.ErrUnsupported, name, int64(b.InfoOffset), "flags %#x of chunk %d (zran or encryption)", flags, i)
			}
		}
		c.Index = uint32(i)
		unit, content = c.Length, c.Size
		if c.Batch {
			if int(batch) >= len(batches)/batchSize || int64(batch) != last && int64(batch) != last+1 {
				return corrupt("in batch %d, after batch %d of %d", batch, last, len(batches)/batchSize)
			}
			le := binary.LittleEndian
			unit, content = le.Uint32(batches[batch*batchSize:]), le.Uint32(batches[batch*batchSize+4:])
			if content > MaxChunkSize || c.In > content || c.Size > content-c.In {
				return corrupt("%d bytes at %d of a batch of %d", c.Size, c.In, content)
			}
			c.Length, c.Compressed = unit, unit != content
			if int64(batch) == last {
				before := &b.Chunks[len(b.Chunks)-1]
				if !c.follows(before) || c.In < before.In+before.Size {
					return corrupt("%d bytes at %d of batch %d, behind %d bytes at %d", c.Size, c.In, batch, before.Size, before.In)
				}
				end = c.Offset
			}
			last = int64(batch)
		}
		if unit == 0 || unit > content || c.Compressed != (unit < content) || c.Offset < end || c.Addr < addr || c.Addr%blockSize != 0 ||
			c.Offset+uint64(unit) > most || b.Span != 0 && c.Addr+uint64(c.Size) > b.Span {
			return corrupt("%d bytes at %d for %d bytes at address %d; chunk before ends at %d and %d", unit, c.Offset, content, c.Addr, end, addr)
		}
		end, addr = c.Offset+uint64(unit), c.Addr+roundUp(uint64(c.Size))
		b.Chunks = append(b.Chunks, c)
	}
	if b.Span == 0 {
		b.Span = addr
	}
	return nil
}

// maxPart bounds what is decoded into memory at once: the chunk info of a full
// blob is 384 MiB, and batches of one chunk each make it 1 GiB.
const maxPart = (infoV2Size + batchSize) * MaxChunks

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
