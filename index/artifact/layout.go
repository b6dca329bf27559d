package artifact

import (
	"encoding/binary"
	"encoding/hex"
	"strings"
	"sync"
	"unsafe"

	"github.com/klauspost/compress/zstd"
	"lukechampine.com/blake3"

	"github.com/shale-image/shale/index"
)

const (
	magic      = "SHALEIDX"
	version    = 2
	headerSize = 24
	sumSize    = 32 // of chunks, and of all

	// Sections of at least frameSize bytes have a zstd frame of their own: for
	// codes that fit numbers of one kind. The index of a Debian image is 1%
	// smaller for it.
	frameSize = 1 << 10

	// What the frames may decode to: slack + ratio x the bytes of the index. Real
	// trees decode to less than the index, a million empty files to 21 times.
	slack = 1 << 20
	ratio = 64
)

// The sections in the frames. Those up to 63 must be understood by who reads
// them; from 64 on they may be skipped.
const (
	secImage = 1 + iota
	secBlobs
	secSpans
	secAlgorithms
	secSizes
	secGaps
	secXattrs
	secClasses
	secTimes
	secNames
	secClass
	secTime
	secLinks
	secChildren
	secFiles
	secStarts
	secRuns
	secTargets
	secDevices
	sections
	optional = 64
)

var sectionNames = [sections]string{"", "image", "blobs", "spans", "algorithms", "sizes", "gaps", "xattrs", "classes",
	"times", "names", "class", "time", "links", "children", "files", "starts", "runs", "targets", "devices"}

// Bounds that are not a matter of taste.
const (
	maxName   = 255       // bytes of a name
	maxPath   = 4096      // bytes of the path of a directory with children, a slash for each name
	maxTarget = 4095      // bytes of a symbolic link's target
	alignment = 4 << 10   // of extents
	maxMode   = 0o177777  // type and permissions
	maxNsec   = 999999999 // of a time
	maxUnit   = 4 << 10   // of the gaps of a blob
)

// What things take in memory, in bytes. Lists that grow are twice as long for a
// moment.
const (
	blobBytes   = 2*int64(unsafe.Sizeof(index.Blob{})) + 128 // with its digest
	spanBytes   = int64(unsafe.Sizeof(index.Span{}))
	chunkBytes  = int64(unsafe.Sizeof(index.Chunk{}))
	sliceBytes  = 2 * 24
	xattrBytes  = int64(unsafe.Sizeof(index.Xattr{}))
	classBytes  = 2 * int64(unsafe.Sizeof(class{}))
	timeBytes   = 2 * int64(unsafe.Sizeof(index.Time{}))
	linkBytes   = 2 * int64(unsafe.Sizeof(link{}))
	inodeBytes  = int64(unsafe.Sizeof(index.Inode{}))
	mapBytes    = 256 // of a directory's names, up to eight
	nameBytes   = 64  // of each
	extentBytes = int64(unsafe.Sizeof(index.Extent{}))
)

var encoders = sync.Pool{New: func() any {
	e, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedBestCompression), zstd.WithEncoderConcurrency(1),
		zstd.WithEncoderCRC(false), zstd.WithSingleSegment(true))
	if err != nil {
		panic(err) // the options are constants
	}
	return e
}}

// seal puts an index of a version together. Each part of what is compressed is a frame.
func seal(version uint32, sums []byte, content ...[]byte) []byte {
	size := 0
	for _, part := range content {
		size += len(part)
	}
	p := make([]byte, 0, headerSize+len(sums)+size/3)
	p = append(p, magic...)
	p = binary.LittleEndian.AppendUint32(p, version)
	p = binary.LittleEndian.AppendUint32(p, uint32(len(sums)/sumSize))
	p = binary.LittleEndian.AppendUint64(p, uint64(size))
	p = append(p, sums...)
	e := encoders.Get().(*zstd.Encoder)
	for _, part := range content {
		p = e.EncodeAll(part, p)
	}
	encoders.Put(e)
	all := blake3.Sum256(p)
	return append(p, all[:]...)
}

// open takes an index apart.
func (d *decoder) open(p []byte) (sums, content []byte, err error) {
	bad := func(kind error, off int64, format string, args ...any) ([]byte, []byte, error) {
		return nil, nil, index.Errorf(kind, d.name, off, format, args...)
	}
	le := binary.LittleEndian
	if len(p) < len(magic)+4 || string(p[:len(magic)]) != magic {
		return bad(index.ErrCorrupt, 0, "no index: want %q", magic)
	}
	if v := le.Uint32(p[8:]); v == 0 {
		return bad(index.ErrCorrupt, 8, "version 0")
	} else if v > version {
		return bad(index.ErrUnsupported, 8, "index of version %d, want at most %d", v, version)
	}
	end := len(p) - sumSize
	if end < headerSize {
		return bad(index.ErrCorrupt, int64(len(p)), "the index is cut off")
	}
	if blake3.Sum256(p[:end]) != [sumSize]byte(p[end:]) {
		return bad(index.ErrCorrupt, int64(end), "the checksum is wrong")
	}
	count, size := int64(le.Uint32(p[12:])), le.Uint64(p[16:])
	if count > int64(end-headerSize)/sumSize {
		return bad(index.ErrCorrupt, 12, "sums of %d chunks in %d bytes", count, end-headerSize)
	}
	if size > slack+ratio*uint64(len(p)) {
		return bad(index.ErrLimit, 16, "%d bytes decoded, want at most %d for an index of %d", size, slack+ratio*len(p), len(p))
	}
	if d.bytes = int64(len(p)) + int64(size) + count*chunkBytes; d.bytes > d.lim.Memory {
		return bad(index.ErrLimit, 16, "%d chunks and %d bytes decoded take more than %d bytes of memory (Memory)", count, size, d.lim.Memory)
	}
	at := headerSize + int(count)*sumSize
	z, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecodeAllCapLimit(true))
	if err != nil {
		return bad(index.ErrCorrupt, int64(at), "zstd: %v", err)
	}
	defer z.Close()
	content, err = z.DecodeAll(p[at:end], make([]byte, 0, size))
	if err != nil {
		return bad(index.ErrCorrupt, int64(at), "zstd: %v", err)
	}
	if uint64(len(content)) != size {
		return bad(index.ErrCorrupt, int64(at), "%d bytes decoded, want %d", len(content), size)
	}
	return p[headerSize:at], content, nil
}

// parseDigest returns the sum in "sha256:<64 hex digits>".
func parseDigest(s string) (sum [32]byte, err error) {
	h, ok := strings.CutPrefix(s, "sha256:")
	if ok && len(h) == 64 && strings.ToLower(h) == h {
		_, err = hex.Decode(sum[:], []byte(h))
	}
	if !ok || len(h) != 64 || strings.ToLower(h) != h || err != nil {
		return sum, index.Errorf(index.ErrUnsupported, "index", -1, "digest %q, want sha256:<64 hex digits>", s)
	}
	return sum, nil
}

func formatDigest(sum []byte) string { return "sha256:" + hex.EncodeToString(sum) }
