package convert

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/rafs"
)

// blobFile is a finished blob, to be pushed.
type blobFile struct {
	digest string
	size   int64
	file   *os.File
}

// assemble applies the layers to one tree and writes their blobs, lowest layer
// first: a chunk that a lower layer has is referenced there and not stored
// again.
func (c *converter) assemble(layers []*layerSpool) error {
	c.tree = index.NewTree()
	known := map[chunk.Digest]uint32{}
	for i, sp := range layers {
		numbers, err := c.writeBlob(sp, known)
		sp.file.Close()
		if err != nil {
			return fmt.Errorf("layer %d: %w", i+1, err)
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
		if err := c.tree.Apply(sp.changes); err != nil {
			return fmt.Errorf("layer %d (%s): %w", i+1, c.img.Layers[i].Digest, err)
		}
		layers[i] = nil
	}
	if !rafs.NeedsZeros(c.tree) {
		return nil
	}
	return c.addZeros(known)
}

func (c *converter) blobOptions() rafs.BlobOptions {
	return rafs.BlobOptions{ChunkSize: c.o.ChunkSize, Compressor: c.o.Compressor, Digester: chunk.BLAKE3}
}

// writeBlob writes those chunks of a spool that are not known yet to a new
// blob, and returns the number in the tree of each chunk of the spool.
func (c *converter) writeBlob(sp *layerSpool, known map[chunk.Digest]uint32) ([]uint32, error) {
	numbers := make([]uint32, len(sp.chunks))
	in := bufio.NewReaderSize(io.NewSectionReader(sp.file, 0, 1<<62), 1<<20)
	err := c.newBlob(func(w *rafs.BlobWriter, number uint32) error {
		var stored []byte
		for i, s := range sp.chunks {
			n, ok := known[s.digest]
			if ok {
				if _, err := in.Discard(int(s.length)); err != nil {
					return err
				}
				numbers[i] = n
				continue
			}
			stored = append(stored[:0], make([]byte, s.length)...)
			if _, err := io.ReadFull(in, stored); err != nil {
				return err
			}
			ref, err := w.Add(s.size, s.digest, s.codec, stored)
			if err != nil {
				return err
			}
			numbers[i] = c.addChunk(ref, s.digest, s.codec, number)
			known[s.digest] = numbers[i]
		}
		return nil
	})
	return numbers, err
}

// addZeros puts a chunk of zeros, for holes to point at, into a blob of its
// own if no layer has one.
func (c *converter) addZeros(known map[chunk.Digest]uint32) error {
	if _, ok := known[chunk.Sum(chunk.BLAKE3, make([]byte, c.o.ChunkSize))]; ok {
		return nil
	}
	return c.newBlob(func(w *rafs.BlobWriter, number uint32) error {
		ref, digest, codec, err := w.AddZeros()
		if err == nil {
			c.addChunk(ref, digest, codec, number)
		}
		return err
	})
}

func (c *converter) addChunk(ref rafs.ChunkRef, d chunk.Digest, codec chunk.Codec, blob uint32) uint32 {
	c.tree.Chunks = append(c.tree.Chunks, index.Chunk{
		Digest: d, Size: ref.Size, Codec: codec, Blob: blob, Length: ref.Length, Offset: ref.Offset,
	})
	return uint32(len(c.tree.Chunks) - 1)
}

// newBlob makes a blob of what write adds, if it adds anything.
func (c *converter) newBlob(write func(w *rafs.BlobWriter, number uint32) error) error {
	f, err := os.CreateTemp(c.tmp, "blob-")
	if err != nil {
		return err
	}
	os.Remove(f.Name())
	bw := bufio.NewWriterSize(f, 1<<20)
	w := rafs.NewBlobWriter(bw, c.blobOptions())
	err = write(w, uint32(len(c.blobs)))
	var info rafs.BlobInfo
	if err == nil {
		info, err = w.Close()
	}
	if errors.Is(err, rafs.ErrEmpty) {
		return f.Close()
	}
	if err == nil {
		err = bw.Flush()
	}
	if err != nil {
		f.Close()
		return err
	}
	c.blobs = append(c.blobs, &blobFile{info.Digest(), info.Size, f})
	c.infos = append(c.infos, info)
	c.tree.Blobs = append(c.tree.Blobs, index.Blob{Digest: info.Digest(), Size: info.Size})
	return nil
}

// bootstrap writes the metadata to a file.
func (c *converter) bootstrap() (*os.File, error) {
	f, err := os.CreateTemp(c.tmp, "bootstrap-")
	if err != nil {
		return nil, err
	}
	os.Remove(f.Name())
	bw := bufio.NewWriterSize(f, 1<<20)
	err = rafs.WriteBootstrap(bw, c.tree, c.infos, c.blobOptions())
	if err == nil {
		err = bw.Flush()
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}
