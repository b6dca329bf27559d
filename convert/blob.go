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

// layerBlob is an object of the converted image. Its bytes are those of spans of
// spools and a tail, so that no chunk is written twice. It is safe for
// concurrent use.
type layerBlob struct {
	digest string
	size   int64
	spans  []span
	tail   []byte // what follows the last span
	dict   bool   // of the dictionary: it has no bytes here
}

// span is a piece of a spool at an offset of the blob.
type span struct {
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
	i, ok := slices.BinarySearchFunc(b.spans, off, func(s span, off int64) int { return cmp.Compare(s.at, off) })
	if !ok {
		i--
	}
	s := &b.spans[i]
	n, err := s.file.ReadAt(p[:min(int64(len(p)), s.at+s.size-off)], s.off+off-s.at)
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// add appends a piece of a file behind the last one.
func (b *layerBlob) add(file *os.File, off, size int64) {
	if n := len(b.spans); n > 0 {
		last := &b.spans[n-1]
		if last.file == file && last.off+last.size == off {
			last.size += size
			b.size += size
			return
		}
	}
	b.spans = append(b.spans, span{b.size, off, size, file})
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
	b := &layerBlob{}
	t := &tailWriter{}
	w := rafs.NewBlobWriter(t, c.blobOptions())
	var own []uint32 // chunks of the tree that lie in this blob
	add := func(ref rafs.ChunkRef, d chunk.Digest, codec chunk.Codec) {
		known[d] = uint32(len(c.tree.Chunks))
		own = append(own, known[d])
		c.tree.Chunks = append(c.tree.Chunks, index.Chunk{Digest: d, Size: ref.Size, Codec: codec, Length: ref.Length, Offset: ref.Offset})
	}
	holes := false
	for _, sp := range layers {
		holes = holes || sp.holes
		r := &spoolReader{file: sp.file}
		numbers := make([]uint32, len(sp.chunks))
		for i, s := range sp.chunks {
			if err := c.fromDict(s.digest, known); err != nil {
				return fmt.Errorf("%s: %w", sp.name, err)
			}
			if _, ok := known[s.digest]; !ok {
				stored, err := r.next(s.off, s.length)
				if err != nil {
					return err
				}
				ref, err := w.Add(s.size, s.digest, s.codec, stored)
				if err != nil {
					return fmt.Errorf("%s: %w", sp.name, err)
				}
				b.add(sp.file, s.off, int64(s.length))
				add(ref, s.digest, s.codec)
			}
			numbers[i] = known[s.digest]
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
		sp.chunks = nil
	}
	t.keep = true
	if holes {
		// RAFS has no holes: files refer to a chunk of zeros instead.
		z := chunk.Sum(chunk.BLAKE3, make([]byte, c.o.ChunkSize))
		if err := c.fromDict(z, known); err != nil {
			return err
		}
		if _, ok := known[z]; !ok {
			ref, d, codec, err := w.AddZeros()
			if err != nil {
				return err
			}
			add(ref, d, codec)
		}
	}
	info, err := w.Close()
	if errors.Is(err, rafs.ErrEmpty) {
		return nil
	}
	if err != nil {
		return err
	}
	b.digest, b.size, b.tail = info.Digest(), info.Size, t.kept
	for _, n := range own {
		c.tree.Chunks[n].Blob = uint32(len(c.blobs))
	}
	c.addBlob(b, info)
	return nil
}

func (c *converter) addBlob(b *layerBlob, info rafs.BlobInfo) {
	c.blobs = append(c.blobs, b)
	c.infos = append(c.infos, info)
	c.tree.Blobs = append(c.tree.Blobs, index.Blob{Digest: b.digest, Size: b.size})
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
func (r *spoolReader) next(off int64, n uint32) ([]byte, error) {
	if end := r.at + int64(len(r.buf)); off < r.at || off+int64(n) > end {
		if size := max(1<<20, int(n)); cap(r.buf) < size {
			r.buf = make([]byte, size)
		}
		r.buf, r.at = r.buf[:cap(r.buf)], off
		m, err := r.file.ReadAt(r.buf, off)
		if r.buf = r.buf[:m]; m < int(n) {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
	}
	return r.buf[off-r.at:][:n:n], nil
}
