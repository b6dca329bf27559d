package rafs

import (
	"cmp"
	"encoding/binary"
	"io"
	"slices"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/erofs"
	"github.com/shale-image/shale/index"
)

// Image is an opened bootstrap: its tables, checked and in memory. It is safe
// for concurrent use as far as the reader under it is.
type Image struct {
	fs       *erofs.Image
	name     string
	ext      extSuper
	blobs    []BlobInfo
	chunks   []index.Chunk
	spans    [][]index.Span // by blob
	places   []place        // of chunks, by key
	digester chunk.Algorithm
	codec    chunk.Codec
	prefetch []uint32
}

// place is where a chunk is as inodes know it: key is the blob, 32 bits of
// block address, below.
type place struct {
	key   uint64
	index uint32 // in the blob
	chunk uint32 // in Image.chunks
}

func placeKey(blob, block uint32) uint64 { return uint64(blob)<<32 | uint64(block) }

// Metas opens the blob that has the chunk info of blob n of an image: what b says
// of it is what the bootstrap says. Errors name the blob by name.
type Metas func(n int, b *BlobInfo) (r io.ReaderAt, size int64, name string, err error)

// Open opens the bootstrap of size bytes that r holds; name is for errors. It
// reads the tables, not the inodes; r is used until the Image is. What is
// malformed is ErrCorrupt, and what this package does not read ErrUnsupported,
// by name: encryption, tarfs and 512-byte blocks, external blobs, images without a
// chunk table, and, if metas is nil, those that Needs is about.
func Open(r io.ReaderAt, size int64, name string, metas Metas) (*Image, error) {
	im, err := openTables(r, size, name)
	if err != nil {
		return nil, err
	}
	if err := im.readChunks(r, metas); err != nil {
		return nil, err
	}
	p := make([]byte, im.ext.prefetchSize)
	if err := readAt(r, p, int64(im.ext.prefetchOff), name); err != nil {
		return nil, err
	}
	for ; len(p) > 0; p = p[4:] {
		im.prefetch = append(im.prefetch, binary.LittleEndian.Uint32(p))
	}
	return im, nil
}

// openTables is Open but for the tables of chunks and prefetching.
func openTables(r io.ReaderAt, size int64, name string) (*Image, error) {
	im := &Image{name: name}
	if size < superOffset+superSize+extSize {
		return nil, index.Errorf(index.ErrCorrupt, name, size, "bootstrap of %d bytes", size)
	}
	head := make([]byte, superSize+extSize)
	if err := readAt(r, head, superOffset, name); err != nil {
		return nil, err
	}
	if err := checkSuper(head, name); err != nil {
		return nil, err
	}
	im.ext = decodeExt(head[superSize:])
	devices := int(binary.LittleEndian.Uint16(head[superDevices:]))
	if err := im.checkExt(size, devices); err != nil {
		return nil, err
	}
	var err error
	if im.fs, err = erofs.Open(r, size, name); err != nil {
		return nil, err
	}
	return im, im.readBlobs(r)
}

// Flags returns the image's flags.
func (im *Image) Flags() Flags { return im.ext.flags }

// ChunkSize returns the bytes of every chunk but the last of a file.
func (im *Image) ChunkSize() uint32 { return im.ext.chunkSize }

// Compressor returns what the image says of its chunks' compressor. Each blob
// has its own, and each chunk in the tree.
func (im *Image) Compressor() chunk.Codec { return im.codec }

// Digester returns the algorithm of all chunks' digests.
func (im *Image) Digester() chunk.Algorithm { return im.digester }

// Prefetch returns the prefetch table: numbers of inodes (EROFS nids) that
// their maker wants read first, directories standing for all below them. It
// may hold anything; the caller must not change it.
func (im *Image) Prefetch() []uint32 { return im.prefetch }

// Blobs returns the blob table; Chunks of an entry are those in the image's
// chunk table, so that WriteBootstrap can use the entry again. The caller must
// not change it.
func (im *Image) Blobs() []BlobInfo { return im.blobs }

func checkSuper(p []byte, name string) error {
	le := binary.LittleEndian
	unsupported := func(at int, format string, args ...any) error {
		return index.Errorf(index.ErrUnsupported, name, int64(superOffset+at), format, args...)
	}
	switch {
	case le.Uint32(p) != superMagic:
		return index.Errorf(index.ErrCorrupt, name, superOffset, "magic %#x, want %#x", le.Uint32(p), uint32(superMagic))
	case le.Uint32(p[superCompat:])&compatRAFS == 0:
		return unsupported(superCompat, "EROFS image that is not RAFS v6 (feature_compat %#x)", le.Uint32(p[superCompat:]))
	case p[superBlockBits] == 9:
		return unsupported(superBlockBits, "blocks of 512 bytes (tarfs)")
	case p[superBlockBits] != blockBits:
		return unsupported(superBlockBits, "blocks of 2^%d bytes", p[superBlockBits])
	case le.Uint32(p[superIncompat:]) != incompatRAFS:
		return unsupported(superIncompat, "feature_incompat %#x, want %#x", le.Uint32(p[superIncompat:]), incompatRAFS)
	case le.Uint32(p[superChecksum:]) != 0 || p[superExtSlots] != 0 || le.Uint16(p[superUnion:]) != 0:
		return unsupported(0, "super block with a checksum, more slots or compression")
	case le.Uint32(p[superXattr:]) != 0:
		return unsupported(superXattr, "shared extended attributes")
	case le.Uint16(p[superDevtSlot:]) != devtSlotRAFS:
		return index.Errorf(index.ErrCorrupt, name, superOffset+superDevtSlot, "device slots at %d times 128, want %d", le.Uint16(p[superDevtSlot:]), devtSlotRAFS)
	case le.Uint16(p[superDevices:]) > MaxBlobs:
		return index.Errorf(index.ErrCorrupt, name, superOffset+superDevices, "%d device slots, at most %d are possible", le.Uint16(p[superDevices:]), MaxBlobs)
	}
	return nil
}

// checkExt checks the extended super block and that the tables lie behind the
// device slots, inside the file and apart from each other.
func (im *Image) checkExt(size int64, devices int) error {
	e, f := &im.ext, im.ext.flags
	switch {
	case f&FlagAES128XTS != 0:
		return index.Errorf(index.ErrUnsupported, im.name, extOffset, "encryption")
	case f&FlagTarfs != 0:
		return index.Errorf(index.ErrUnsupported, im.name, extOffset, "tarfs")
	}
	switch f & flagCompressors {
	case FlagNone:
		im.codec = chunk.None
	case FlagGzip:
		im.codec = chunk.Gzip
	case FlagLZ4:
		im.codec = chunk.LZ4
	case FlagZstd:
		im.codec = chunk.Zstd
	default:
		return index.Errorf(index.ErrCorrupt, im.name, extOffset, "flags %#x do not name one compressor", uint64(f))
	}
	switch f & flagDigesters {
	case FlagBLAKE3:
		im.digester = chunk.BLAKE3
	case FlagSHA256:
		im.digester = chunk.SHA256
	default:
		return index.Errorf(index.ErrCorrupt, im.name, extOffset, "flags %#x do not name one digest", uint64(f))
	}
	if checkChunkSize(e.chunkSize) != nil {
		return index.Errorf(index.ErrCorrupt, im.name, extOffset+20, "chunk size %d", e.chunkSize)
	}
	if int(e.blobSize) != devices*blobEntrySize {
		return index.Errorf(index.ErrCorrupt, im.name, extOffset+16, "blob table of %d bytes for %d device slots", e.blobSize, devices)
	}
	if e.prefetchOff == 0 || e.prefetchSize == 0 {
		// nydus-image writes a size without an offset into empty images.
		e.prefetchOff, e.prefetchSize = 0, 0
	}
	if e.chunkTabSize == 0 && devices > 0 {
		return index.Errorf(index.ErrUnsupported, im.name, extOffset+32, "image without a chunk table")
	}
	type table struct {
		what             string
		off, size, entry uint64
		align            uint64
	}
	tables := []table{
		{"blob table", e.blobOff, uint64(e.blobSize), blobEntrySize, blockSize},
		{"chunk table", e.chunkOff, e.chunkTabSize, chunkEntrySize, blockSize},
		{"prefetch table", e.prefetchOff, uint64(e.prefetchSize), 4, 4},
	}
	slices.SortStableFunc(tables, func(a, b table) int { return cmp.Compare(a.off, b.off) })
	end := uint64(deviceOffset + devices*deviceSize)
	for _, t := range tables {
		if t.size == 0 {
			continue
		}
		if t.off < end || t.off > uint64(size) || t.size > uint64(size)-t.off || t.size%t.entry != 0 || t.off%t.align != 0 {
			return index.Errorf(index.ErrCorrupt, im.name, extOffset, "%s of %d bytes at %d: want a multiple of %d, at a multiple of %d, between %d and %d",
				t.what, t.size, t.off, t.entry, t.align, end, size)
		}
		end = t.off + t.size
	}
	return nil
}

func (im *Image) readBlobs(r io.ReaderAt) error {
	off := int64(im.ext.blobOff)
	p := make([]byte, im.ext.blobSize)
	if len(p) > 0 {
		if err := readAt(r, p, off, im.name); err != nil {
			return err
		}
	}
	devices := im.fs.Devices()
	ids := make(map[string]bool)
	for i := 0; len(p) > 0; i, p, off = i+1, p[blobEntrySize:], off+blobEntrySize {
		b, err := decodeBlob(p, i, im.name, off)
		if err != nil {
			return err
		}
		switch {
		case b.ChunkSize != im.ext.chunkSize:
			return index.Errorf(index.ErrCorrupt, im.name, off+68, "chunk size %d in an image of %d", b.ChunkSize, im.ext.chunkSize)
		case b.Digester != im.digester:
			return index.Errorf(index.ErrUnsupported, im.name, off+80, "digests %v in an image of %v", b.Digester, im.digester)
		case i >= len(devices) || devices[i].Tag != b.ID:
			return index.Errorf(index.ErrCorrupt, im.name, off, "blob %s is not device %d", b.ID, i+1)
		case ids[b.ID]:
			return index.Errorf(index.ErrCorrupt, im.name, off, "second blob %s", b.ID)
		}
		ids[b.ID] = true
		im.blobs = append(im.blobs, b)
	}
	return nil
}
