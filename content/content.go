// Package content reads the files of an index straight from their source,
// every chunk verified, without a pool: for tools that look into an image or
// take it out.
package content

import (
	"context"
	"fmt"
	"io"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// window is how many stored bytes one request brings at most.
const window = 4 << 20

// Piece is a run of a file's bytes at an offset; what no piece covers reads as
// zeros. Data is valid until the next call.
type Piece struct {
	Off  int64
	Data []byte
}

// Pieces calls fn with the data of a regular file in order of offset, each
// chunk verified against its digest. An error names the blob and the offset in
// it.
func Pieces(ctx context.Context, t *index.Tree, src blob.Source, ino *index.Inode, fn func(Piece) error) error {
	var r io.ReadCloser
	var pos, end int64 // of r, in blob number at
	var at uint32
	defer func() {
		if r != nil {
			r.Close()
		}
	}()
	var stored, data []byte
	for i, e := range ino.Extents {
		c := &t.Chunks[e.Chunk]
		b := t.Blobs[c.Blob]
		bad := func(err error) error {
			return fmt.Errorf("blob %s: chunk of %d bytes at offset %d: %w", b.Digest, c.Length, c.Offset, err)
		}
		if c.Size > chunk.MaxSize || c.Length > 2*chunk.MaxSize {
			return bad(fmt.Errorf("%w: sizes %d and %d, want at most %d", chunk.ErrCorrupt, c.Size, c.Length, chunk.MaxSize))
		}
		if r == nil || at != c.Blob || pos != int64(c.Offset) || pos >= end {
			if r != nil {
				r.Close()
			}
			pos, at, end = int64(c.Offset), c.Blob, run(t, ino.Extents[i:])
			var err error
			if r, err = src.Range(ctx, blob.Ref(b), pos, end-pos); err != nil {
				r = nil
				return bad(err)
			}
		}
		stored = grow(stored, int(c.Length))
		if _, err := io.ReadFull(r, stored); err != nil {
			return bad(err)
		}
		pos += int64(c.Length)
		data = grow(data, int(c.Size))
		if err := c.Codec.Decode(data, stored); err != nil {
			return bad(err)
		}
		if err := c.Digest.Verify(data); err != nil {
			return bad(err)
		}
		if err := fn(Piece{e.Off, data}); err != nil {
			return err
		}
	}
	return nil
}

// run returns where in its blob the run of extents that lie one behind the
// other, starting with the first, ends; at most window bytes of it.
func run(t *index.Tree, extents []index.Extent) int64 {
	first := &t.Chunks[extents[0].Chunk]
	end := int64(first.Offset) + int64(first.Length)
	for _, e := range extents[1:] {
		c := &t.Chunks[e.Chunk]
		if c.Blob != first.Blob || int64(c.Offset) != end || end+int64(c.Length)-int64(first.Offset) > window {
			break
		}
		end += int64(c.Length)
	}
	return end
}

func grow(b []byte, n int) []byte {
	if cap(b) < n {
		return make([]byte, n)
	}
	return b[:n]
}

// Copy writes a regular file's whole content, holes as zeros, to w.
func Copy(ctx context.Context, w io.Writer, t *index.Tree, src blob.Source, ino *index.Inode) error {
	var pos int64
	err := Pieces(ctx, t, src, ino, func(p Piece) error {
		if err := zeros(w, p.Off-pos); err != nil {
			return err
		}
		data := p.Data[:min(int64(len(p.Data)), ino.Size-p.Off)]
		pos = p.Off + int64(len(data))
		_, err := w.Write(data)
		return err
	})
	if err != nil {
		return err
	}
	return zeros(w, ino.Size-pos)
}

var zeroes [64 << 10]byte

func zeros(w io.Writer, n int64) error {
	for n > 0 {
		m, err := w.Write(zeroes[:min(n, int64(len(zeroes)))])
		if err != nil {
			return err
		}
		n -= int64(m)
	}
	return nil
}
