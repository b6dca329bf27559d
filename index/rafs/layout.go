package rafs

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// What the format allows.
const (
	MinChunkSize = 4 << 10  // bytes; also the unit of addresses
	MaxChunkSize = 16 << 20 // bytes
	MaxChunks    = 1 << 24  // a blob: an inode's chunk index has 24 bits
	MaxBlobs     = 254      // an image: device ids have 8 bits, 0 and 255 are taken

	maxBlobSize = 1 << 40 // stored bytes of a blob
	maxAddress  = 1 << 44 // bytes of a blob's address space: 2^32 blocks
)

const (
	blockSize      = 4096
	blockBits      = 12
	superOffset    = 1024
	superSize      = 128
	extOffset      = superOffset + superSize
	extSize        = 256
	deviceOffset   = extOffset + extSize
	deviceSize     = 128
	blobEntrySize  = 256
	chunkEntrySize = 80
)

// Fields of the EROFS super block that RAFS gives fixed values.
const (
	superMagic     = 0xE0F5E1E2
	compatRAFS     = 0x40000000
	incompatRAFS   = 0xC // chunked files, device table
	devtSlotRAFS   = deviceOffset / deviceSize
	superChecksum  = 4 // offsets in the super block
	superCompat    = 8
	superBlockBits = 12
	superExtSlots  = 13
	superBlocks    = 36
	superXattr     = 44
	superIncompat  = 80
	superUnion     = 84
	superDevices   = 86
	superDevtSlot  = 88
)

// Flags of an image, from the extended super block.
type Flags uint64

// The flags.
const (
	FlagNone          Flags = 0x1 // compressor of the chunks: exactly one of four
	FlagLZ4           Flags = 0x2
	FlagGzip          Flags = 0x40
	FlagZstd          Flags = 0x80
	FlagBLAKE3        Flags = 0x4 // digest of the chunks: exactly one of two
	FlagSHA256        Flags = 0x8
	FlagExplicitOwner Flags = 0x10    // owners are those of the files
	FlagXattr         Flags = 0x20    // some file has extended attributes
	FlagInlineDigests Flags = 0x100   // every blob holds its chunks' digests
	FlagTarfs         Flags = 0x200   // blobs are tar files, blocks 512 bytes
	FlagPlain         Flags = 1 << 24 // not encrypted
	FlagAES128XTS     Flags = 1 << 25 // encrypted
	flagCompressors         = FlagNone | FlagLZ4 | FlagGzip | FlagZstd
	flagDigesters           = FlagBLAKE3 | FlagSHA256
)

// Feature bits of a blob: in its blob table entry and in its meta header.
const (
	FeatureAligned       = 0x1 // addresses are multiples of 4 KiB
	FeatureInlinedMeta   = 0x2 // the blob holds its own bootstrap, image.boot
	FeatureChunkInfoV2   = 0x4
	FeatureZran          = 0x8
	FeatureSeparate      = 0x10
	FeatureInlineDigests = 0x20
	FeatureTarfs         = 0x40
	FeatureBatch         = 0x80
	FeatureEncrypted     = 0x100
	FeatureChunkDict     = 0x200
	FeatureExternal      = 0x800
	FeatureTarHeader     = 1 << 28
	FeatureTOC           = 1 << 29
	FeatureCapTarTOC     = 1 << 30 // made by nydus-image 2.2 or later

	featuresKnown = FeatureAligned | FeatureInlinedMeta | FeatureChunkInfoV2 | FeatureZran | FeatureSeparate | FeatureInlineDigests | FeatureBatch |
		FeatureTarHeader | FeatureTOC | FeatureCapTarTOC
	featuresWritten = FeatureAligned | FeatureInlineDigests | FeatureTarHeader | FeatureTOC | FeatureCapTarTOC
)

// refusedFeatures names what a reader cannot do without understanding it.
var refusedFeatures = []struct {
	bit  uint32
	name string
}{
	{FeatureTarfs, "tarfs"},
	{FeatureEncrypted, "encryption"},
	{FeatureChunkDict, "chunk dictionary"},
	{FeatureExternal, "external blob"},
}

// checkFeatures refuses features by name. where says whose they are.
func checkFeatures(f uint32, name string, off int64) error {
	for _, r := range refusedFeatures {
		if f&r.bit != 0 {
			return index.Errorf(index.ErrUnsupported, name, off, "blob feature %s", r.name)
		}
	}
	if u := f &^ featuresKnown; u != 0 {
		return index.Errorf(index.ErrUnsupported, name, off, "unknown blob features %#x", u)
	}
	if f&FeatureBatch != 0 && f&FeatureChunkInfoV2 == 0 {
		return index.Errorf(index.ErrCorrupt, name, off, "blob with batches and chunk info that cannot tell them")
	}
	if f&FeatureZran != 0 && f&(FeatureChunkInfoV2|FeatureSeparate|FeatureBatch) != FeatureChunkInfoV2|FeatureSeparate {
		return index.Errorf(index.ErrCorrupt, name, off, "zran blob with features %#x: its chunk info is a blob of its own that tells of no batches", f)
	}
	if f&FeatureAligned == 0 {
		return index.Errorf(index.ErrUnsupported, name, off, "blob without the feature aligned")
	}
	return nil
}

// Numbers of compressors and digesters outside of the flags.
const (
	algNone   = 0
	algLZ4    = 1
	algGzip   = 2
	algZstd   = 3
	algBLAKE3 = 0
	algSHA256 = 1
)

func codecNumber(c chunk.Codec) (uint32, Flags, error) {
	switch c {
	case chunk.None:
		return algNone, FlagNone, nil
	case chunk.LZ4:
		return algLZ4, FlagLZ4, nil
	case chunk.Zstd:
		return algZstd, FlagZstd, nil
	}
	return 0, 0, fmt.Errorf("%w: compressor %v in a RAFS image", index.ErrUnsupported, c)
}

func digesterNumber(a chunk.Algorithm) (uint32, Flags, error) {
	switch a {
	case chunk.BLAKE3:
		return algBLAKE3, FlagBLAKE3, nil
	case chunk.SHA256:
		return algSHA256, FlagSHA256, nil
	}
	return 0, 0, fmt.Errorf("%w: digester %v in a RAFS image", index.ErrUnsupported, a)
}

func codecOf(n uint32, name string, off int64) (chunk.Codec, error) {
	switch n {
	case algNone:
		return chunk.None, nil
	case algLZ4:
		return chunk.LZ4, nil
	case algZstd:
		return chunk.Zstd, nil
	case algGzip:
		return chunk.Gzip, nil
	}
	return 0, index.Errorf(index.ErrCorrupt, name, off, "compressor %d is unknown", n)
}

func digesterOf(n uint32, name string, off int64) (chunk.Algorithm, error) {
	switch n {
	case algBLAKE3:
		return chunk.BLAKE3, nil
	case algSHA256:
		return chunk.SHA256, nil
	}
	return 0, index.Errorf(index.ErrCorrupt, name, off, "digester %d is unknown", n)
}

func checkChunkSize(n uint32) error {
	if n < MinChunkSize || n > MaxChunkSize || n&(n-1) != 0 {
		return fmt.Errorf("%w: chunk size %d, want a power of two from %d to %d", index.ErrUnsupported, n, MinChunkSize, MaxChunkSize)
	}
	return nil
}

// extSuper is the extended super block.
//
//	 0 u64 flags                 24 u64 chunk table offset
//	 8 u64 blob table offset     32 u64 chunk table size
//	16 u32 blob table size       40 u64 prefetch table offset
//	20 u32 chunk size            48 u32 prefetch table size
type extSuper struct {
	flags                  Flags
	blobOff                uint64
	blobSize               uint32
	chunkSize              uint32
	chunkOff, chunkTabSize uint64
	prefetchOff            uint64
	prefetchSize           uint32
}

func (e *extSuper) encode() []byte {
	p := make([]byte, 0, extSize)
	le := binary.LittleEndian
	p = le.AppendUint64(p, uint64(e.flags))
	p = le.AppendUint64(p, e.blobOff)
	p = le.AppendUint32(p, e.blobSize)
	p = le.AppendUint32(p, e.chunkSize)
	p = le.AppendUint64(p, e.chunkOff)
	p = le.AppendUint64(p, e.chunkTabSize)
	p = le.AppendUint64(p, e.prefetchOff)
	p = le.AppendUint32(p, e.prefetchSize)
	return p[:extSize]
}

func decodeExt(p []byte) extSuper {
	le := binary.LittleEndian
	return extSuper{
		flags:        Flags(le.Uint64(p)),
		blobOff:      le.Uint64(p[8:]),
		blobSize:     le.Uint32(p[16:]),
		chunkSize:    le.Uint32(p[20:]),
		chunkOff:     le.Uint64(p[24:]),
		chunkTabSize: le.Uint64(p[32:]),
		prefetchOff:  le.Uint64(p[40:]),
		prefetchSize: le.Uint32(p[48:]),
	}
}

// encodeBlob makes the blob table entry of b.
//
//	 0 id[64]                 88 u64 stored size        136 toc digest[32]
//	64 u32 index              96 u64 address space      168 meta digest[32]
//	68 u32 chunk size        104 u32 toc size           200 u64 meta size
//	72 u32 chunks            108 u32 info compressor    208 iv[8]
//	76 u32 compressor        112 u64 info offset        216 u32 cipher
//	80 u32 digester          120 u64 info stored size   220 zeros
//	84 u32 features          128 u64 info size
func encodeBlob(dst []byte, idx int, b *BlobInfo) ([]byte, error) {
	codec, _, err := codecNumber(b.Compressor)
	if err != nil {
		return nil, err
	}
	digester, _, err := digesterNumber(b.Digester)
	if err != nil {
		return nil, err
	}
	info, _, err := codecNumber(b.InfoCodec)
	if err != nil {
		return nil, err
	}
	if len(b.ID) != 64 || !isHex(b.ID) && b.ID != inlineID {
		return nil, fmt.Errorf("blob %d: id %q, want 64 hex digits", idx, b.ID)
	}
	le := binary.LittleEndian
	n := len(dst)
	dst = append(dst, b.ID...)
	for _, v := range []uint32{uint32(idx), b.ChunkSize, b.ChunkCount, codec, digester, b.Features} {
		dst = le.AppendUint32(dst, v)
	}
	dst = le.AppendUint64(dst, uint64(b.Size))
	dst = le.AppendUint64(dst, b.Span)
	dst = le.AppendUint32(dst, b.TOCSize)
	dst = le.AppendUint32(dst, info)
	dst = le.AppendUint64(dst, b.InfoOffset)
	dst = le.AppendUint64(dst, b.InfoLength)
	dst = le.AppendUint64(dst, b.InfoSize)
	dst = append(dst, b.TOCDigest[:]...)
	return append(dst, make([]byte, n+blobEntrySize-len(dst))...), nil
}

// decodeBlob reads entry idx of the blob table, at offset off of file name.
func decodeBlob(p []byte, idx int, name string, off int64) (b BlobInfo, err error) {
	corrupt := func(at int64, format string, args ...any) (BlobInfo, error) {
		return BlobInfo{}, index.Errorf(index.ErrCorrupt, name, off+at, format, args...)
	}
	le := binary.LittleEndian
	b = BlobInfo{
		ID:         string(bytes.TrimRight(p[:64], "\x00")),
		ChunkSize:  le.Uint32(p[68:]),
		ChunkCount: le.Uint32(p[72:]),
		Features:   le.Uint32(p[84:]),
		Size:       int64(le.Uint64(p[88:])),
		Span:       le.Uint64(p[96:]),
		TOCSize:    le.Uint32(p[104:]),
		InfoOffset: le.Uint64(p[112:]),
		InfoLength: le.Uint64(p[120:]),
		InfoSize:   le.Uint64(p[128:]),
		TOCDigest:  [32]byte(p[136:]),
		MetaSum:    [32]byte(p[168:]),
		MetaSize:   int64(le.Uint64(p[200:])),
	}
	if n := le.Uint32(p[216:]); n != 0 {
		return BlobInfo{}, index.Errorf(index.ErrUnsupported, name, off+216, "encryption (cipher %d)", n)
	}
	if err := checkFeatures(b.Features, name, off+84); err != nil {
		return BlobInfo{}, err
	}
	if n := le.Uint32(p[64:]); n != uint32(idx) {
		return corrupt(64, "blob index %d, want %d", n, idx)
	}
	if b.Compressor, err = codecOf(le.Uint32(p[76:]), name, off+76); err != nil {
		return BlobInfo{}, err
	}
	if b.Digester, err = digesterOf(le.Uint32(p[80:]), name, off+80); err != nil {
		return BlobInfo{}, err
	}
	if b.InfoCodec, err = codecOf(le.Uint32(p[108:]), name, off+108); err != nil {
		return BlobInfo{}, err
	}
	if b.InfoCodec == chunk.Gzip {
		return BlobInfo{}, index.Errorf(index.ErrUnsupported, name, off+108, "chunk info compressed by gzip")
	}
	switch {
	case len(b.ID) != 64 || !isHex(b.ID) && (b.ID != inlineID || b.Features&FeatureInlinedMeta == 0):
		return corrupt(0, "blob id %q, want 64 hex digits", b.ID)
	case b.ChunkCount > MaxChunks:
		return corrupt(72, "%d chunks, at most %d are possible", b.ChunkCount, MaxChunks)
	case b.Size < 0 || b.Size > maxBlobSize:
		return corrupt(88, "blob of %d bytes, at most %d are possible", uint64(b.Size), uint64(maxBlobSize))
	case b.Span > maxAddress:
		return corrupt(96, "addresses to %d, at most %d are possible", b.Span, uint64(maxAddress))
	case b.MetaSize < 0 || b.MetaSize > maxBlobSize:
		return corrupt(200, "a blob of %d bytes with chunk info", uint64(b.MetaSize))
	case b.InfoLength > b.InfoSize || b.InfoOffset > maxBlobSize || b.InfoLength > maxBlobSize:
		return corrupt(112, "chunk info of %d bytes, %d stored at %d", b.InfoSize, b.InfoLength, b.InfoOffset)
	case !b.infoFits():
		return corrupt(128, "chunk info of %d bytes, want %d for each of %d chunks", b.InfoSize, b.infoEntry(), b.ChunkCount)
	}
	return b, nil
}

// inlineID stands for the id of the blob a bootstrap lies in itself: its digest
// could not be known yet.
var inlineID = strings.Repeat("x", 64)

func isHex(s string) bool {
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}
