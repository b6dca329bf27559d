package fill

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/stream"
	"github.com/shale-image/shale/link"
)

const (
	// wholePasses is how often a blob is read from its start, as long as that brings
	// something: its body may break off, and cannot be gone on with.
	wholePasses = 8
	// pieceSpans is how many spans are held at once, about.
	pieceSpans = 1024
)

// Whole brings all that is missing of the image by reading each of its blobs once, from
// the start: the way out where a registry does not serve parts of objects, and the image
// is one that only its index tells how to read. Who reads a chunk meanwhile gets it when
// it has come. progress, if not nil, is told of bytes of content as they arrive, from
// several goroutines. It returns the first error; what came is kept. What the pool has
// no room for is not.
func (im *Image) Whole(ctx context.Context, progress func(bytes int64)) error {
	blobs := map[int][]link.Chunk{}
	for i := range im.linked.Chunks() {
		c := im.linked.Chunk(i)
		if s, at := im.address(c); s != nil && !s.present(at, c) {
			blobs[c.Blob] = append(blobs[c.Blob], c)
		}
	}
	if progress == nil {
		progress = func(int64) {}
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(completeRequests)
	for n, chunks := range blobs {
		slices.SortFunc(chunks, func(a, b link.Chunk) int { return cmp.Compare(a.Offset, b.Offset) })
		g.Go(func() error { return im.wholeBlob(gctx, n, chunks, progress) })
	}
	return g.Wait()
}

// wholeBlob brings chunks of a blob, in the order of their offsets.
func (im *Image) wholeBlob(ctx context.Context, n int, chunks []link.Chunk, progress func(int64)) error {
	sources := []blob.Source{im.source}
	for passes := 1; ; passes++ {
		left, others, err := im.pass(ctx, sources[0], n, chunks, progress)
		if len(left) == 0 {
			return nil
		}
		if others != nil && passes == 1 { // the bytes of one are wrong
			sources = append(sources, others...)
		}
		if others != nil || len(left) == len(chunks) {
			sources = sources[1:]
		}
		if len(sources) == 0 || passes == wholePasses || ctx.Err() != nil {
			return fmt.Errorf("fill: blob %s, read from its start, %d chunks are missing: %w", im.linked.Blobs[n].Digest, len(left), err)
		}
		chunks = left
	}
}

// errOverlap is why some chunks take another pass.
var errOverlap = errors.New("chunks overlap")

// pass reads a blob once, up to the last of the chunks, and stores them. It returns
// those that are left, why the first is, and where else to ask if bytes are wrong.
func (im *Image) pass(ctx context.Context, source blob.Source, n int, chunks []link.Chunk, progress func(int64)) (left []link.Chunk, others []blob.Source, err error) {
	last := im.linked.Stored(chunks[len(chunks)-1])
	end := last.Offset + last.Length
	im.stats.request(end)
	body, err := source.Range(ctx, im.blob(n), 0, end)
	if err != nil {
		return chunks, nil, err
	}
	defer body.Close()
	at := int64(0) // of the next byte of body
	for len(chunks) > 0 {
		all, k := im.piece(chunks)
		if all.Offset < at {
			return append(left, chunks...), others, cmp.Or(err, errOverlap)
		}
		if _, e := io.CopyN(io.Discard, body, all.Offset-at); e != nil {
			return append(left, chunks...), others, cmp.Or(err, e)
		}
		in := &io.LimitedReader{R: body, N: all.Length}
		missed, e := im.storePiece(ctx, source, in, all, chunks[:k], progress)
		left, chunks = append(left, missed...), chunks[k:]
		if e != nil && errors.Is(e, chunk.ErrCorrupt) && others == nil {
			others = append([]blob.Source{}, blob.Reject(body)...)
		}
		err = cmp.Or(err, e)
		if _, e := io.CopyN(io.Discard, in, in.N); e != nil {
			return append(left, chunks...), others, cmp.Or(err, e)
		}
		at = all.Offset + all.Length
	}
	return left, others, err
}

// piece returns how many of the chunks are decoded in one go, and from what: as few as
// there may be, and so many that no stored byte is needed for those behind them.
func (im *Image) piece(chunks []link.Chunk) (all link.Stored, n int) {
	all = im.linked.Stored(chunks[0])
	for n = 1; n < len(chunks); n++ {
		if c := chunks[n]; !all.Has(c) {
			more := im.linked.Stored(c)
			if more.Last-all.First >= pieceSpans && more.Offset >= all.Offset+all.Length {
				break
			}
			if more.Last > all.Last {
				all.Extend(more)
			}
		}
	}
	return all, n
}

// storePiece decodes chunks from all their stored bytes, and returns those that are
// still missing.
func (im *Image) storePiece(ctx context.Context, source blob.Source, body io.Reader, all link.Stored, chunks []link.Chunk, progress func(int64)) (left []link.Chunk, err error) {
	spans := make([]index.Span, 0, all.Last-all.First+1)
	for i := all.First; i <= all.Last; i++ {
		s, _ := im.linked.Span(i)
		spans = append(spans, s)
	}
	memory := min(stream.Memory(spans), imageMemory)
	if err := im.memory.Acquire(ctx, memory); err != nil {
		return chunks, err
	}
	defer im.memory.Release(memory)
	beside := im.besides(ctx, source, &ends{spans: spans})
	defer beside.close()
	o := stream.Options{More: beside.window}
	in, err := o.NewReader(body, spans, chunks[0].Offset, spans[len(spans)-1].End(), nil)
	if err != nil {
		return chunks, err
	}
	defer in.Close()
	for i, c := range chunks {
		if c.Offset < in.Pos() {
			left, err = append(left, c), cmp.Or(err, errOverlap)
			continue
		}
		var data []byte
		e := in.Skip(c.Offset - in.Pos())
		if e == nil {
			data, e = in.Next(int(c.Size))
		}
		if e != nil && in.Pos() <= c.Offset {
			return append(left, chunks[i:]...), cmp.Or(err, e)
		}
		if e == nil {
			e = in.Verify(c.Digest, data)
		}
		if e != nil {
			left, err = append(left, c), cmp.Or(err, e)
			continue
		}
		s, to := im.address(c)
		if im.engine.store(s.pool, to.off, data) == nil { // or the pool is full, which it has told
			im.stats.filled(c)
		}
		progress(int64(c.Size))
	}
	return left, err
}
