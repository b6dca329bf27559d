package rafs

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"io"
	"slices"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// Needs tells which blobs of a bootstrap Open needs the chunk info of: as
// nydus-image has it, the chunk table does not tell where in the stream of a gzip
// layer a chunk lies, nor in which batch. Of the entries only ID, Size, Features
// and what tells where the chunk info is are of use; they are by position in the
// blob table. Errors are those of Open.
func Needs(r io.ReaderAt, size int64, name string) (map[int]BlobInfo, error) {
	im, err := openTables(r, size, name)
	if err != nil {
		return nil, err
	}
	needs := make([]bool, len(im.blobs))
	if slices.ContainsFunc(im.blobs, func(b BlobInfo) bool { return b.Features&(FeatureBatch|FeatureZran) != 0 }) {
		p := make([]byte, min(im.ext.chunkTabSize, 1024*chunkEntrySize))
		for off, end := im.ext.chunkOff, im.ext.chunkOff+im.ext.chunkTabSize; off < end; off += uint64(len(p)) {
			p = p[:min(uint64(len(p)), end-off)]
			if err := readAt(r, p, int64(off), name); err != nil {
				return nil, err
			}
			im.mark(needs, p)
		}
	}
	out := map[int]BlobInfo{}
	for i, ok := range needs {
		if ok {
			out[i] = im.blobs[i]
		}
	}
	return out, nil
}

// mark marks the blobs whose chunk info is needed for the chunks of a piece of
// the chunk table.
func (im *Image) mark(needs []bool, p []byte) {
	for ; len(p) > 0; p = p[chunkEntrySize:] {
		n := binary.LittleEndian.Uint32(p[32:])
		if n >= uint32(len(im.blobs)) {
			continue // decodeChunk refuses it
		}
		f, length := im.blobs[n].Features, binary.LittleEndian.Uint32(p[40:])
		needs[n] = needs[n] || f&FeatureZran != 0 || f&FeatureBatch != 0 && length == 0
	}
}

// readMetas reads the chunk info that is needed, and sets where in their streams
// the chunks lie.
func (im *Image) readMetas(p []byte, metas Metas) ([]*BlobInfo, error) {
	needs, out := make([]bool, len(im.blobs)), make([]*BlobInfo, len(im.blobs))
	im.mark(needs, p)
	for i, ok := range needs {
		if !ok {
			continue
		}
		b := &im.blobs[i]
		if metas == nil {
			return nil, index.Errorf(index.ErrUnsupported, im.name, int64(im.ext.blobOff)+int64(i)*blobEntrySize, "only blob %s itself tells where its chunks lie, and its chunk info is not at hand", b.ID)
		}
		r, size, name, err := metas(i, b)
		if err != nil {
			return nil, err
		}
		m, err := ReadBlobMeta(r, size, name, b)
		if err != nil {
			return nil, err
		}
		spans, offsets := m.Spans()
		for k := range m.Chunks {
			m.Chunks[k].Pos = offsets[k]
		}
		b.spans, b.windows, out[i] = spans, m.windows, m
	}
	return out, nil
}

func (im *Image) readChunks(r io.ReaderAt, metas Metas) error {
	base := int64(im.ext.chunkOff)
	p := make([]byte, im.ext.chunkTabSize)
	if len(p) > 0 {
		if err := readAt(r, p, base, im.name); err != nil {
			return err
		}
	}
	told, err := im.readMetas(p, metas)
	if err != nil {
		return err
	}
	n := len(p) / chunkEntrySize
	im.chunks = make([]index.Chunk, n)
	im.places = make([]place, n)
	counts := make([]int, len(im.blobs))
	refs := make([]ChunkRef, n)
	for i := range n {
		ref, err := im.decodeChunk(p[i*chunkEntrySize:], told, &im.chunks[i], base+int64(i)*chunkEntrySize)
		if err != nil {
			return err
		}
		refs[i] = ref
		counts[im.chunks[i].Blob]++
		im.places[i] = place{placeKey(im.chunks[i].Blob, uint32(ref.Addr/blockSize)), ref.Index, uint32(i)}
	}
	slices.SortFunc(im.places, func(a, b place) int { return cmp.Compare(a.key, b.key) })
	for i := range im.blobs {
		im.blobs[i].Chunks = make([]ChunkRef, 0, counts[i])
	}
	for i, at := range im.places {
		if i > 0 && at.key == im.places[i-1].key {
			return index.Errorf(index.ErrCorrupt, im.name, base+int64(at.chunk)*chunkEntrySize, "second chunk at block %d of blob %d", uint32(at.key), at.key>>32)
		}
	}
	order := make([]uint32, n) // chunks as their blobs have them
	for i := range order {
		order[i] = uint32(i)
	}
	slices.SortFunc(order, func(x, y uint32) int {
		return cmp.Or(cmp.Compare(im.chunks[x].Blob, im.chunks[y].Blob), refs[x].compare(&refs[y]))
	})
	for _, x := range order {
		b := &im.blobs[im.chunks[x].Blob]
		if k := len(b.Chunks); k > 0 && b.spans == nil {
			if err := b.Chunks[k-1].before(&refs[x]); err != nil {
				return index.Errorf(index.ErrCorrupt, im.name, base+int64(x)*chunkEntrySize, "%v", err)
			}
		}
		b.Chunks = append(b.Chunks, refs[x])
	}
	im.spans = make([][]index.Span, len(im.blobs))
	for i := range im.blobs {
		spans, offsets := im.blobs[i].Spans()
		for _, s := range spans { // a batch that is not compressed
			if s.Codec == chunk.None && s.Length != s.Size {
				return index.Errorf(index.ErrCorrupt, im.name, base, "batch of %d bytes, %d stored at %d of blob %d", s.Size, s.Length, s.Offset, i)
			}
		}
		im.spans[i] = spans
		for _, off := range offsets {
			im.chunks[order[0]].Offset = off
			order = order[1:]
		}
	}
	return nil
}

// before tells what is wrong with two chunks of a blob that follow each other.
func (c *ChunkRef) before(next *ChunkRef) error {
	switch {
	case next.follows(c):
		if next.Length != c.Length || next.Compressed != c.Compressed || next.In < c.In+c.Size {
			return fmt.Errorf("%d bytes at %d of a batch stored in %d, behind %d bytes at %d of one in %d", next.Size, next.In, next.Length, c.Size, c.In, c.Length)
		}
	case next.Offset < c.Offset+uint64(c.Length):
		return fmt.Errorf("stored bytes at %d, the chunk before has %d at %d", next.Offset, c.Length, c.Offset)
	}
	return nil
}

// decodeChunk reads an entry of the chunk table, at off, into c. told has what the
// blobs say themselves, where that is needed.
func (im *Image) decodeChunk(p []byte, told []*BlobInfo, c *index.Chunk, off int64) (ref ChunkRef, err error) {
	le := binary.LittleEndian
	n := le.Uint32(p[32:])
	if n >= uint32(len(im.blobs)) {
		return ref, index.Errorf(index.ErrCorrupt, im.name, off+32, "chunk in blob %d of %d", n, len(im.blobs))
	}
	b := &im.blobs[n]
	flags := le.Uint32(p[36:])
	if u := flags &^ (chunkFlagCompressed | chunkFlagBatch | chunkFlagCRC); u != 0 {
		return ref, index.Errorf(index.ErrUnsupported, im.name, off+36, "flags %#x of a chunk (hole or encryption)", u)
	}
	ref = ChunkRef{Length: le.Uint32(p[40:]), Size: le.Uint32(p[44:]), Offset: le.Uint64(p[48:]), Addr: le.Uint64(p[56:]), Index: le.Uint32(p[72:])}
	*c = index.Chunk{Digest: chunk.Digest{Algorithm: b.Digester, Sum: [32]byte(p)}, Size: ref.Size, Blob: n}
	ref.Compressed = flags&chunkFlagCompressed != 0 && b.Compressor != chunk.None
	if ref.Index >= b.ChunkCount {
		return ref, index.Errorf(index.ErrCorrupt, im.name, off+72, "chunk %d of %d in blob %d", ref.Index, b.ChunkCount, n)
	}
	if ref.Size == 0 || ref.Size > im.ext.chunkSize {
		return ref, index.Errorf(index.ErrCorrupt, im.name, off+44, "chunk of %d bytes; chunk size %d", ref.Size, im.ext.chunkSize)
	}
	if m := told[n]; m != nil {
		own := &m.Chunks[ref.Index]
		if own.Size != ref.Size || own.Addr != ref.Addr || ref.Length != 0 && (own.Length != ref.Length || own.Offset != ref.Offset) {
			return ref, index.Errorf(index.ErrCorrupt, im.name, off+40, "chunk %d of blob %d: %d bytes at address %d, %d stored at %d; the blob says %d bytes at %d, %d at %d",
				ref.Index, n, ref.Size, ref.Addr, ref.Length, ref.Offset, own.Size, own.Addr, own.Length, own.Offset)
		}
		return *own, nil
	}
	if ref.Compressed && b.Compressor == chunk.Gzip {
		return ref, index.Errorf(index.ErrUnsupported, im.name, off+36, "chunk that is gzip of its own")
	}
	most := ref.Size // stored bytes
	if flags&chunkFlagBatch != 0 {
		ref.Batch, ref.In, most = true, le.Uint32(p[76:]), MaxChunkSize
		if b.Features&FeatureBatch == 0 || ref.In > MaxChunkSize-ref.Size {
			return ref, index.Errorf(index.ErrCorrupt, im.name, off+36, "chunk of %d bytes at %d of a batch, in blob %d with features %#x", ref.Size, ref.In, n, b.Features)
		}
	}
	switch {
	case ref.Length == 0 || ref.Length > most || !ref.Compressed && !ref.Batch && ref.Length != ref.Size:
		return ref, index.Errorf(index.ErrCorrupt, im.name, off+40, "chunk of %d bytes, %d stored, compressed %v; chunk size %d", ref.Size, ref.Length, ref.Compressed, im.ext.chunkSize)
	case ref.Offset > uint64(b.Size) || uint64(ref.Length) > uint64(b.Size)-ref.Offset:
		return ref, index.Errorf(index.ErrCorrupt, im.name, off+48, "chunk of %d stored bytes at %d in blob %d of %d", ref.Length, ref.Offset, n, b.Size)
	case ref.Addr%blockSize != 0 || ref.Addr > b.Span || uint64(ref.Size) > b.Span-ref.Addr:
		return ref, index.Errorf(index.ErrCorrupt, im.name, off+56, "chunk of %d bytes at address %d in blob %d of %d", ref.Size, ref.Addr, n, b.Span)
	}
	return ref, nil
}
