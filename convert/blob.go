package convert

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/rafs"
)

// layerBlob is an object of the converted image. Its bytes are those of sections
// of spools and a tail, so that no chunk is written twice. It is safe for
// concurrent use.
type layerBlob struct {
	digest   string
	size     int64
	sections []section
	tail     []byte // what follows the last section
	dict     bool   // of the dictionary: it has no bytes here
}

// section is a piece of a spool at an offset of the blob.
type section struct {
	at, off, size int64
	file          *os.File
}

// ReadAt implements io.ReaderAt.
func (b *layerBlob) ReadAt(p []byte, off int64) (n int, err error) {
	for n < len(p) && err == nil {
		var m int
		m, err = b.readAt(p[n:], off+int64(n))
		n += m
	}
	return n, err
}

func (b *layerBlob) readAt(p []byte, off int64) (int, error) {
	data := b.size - int64(len(b.tail))
	switch {
	case off >= b.size || off < 0:
		return 0, io.EOF
	case off >= data:
		return copy(p, b.tail[off-data:]), nil
	}
	i, ok := slices.BinarySearchFunc(b.sections, off, func(s section, off int64) int { return cmp.Compare(s.at, off) })
	if !ok {
		i--
	}
	s := &b.sections[i]
	n, err := s.file.ReadAt(p[:min(int64(len(p)), s.at+s.size-off)], s.off+off-s.at)
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// add appends a piece of a file behind the last one.
func (b *layerBlob) add(file *os.File, off, size int64) {
	if n := len(b.sections); n > 0 {
		last := &b.sections[n-1]
		if last.file == file && last.off+last.size == off {
			last.size += size
			b.size += size
			return
		}
	}
	b.sections = append(b.sections, section{b.size, off, size, file})
	b.size += size
}

// assemble applies the layers to one tree and makes their blobs, lowest layer
// first: a chunk that the dictionary or a lower layer has is referred to and not
// stored again. Where there are more layers than an image can have blobs,
// neighbours share one.
func (c *converter) assemble(layers []*spool) error {
	c.tree = index.NewTree()
	known := map[chunk.Digest]uint32{}
	most := max(1, rafs.MaxBlobs-c.o.Dict.blobs())
	for lo := range max(1, min(len(layers), most)) {
		n := max(1, min(len(layers), most))
		group := layers[lo*len(layers)/n : (lo+1)*len(layers)/n]
		if err := c.makeBlob(group, known); err != nil {
			return err
		}
		for _, sp := range group {
			if err := c.tree.Apply(sp.changes); err != nil {
				return fmt.Errorf("%s: %w", sp.name, err)
			}
			sp.changes = nil
		}
	}
	return nil
}

func (c *converter) blobOptions() rafs.BlobOptions {
	return rafs.BlobOptions{ChunkSize: c.o.ChunkSize, Compressor: c.o.Compressor, Digester: chunk.BLAKE3}
}

// makeBlob makes the blob of those chunks of some layers that are not known
// yet, if there are any, and numbers the chunks of the layers' files as the tree
// does.
func (c *converter) makeBlob(layers []*spool, known map[chunk.Digest]uint32) error {
	m := &blobMaker{c: c, known: known, blob: &layerBlob{}}
	t := &tailWriter{}
	m.w = rafs.NewBlobWriter(t, c.blobOptions())
	holes := false
	for _, sp := range layers {
		holes = holes || sp.holes
		if err := m.layer(sp); err != nil {
			return fmt.Errorf("%s: %w", sp.name, err)
		}
	}
	t.keep = true
	if holes {
		// RAFS has no holes: files refer to a chunk of zeros instead.
		z := rafs.Piece{Size: c.o.ChunkSize, Digest: chunk.Sum(chunk.BLAKE3, make([]byte, c.o.ChunkSize))}
		if err := c.fromDict(z.Digest, known); err != nil {
			return err
		}
		if _, ok := known[z.Digest]; !ok {
			if _, _, _, err := m.w.AddZeros(); err != nil {
				return err
			}
			m.list(z)
		}
	}
	info, err := m.w.Close()
	if errors.Is(err, rafs.ErrEmpty) {
		return nil
	}
	if err != nil {
		return err
	}
	m.blob.digest, m.blob.size, m.blob.tail = info.Digest(), info.Size, t.kept
	_, offsets := info.Spans()
	for i, n := range m.own {
		c.tree.Chunks[n].Blob, c.tree.Chunks[n].Offset = uint32(len(c.blobs)), offsets[i]
	}
	c.addBlob(m.blob, info)
	return nil
}

// blobMaker makes one blob.
type blobMaker struct {
	c     *converter
	w     *rafs.BlobWriter
	blob  *layerBlob
	known map[chunk.Digest]uint32
	own   []uint32 // the blob's chunks, as the tree numbers them
}

// list enters a chunk that was added to the blob.
func (m *blobMaker) list(p rafs.Piece) {
	n := uint32(len(m.c.tree.Chunks))
	m.known[p.Digest] = n
	m.own = append(m.own, n)
	m.c.tree.Chunks = append(m.c.tree.Chunks, index.Chunk{Digest: p.Digest, Size: p.Size})
}

// layer adds what of a layer is not known.
func (m *blobMaker) layer(sp *spool) error {
	r := &spoolReader{file: sp.file}
	for i := range sp.batches {
		b := &sp.batches[i]
		stored, err := r.next(b.off, b.length)
		if err != nil {
			return err
		}
		if stored, err = m.strip(sp, b, stored); err != nil || len(b.chunks) == 0 {
			if err != nil {
				return err
			}
			continue
		}
		if err := m.add(sp, b, stored); err != nil {
			return err
		}
		m.blob.add(sp.file, b.off, int64(b.length))
	}
	numbers := make([]uint32, len(sp.chunks))
	for i, p := range sp.chunks {
		if err := m.c.fromDict(p.Digest, m.known); err != nil {
			return err
		}
		numbers[i] = m.known[p.Digest]
	}
	for _, ch := range sp.changes {
		if ch.Inode == nil {
			continue
		}
		for k := range ch.Inode.Extents {
			e := &ch.Inode.Extents[k]
			e.Chunk = numbers[e.Chunk]
		}
	}
	sp.chunks, sp.batches = nil, nil
	return nil
}

// add adds a batch to the blob.
func (m *blobMaker) add(sp *spool, b *batch, stored []byte) error {
	pieces := make([]rafs.Piece, len(b.chunks))
	for i, n := range b.chunks {
		pieces[i] = sp.chunks[n]
	}
	if b.codec != chunk.None && len(pieces) > 1 {
		if _, err := m.w.AddBatch(pieces, stored); err != nil {
			return err
		}
	} else {
		for _, p := range pieces {
			n := len(stored)
			if b.codec == chunk.None {
				n = int(p.Size)
			}
			if _, err := m.w.Add(p.Size, p.Digest, b.codec, stored[:n]); err != nil {
				return err
			}
			stored = stored[n:]
		}
	}
	for _, p := range pieces {
		m.list(p)
	}
	return nil
}

// strip takes chunks out of a batch that turned out to be known, which are few:
// layers that are read at the same time do not always know of each other. It
// returns the batch's stored bytes, which lie at another place then.
func (m *blobMaker) strip(sp *spool, b *batch, stored []byte) ([]byte, error) {
	isKnown := func(n uint32) bool {
		_, ok := m.known[sp.chunks[n].Digest]
		return ok
	}
	if !slices.ContainsFunc(b.chunks, isKnown) {
		return stored, nil
	}
	raw := make([]byte, b.size)
	if err := b.codec.Decode(raw, stored); err != nil {
		return nil, err
	}
	kept := raw[:0]
	for _, n := range b.chunks {
		size := int(sp.chunks[n].Size)
		if !isKnown(n) {
			kept = append(kept, raw[:size]...)
		}
		raw = raw[size:]
	}
	b.chunks = slices.DeleteFunc(b.chunks, isKnown)
	if len(kept) == 0 {
		return nil, nil
	}
	b.codec, stored, _ = m.c.encode(nil, kept)
	b.off, b.size, b.length = sp.size, len(kept), len(stored)
	if _, err := sp.file.WriteAt(stored, sp.size); err != nil {
		return nil, err
	}
	sp.size += int64(len(stored))
	return stored, nil
}

func (c *converter) addBlob(b *layerBlob, info rafs.BlobInfo) {
	c.blobs = append(c.blobs, b)
	c.infos = append(c.infos, info)
	spans, _ := info.Spans()
	c.tree.Blobs = append(c.tree.Blobs, index.Blob{Digest: b.digest, Size: b.size, Spans: spans})
}

// tailWriter keeps what a BlobWriter writes once the chunks of the spools are
// through: those are in the spools.
type tailWriter struct {
	keep bool
	kept []byte
}

func (t *tailWriter) Write(p []byte) (int, error) {
	if t.keep {
		t.kept = append(t.kept, p...)
	}
	return len(p), nil
}

// spoolReader reads pieces of a file in order of their offsets.
type spoolReader struct {
	file *os.File
	buf  []byte
	at   int64 // of buf in the file
}

// next returns n bytes at off, valid until the next call.
func (r *spoolReader) next(off int64, n int) ([]byte, error) {
	if end := r.at + int64(len(r.buf)); off < r.at || off+int64(n) > end {
		if size := max(1<<20, n); cap(r.buf) < size {
			r.buf = make([]byte, size)
		}
		r.buf, r.at = r.buf[:cap(r.buf)], off
		m, err := r.file.ReadAt(r.buf, off)
		if r.buf = r.buf[:m]; m < n {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
	}
	return r.buf[off-r.at:][:n:n], nil
}
