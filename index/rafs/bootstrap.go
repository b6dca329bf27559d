package rafs

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"math/bits"
	"slices"

	"github.com/shale-image/shale/erofs"
	"github.com/shale-image/shale/index"
)

// flatAlign is the alignment of devices in the flat address space, 512 KiB in
// blocks, as nydus-image has it.
const flatAlign = 512 << 10 / blockSize

// minBootstrap is what Nydus reads before it knows the format.
const minBootstrap = 8192

// The flags of the chunk table we know.
const (
	chunkFlagCompressed = 0x1
	chunkFlagBatch      = 0x8
	chunkFlagCRC        = 0x10
)

// WriteBootstrap writes the bootstrap of t, whose Blobs blobs parallels:
// t.Chunks[i] lies in blobs[t.Chunks[i].Blob], and at its Offset in the stream
// (BlobInfo.Spans) there must be a ChunkRef that agrees with it. t must have all
// chunks of the batches it uses. o is what the image says of itself; all
// blobs have its ChunkSize and Digester.
//
// Files must be cut at multiples of the chunk size. Whole chunks may be
// missing, as holes, if t has a chunk of zeros to stand for them (NeedsZeros).
// What RAFS cannot say is ErrUnsupported or ErrLimit. The result depends on
// the arguments alone. The tree is not changed.
//
// prefetch are inodes of t for the prefetch table: what is to be read first,
// directories with all that is below them.
func WriteBootstrap(w io.Writer, t *index.Tree, blobs []BlobInfo, o BlobOptions, prefetch ...*index.Inode) error {
	b := &bootstrap{tree: t, blobs: blobs, o: o, prefetch: prefetch}
	if err := b.check(); err != nil {
		return fmt.Errorf("write bootstrap: %w", err)
	}
	if err := b.locate(); err != nil {
		return fmt.Errorf("write bootstrap: %w", err)
	}
	if err := b.walk(); err != nil {
		return fmt.Errorf("write bootstrap: %w", err)
	}
	if err := b.write(w); err != nil {
		return fmt.Errorf("write bootstrap: %w", err)
	}
	return nil
}

type bootstrap struct {
	tree  *index.Tree
	blobs []BlobInfo
	o     BlobOptions
	flags Flags
	refs  []ChunkRef // by chunk of tree
	used  []used     // chunks that files use, once each

	prefetch []*index.Inode
}

// used is a chunk that a file uses.
type used struct {
	chunk uint32
	off   int64 // in the first file that has it
}

func (b *bootstrap) check() error {
	if err := b.o.check(); err != nil {
		return err
	}
	if len(b.blobs) != len(b.tree.Blobs) {
		return fmt.Errorf("%d blobs are described, the tree has %d", len(b.blobs), len(b.tree.Blobs))
	}
	if len(b.blobs) > MaxBlobs {
		return fmt.Errorf("%w: %d blobs, more than %d", index.ErrLimit, len(b.blobs), MaxBlobs)
	}
	b.flags = FlagExplicitOwner | FlagInlineDigests
	_, codec, _ := codecNumber(b.o.Compressor)
	_, digester, _ := digesterNumber(b.o.Digester)
	b.flags |= codec | digester
	ids := make(map[string]bool, len(b.blobs))
	for i := range b.blobs {
		s := &b.blobs[i]
		switch {
		case ids[s.ID]: // Nydus keys its blobs by id
			return fmt.Errorf("blob %d: second blob %s", i, s.ID)
		case s.ChunkSize != b.o.ChunkSize:
			return fmt.Errorf("%w: blob %d has chunks of %d bytes, the image %d", index.ErrUnsupported, i, s.ChunkSize, b.o.ChunkSize)
		case s.Digester != b.o.Digester:
			return fmt.Errorf("%w: blob %d has digests %v, the image %v", index.ErrUnsupported, i, s.Digester, b.o.Digester)
		case s.Span%blockSize != 0 || s.Span > maxAddress:
			return fmt.Errorf("blob %d has %d bytes of addresses", i, s.Span)
		}
		if s.Features&FeatureInlineDigests == 0 {
			b.flags &^= FlagInlineDigests
		}
		ids[s.ID] = true
	}
	return nil
}

// locate finds each chunk of the tree in its blob.
func (b *bootstrap) locate() error {
	offsets := make([][]int64, len(b.blobs)) // of chunks in the streams
	for i := range b.blobs {
		_, offsets[i] = b.blobs[i].Spans()
	}
	b.refs = make([]ChunkRef, len(b.tree.Chunks))
	for i, c := range b.tree.Chunks {
		if int(c.Blob) >= len(b.blobs) {
			return fmt.Errorf("chunk %d is in blob %d of %d", i, c.Blob, len(b.blobs))
		}
		s := &b.blobs[c.Blob]
		at, ok := slices.BinarySearch(offsets[c.Blob], c.Offset)
		if !ok {
			return fmt.Errorf("chunk %d: no chunk at %d of the stream of blob %s", i, c.Offset, s.ID)
		}
		r := s.Chunks[at]
		if r.Size != c.Size || c.Digest.Algorithm != s.Digester {
			return fmt.Errorf("chunk %d at %d of the stream of blob %s: %d bytes, %v; the blob has %d, %v",
				i, c.Offset, s.ID, c.Size, c.Digest.Algorithm, r.Size, s.Digester)
		}
		if r.Index >= MaxChunks || r.Addr%blockSize != 0 || r.Addr+uint64(r.Size) > s.Span {
			return fmt.Errorf("chunk %d of blob %s: index %d, address %d", i, s.ID, r.Index, r.Addr)
		}
		b.refs[i] = r
	}
	return nil
}

// walk checks how files are cut, fills holes with zeros and finds the chunks
// that are used.
func (b *bootstrap) walk() error {
	seen := make([]bool, len(b.tree.Chunks))
	var filler *filler
	err := b.tree.Walk(func(path string, ino *index.Inode) error {
		if len(ino.Xattrs) > 0 {
			b.flags |= FlagXattr
		}
		if !ino.IsRegular() {
			return nil
		}
		holes, err := b.checkFile(path, ino)
		if err != nil {
			return err
		}
		if holes && filler == nil {
			if filler, err = newFiller(b, path); err != nil {
				return err
			}
		}
		for _, e := range ino.Extents {
			if !seen[e.Chunk] {
				seen[e.Chunk] = true
				b.used = append(b.used, used{e.Chunk, e.Off})
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	if filler != nil && !seen[filler.zeros] {
		seen[filler.zeros] = true
		b.used = append(b.used, used{filler.zeros, 0})
	}
	if err := b.completeBatches(seen); err != nil || filler == nil {
		return err
	}
	if err := filler.fill(); err != nil {
		return err
	}
	b.prefetch = slices.Clone(b.prefetch)
	for i, ino := range b.prefetch {
		if b.prefetch[i] = filler.done[ino]; b.prefetch[i] == nil {
			b.prefetch[i] = ino // which the layout will say is not in the tree
		}
	}
	return nil
}

// completeBatches also lists what no file uses of batches that files use: how
// much a batch decodes to is told by its last chunk.
func (b *bootstrap) completeBatches(seen []bool) error {
	type batch struct {
		blob   uint32
		offset uint64
	}
	missing := map[batch]int{} // chunks of a used batch that are not listed
	for _, u := range b.used {
		if r := &b.refs[u.chunk]; r.Batch {
			missing[batch{b.tree.Chunks[u.chunk].Blob, r.Offset}] = 0
		}
	}
	if len(missing) == 0 {
		return nil
	}
	for i := range b.blobs {
		for _, r := range b.blobs[i].Chunks {
			at := batch{uint32(i), r.Offset}
			if n, ok := missing[at]; ok {
				missing[at] = n + 1
			}
		}
	}
	for i, s := range seen {
		at := batch{b.tree.Chunks[i].Blob, b.refs[i].Offset}
		n, ok := missing[at]
		if !ok {
			continue
		}
		missing[at] = n - 1
		if !s {
			b.used = append(b.used, used{uint32(i), 0})
		}
	}
	for at, n := range missing {
		if n != 0 {
			return fmt.Errorf("the tree has %d chunks less than the batch at offset %d of blob %s", n, at.offset, b.blobs[at.blob].ID)
		}
	}
	return nil
}

// checkFile tells whether a file has holes, and refuses one that is cut in
// any other way than RAFS does.
func (b *bootstrap) checkFile(path string, ino *index.Inode) (holes bool, err error) {
	step, next := int64(b.o.ChunkSize), int64(0)
	for _, e := range ino.Extents {
		if int(e.Chunk) >= len(b.tree.Chunks) {
			return false, index.Errorf(index.ErrCorrupt, path, e.Off, "chunk %d of %d", e.Chunk, len(b.tree.Chunks))
		}
		size := int64(b.tree.Chunks[e.Chunk].Size)
		if e.Off < next || e.Off > ino.Size-size {
			return false, index.Errorf(index.ErrCorrupt, path, e.Off, "chunk of %d bytes in a file of %d, chunks before end at %d", size, ino.Size, next)
		}
		if e.Off%step != 0 || size != min(step, ino.Size-e.Off) {
			return false, index.Errorf(index.ErrUnsupported, path, e.Off, "chunk of %d bytes; RAFS cuts files at multiples of %d", size, step)
		}
		holes = holes || e.Off > next
		next = e.Off + size
	}
	return holes || next < ino.Size, nil
}

// NeedsZeros tells whether a file of t has a hole, so that WriteBootstrap will
// want a chunk of zeros in t: add one with BlobWriter.AddZeros.
func NeedsZeros(t *index.Tree) bool {
	found := io.EOF
	return found == t.Walk(func(_ string, ino *index.Inode) error {
		n := int64(0)
		for _, e := range ino.Extents {
			n += int64(t.Chunks[e.Chunk].Size)
		}
		if ino.IsRegular() && n < ino.Size {
			return found
		}
		return nil
	})
}

// write lays out the image and writes it with the tables behind it.
func (b *bootstrap) write(w io.Writer) error {
	devices := make([]erofs.Device, len(b.blobs))
	for i, s := range b.blobs {
		devices[i] = erofs.Device{Tag: s.ID, Blocks: uint32(min(s.Span/blockSize, math.MaxUint32))}
	}
	l, err := erofs.NewLayout(b.tree, erofs.Options{
		Devices: devices,
		Locate: func(c uint32) erofs.Location {
			r := &b.refs[c]
			return erofs.Location{Device: uint16(b.tree.Chunks[c].Blob + 1), Block: uint32(r.Addr / blockSize), Index: r.Index}
		},
		ChunkBits:  uint8(bits.TrailingZeros32(b.o.ChunkSize)),
		Compat:     compatRAFS,
		Ext:        make([]byte, extSize),
		KeepMapped: true,
	})
	if err != nil {
		return err
	}
	e := extSuper{flags: b.flags, chunkSize: b.o.ChunkSize}
	end := uint64(l.Blocks()) * blockSize
	e.blobOff, e.blobSize = end, uint32(len(b.blobs)*blobEntrySize)
	e.chunkOff, e.chunkTabSize = roundUp(end+uint64(e.blobSize)), uint64(len(b.used)*chunkEntrySize)
	nids, err := b.nids(l)
	if err != nil {
		return err
	}
	chunkEnd := e.chunkOff + e.chunkTabSize
	if len(nids) > 0 {
		e.prefetchOff, e.prefetchSize = chunkEnd, uint32(len(nids))
	}
	total := max(roundUp(chunkEnd+uint64(len(nids))), minBootstrap)
	l.SetExt(e.encode())

	head := &headWriter{w: w, want: deviceOffset + len(devices)*deviceSize}
	if head.patch, err = b.headPatch(devices, total/blockSize); err != nil {
		return err
	}
	if _, err := l.WriteTo(head); err != nil {
		return err
	}
	var table []byte
	for i := range b.blobs {
		if table, err = encodeBlob(table, i, &b.blobs[i]); err != nil {
			return err
		}
	}
	table = append(table, make([]byte, e.chunkOff-end-uint64(len(table)))...)
	table = append(b.appendChunks(table), nids...)
	table = append(table, make([]byte, total-chunkEnd-uint64(len(nids)))...)
	_, err = w.Write(table)
	return err
}

// nids returns the prefetch table: numbers of inodes, 4 bytes each.
func (b *bootstrap) nids(l *erofs.Layout) ([]byte, error) {
	var p []byte
	for _, ino := range b.prefetch {
		nid, ok := l.NID(ino)
		if !ok || nid > math.MaxUint32 {
			return nil, fmt.Errorf("%w: an inode to prefetch has number %d, or is not in the tree", index.ErrUnsupported, nid)
		}
		p = binary.LittleEndian.AppendUint32(p, uint32(nid))
	}
	return p, nil
}

// headPatch returns what sets the fields of the super block and the device
// slots that depend on the tables: a blob is mapped behind them.
func (b *bootstrap) headPatch(devices []erofs.Device, blocks uint64) (func([]byte), error) {
	at := blocks
	for i := range devices {
		at = (at + flatAlign - 1) / flatAlign * flatAlign
		devices[i].Mapped = uint32(at)
		if at += uint64(devices[i].Blocks); at > math.MaxUint32 {
			return nil, fmt.Errorf("%w: blobs of together more than %d blocks", index.ErrLimit, uint32(math.MaxUint32))
		}
	}
	return func(p []byte) {
		le := binary.LittleEndian
		if len(devices) == 0 {
			le.PutUint32(p[superOffset+superBlocks:], 0) // Nydus takes nothing else then
		}
		for i, d := range devices {
			le.PutUint32(p[deviceOffset+i*deviceSize+68:], d.Mapped)
		}
	}, nil
}

// headWriter holds the first want bytes back until they can be patched.
type headWriter struct {
	w     io.Writer
	want  int
	patch func([]byte)
	head  []byte
}

func (h *headWriter) Write(p []byte) (int, error) {
	if h.patch == nil {
		return h.w.Write(p)
	}
	if h.head = append(h.head, p...); len(h.head) < h.want {
		return len(p), nil
	}
	h.patch(h.head)
	h.patch = nil
	if _, err := h.w.Write(h.head); err != nil {
		return 0, err
	}
	h.head = nil
	return len(p), nil
}

// appendChunks appends the chunk table, in order of digests as nydus-image
// has it. Of a chunk in a batch it tells what otherwise the blob alone does: the
// stored bytes of the batch, and, where there can be no checksum, where in it
// the chunk begins.
//
//	 0 digest[32]      40 u32 stored bytes    56 u64 address
//	32 u32 blob        44 u32 bytes           64 u64 offset in a file
//	36 u32 flags       48 u64 offset          72 u32 index, u32 crc32 or offset in the batch
func (b *bootstrap) appendChunks(dst []byte) []byte {
	chunks := b.tree.Chunks
	slices.SortFunc(b.used, func(x, y used) int {
		p, q := &chunks[x.chunk], &chunks[y.chunk]
		if n := bytes.Compare(p.Digest.Sum[:], q.Digest.Sum[:]); n != 0 {
			return n
		}
		return cmp.Or(cmp.Compare(p.Blob, q.Blob), cmp.Compare(p.Offset, q.Offset))
	})
	le := binary.LittleEndian
	dst = slices.Grow(dst, len(b.used)*chunkEntrySize+blockSize)
	for _, u := range b.used {
		c, r := &chunks[u.chunk], &b.refs[u.chunk]
		var flags uint32
		if r.Compressed {
			flags = chunkFlagCompressed
		}
		if r.Batch {
			flags |= chunkFlagBatch
		}
		dst = append(dst, c.Digest.Sum[:]...)
		dst = le.AppendUint32(dst, c.Blob)
		dst = le.AppendUint32(dst, flags)
		dst = le.AppendUint32(dst, r.Length)
		dst = le.AppendUint32(dst, r.Size)
		dst = le.AppendUint64(dst, r.Offset)
		dst = le.AppendUint64(dst, r.Addr)
		dst = le.AppendUint64(dst, uint64(u.off))
		dst = le.AppendUint32(dst, r.Index)
		dst = le.AppendUint32(dst, r.In)
	}
	return dst
}
