// Package content reads the files of an index straight from their source,
// every chunk verified, without a pool: for tools that look into an image or
// take it out. A source may have content of chunks at hand (AtHand).
package content

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/stream"
)

// window is how many stored bytes one request brings at most.
const window = 4 << 20

// Piece is a run of a file's bytes at an offset; what no piece covers reads as
// zeros. Data is valid until the next call.
type Piece struct {
	Off  int64
	Data []byte
}

// AtHand is a source that may have the content of chunks in another way than by the range
// of a blob that it is in.
type AtHand interface {
	blob.Source
	// Chunk fills p, which is as long as a chunk, with what is thought to be its content,
	// or returns false. Its caller verifies it.
	Chunk(ctx context.Context, t *index.Tree, chunk uint32, p []byte) bool
}

// Pieces calls fn with the data of a regular file in order of offset, each
// chunk verified against its digest. An error names the blob and the offset in
// it.
func Pieces(ctx context.Context, t *index.Tree, src blob.Source, ino *index.Inode, fn func(Piece) error) error {
	hand, _ := src.(AtHand)
	var buf []byte
	for extents := ino.Extents; len(extents) > 0; {
		if c := &t.Chunks[extents[0].Chunk]; hand != nil && t.CheckChunk(c) == nil {
			buf = slices.Grow(buf[:0], int(c.Size))[:c.Size]
			if hand.Chunk(ctx, t, extents[0].Chunk, buf) && c.Digest.Algorithm != chunk.Origin && c.Digest.Verify(buf) == nil {
				if err := fn(Piece{extents[0].Off, buf}); err != nil {
					return err
				}
				extents = extents[1:]
				continue
			}
		}
		n, err := run(ctx, t, src, extents, fn)
		if err != nil {
			return err
		}
		extents = extents[n:]
	}
	return nil
}

// run reads extents whose chunks lie one behind the other in a stream, from the
// first on, by one request: without gaps, but for those that come anyway. It returns how
// many.
func run(ctx context.Context, t *index.Tree, src blob.Source, extents []index.Extent, fn func(Piece) error) (n int, err error) {
	first := &t.Chunks[extents[0].Chunk]
	if err := t.CheckChunk(first); err != nil {
		return 0, err
	}
	b := &t.Blobs[first.Blob]
	end := first.Offset
	var spans []index.Span
	var off, length int64
	for n < len(extents) {
		c := &t.Chunks[extents[n].Chunk]
		if c.Blob != first.Blob || c.Offset < end || t.CheckChunk(c) != nil {
			break
		}
		to := c.Offset + int64(c.Size)
		more := b.Cover(first.Offset, to)
		o, l := index.Stored(more, first.Offset, to)
		_, _, beside := index.Beside(more)
		if n > 0 && l > length && (l+beside > window || c.Offset > end) {
			break // else all of it comes anyway, as of a frame that is decoded from its start
		}
		spans, off, length, end = more, o, l, to
		n++
	}
	bad := func(err error) (int, error) {
		return 0, fmt.Errorf("blob %s: %d stored bytes at offset %d: %w", b.Digest, length, off, err)
	}
	w, err := stream.Beside(ctx, src, t, spans)
	if err != nil {
		return bad(err)
	}
	body, err := src.Range(ctx, blob.Ref{Digest: b.Digest, Size: b.Size}, off, length)
	if err != nil {
		return bad(err)
	}
	defer body.Close()
	r, err := stream.NewReader(body, spans, first.Offset, end, w)
	if err != nil {
		return bad(err)
	}
	defer r.Close()
	for _, e := range extents[:n] {
		c := &t.Chunks[e.Chunk]
		var data []byte
		err := r.Skip(c.Offset - r.Pos())
		if err == nil {
			data, err = r.Next(int(c.Size))
		}
		if err == nil {
			err = r.Verify(c.Digest, data)
		}
		if err != nil {
			return bad(err)
		}
		if err := fn(Piece{e.Off, data}); err != nil {
			return 0, err
		}
	}
	return n, nil
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

// Chunks calls fn with the content of chunks of a tree, by their positions in
// Tree.Chunks, each verified. Those that lie one behind the other in a blob come
// by one request, so fn is called in the order of blobs and offsets. data is valid
// until it returns.
func Chunks(ctx context.Context, t *index.Tree, src blob.Source, chunks []uint32, fn func(chunk uint32, data []byte) error) error {
	order := slices.Clone(chunks)
	slices.SortFunc(order, func(a, b uint32) int {
		x, y := &t.Chunks[a], &t.Chunks[b]
		return cmp.Or(cmp.Compare(x.Blob, y.Blob), cmp.Compare(x.Offset, y.Offset))
	})
	all := &index.Inode{}
	for i, c := range order {
		all.Extents = append(all.Extents, index.Extent{Off: int64(i), Chunk: c})
	}
	return Pieces(ctx, t, src, all, func(p Piece) error { return fn(order[p.Off], p.Data) })
}
