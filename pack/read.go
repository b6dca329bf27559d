package pack

import (
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// Reader reads a pack as it arrives: first Metadata, then Table, then Next until
// io.EOF. What is wrong with the pack is an error that wraps index.ErrCorrupt,
// ErrLimit or ErrUnsupported and names it; errors of the source come back as they
// are. It is not safe for concurrent use.
type Reader struct {
	// Progress, if not nil, is called by Next for each few bytes of content that have
	// come, proved or not.
	Progress func(bytes int)

	name   string
	source *source
	header header
	table  *Table
	proofs []int
	wanted []bool // by chunk; nil: all
	until  int    // so many runs are read
	next   int    // run
	zstd   *zstd.Decoder
	sums   map[int][]chunk.BlockSum // by chunk, of which parts came
	buf    []byte
	err    error
}

// NewReader reads the header of a pack, which errors call name.
func NewReader(r io.Reader, name string) (*Reader, error) {
	pr := &Reader{name: name, source: &source{r: r}, sums: map[int][]chunk.BlockSum{}}
	var b [headerSize]byte
	if _, err := io.ReadFull(pr.source, b[:]); err != nil {
		return nil, pr.short(err)
	}
	var err error
	pr.header, err = decodeHeader(b[:], name)
	return pr, err
}

// source counts what was read, and keeps an error that is not io.EOF, to tell it
// from what a decoder makes of the bytes.
type source struct {
	r   io.Reader
	pos int64
	err error
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	s.pos += int64(n)
	if err != nil && err != io.EOF {
		s.err = err
	}
	return n, err
}

// short is what an error of reading means.
func (r *Reader) short(err error) error {
	switch {
	case r.source.err != nil:
		return r.source.err
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return r.corrupt("it ends here")
	}
	return r.corrupt("%v", err)
}

func (r *Reader) corrupt(format string, args ...any) error {
	return index.Errorf(index.ErrCorrupt, r.name, r.source.pos, format, args...)
}

// MetadataSize is the size of the metadata in bytes, 0 if there are none.
func (r *Reader) MetadataSize() int64 { return r.header.metadata }

// ContentSize is what the content decodes to, in bytes.
func (r *Reader) ContentSize() int64 { return r.header.content }

// Metadata copies the metadata to w. Call it once, or not at all.
func (r *Reader) Metadata(w io.Writer) error {
	n, err := io.Copy(w, io.LimitReader(r.source, r.header.metadata))
	switch {
	case r.source.err != nil:
		return r.source.err
	case err != nil:
		return err
	case n < r.header.metadata:
		return r.corrupt("the metadata end after %d bytes of %d", n, r.header.metadata)
	}
	return nil
}

// Table reads the table. Metadata that was not asked for is passed over.
func (r *Reader) Table() (*Table, error) {
	if r.table != nil || r.err != nil {
		return r.table, r.err
	}
	r.table, r.err = r.readTable()
	return r.table, r.err
}

func (r *Reader) readTable() (*Table, error) {
	if skip := headerSize + r.header.metadata - r.source.pos; skip > 0 {
		if _, err := io.CopyN(io.Discard, r.source, skip); err != nil {
			return nil, r.short(err)
		}
	}
	stored := make([]byte, r.header.tableStored)
	if _, err := io.ReadFull(r.source, stored); err != nil {
		return nil, r.short(err)
	}
	z, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxTable))
	if err != nil {
		return nil, err
	}
	defer z.Close()
	b, err := z.DecodeAll(stored, nil)
	if err != nil {
		return nil, r.corrupt("table: %v", err)
	}
	if int64(len(b)) != r.header.table {
		return nil, r.corrupt("a table of %d bytes, want %d", len(b), r.header.table)
	}
	t, err := decodeTable(b, r.name)
	if err != nil {
		return nil, err
	}
	if n := t.contentSize(); n != r.header.content {
		return nil, r.corrupt("%d bytes of content, the table makes %d", r.header.content, n)
	}
	r.proofs, r.until = t.proofs(), len(t.Runs)
	return t, nil
}

// Want has Next pass over the runs of chunks that are not wanted, whatever they are,
// and end behind the first so many runs of the table. Call it before Next, or not at
// all: then all are wanted.
func (r *Reader) Want(chunks []bool, runs int) { r.wanted, r.until = chunks, runs }

// Next returns the next run, its position in the table and its bytes, which have been
// compared with the digest of their chunk and are valid until the next call.
func (r *Reader) Next() (n int, p []byte, err error) {
	if _, err := r.Table(); err != nil {
		return 0, nil, err
	}
	for p == nil && err == nil {
		if n = r.next; n >= r.until {
			err = io.EOF // what follows is nobody's
			break
		}
		p, err = r.readRun(n)
		r.next++
	}
	r.err = err
	return n, p, err
}

// readRun reads run n, which is next; it is nil if nobody wants it.
func (r *Reader) readRun(n int) (p []byte, err error) {
	if r.zstd == nil {
		r.zstd, err = zstd.NewReader(r.source, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
			zstd.WithDecoderMaxWindow(Window), zstd.WithDecoderMaxMemory(MaxSize))
		if err != nil {
			return nil, r.short(err)
		}
	}
	run := r.table.Runs[n]
	c, size := r.table.Chunks[run.Chunk], r.table.Bytes(run)
	if r.wanted != nil && !r.wanted[run.Chunk] {
		size += int64(r.proofs[n]) * int64(len(chunk.BlockSum{}))
		var pass [chunk.Block]byte
		for ; size > 0 && err == nil; size -= int64(len(pass)) {
			err = r.content(pass[:min(size, int64(len(pass)))])
		}
		return nil, err
	}
	if n := r.proofs[n]; n > 0 {
		sums := make([]chunk.BlockSum, n)
		for i := range sums {
			if _, err := io.ReadFull(r.zstd, sums[i][:]); err != nil {
				return nil, r.short(err)
			}
		}
		if err := c.Digest.VerifySums(sums); err != nil {
			return nil, r.corrupt("chunk %s: %w", c.Digest, err)
		}
		r.sums[run.Chunk] = sums
	}
	if int64(cap(r.buf)) < size {
		r.buf = make([]byte, size)
	}
	p = r.buf[:size]
	if err := r.content(p); err != nil {
		return nil, err
	}
	if err := r.verify(run, c, p); err != nil {
		return nil, r.corrupt("%w", err)
	}
	return p, nil
}

// content reads what comes next of the content.
func (r *Reader) content(p []byte) error {
	for len(p) > 0 {
		n, err := io.ReadFull(r.zstd, p[:min(len(p), chunk.Block)])
		if err != nil {
			return r.short(err)
		}
		if p = p[n:]; r.Progress != nil {
			r.Progress(n)
		}
	}
	return nil
}

func (r *Reader) verify(run Run, c Chunk, p []byte) error {
	sums := r.sums[run.Chunk]
	if sums == nil { // all of the chunk
		return c.Digest.Verify(p)
	}
	for i := run.First; len(p) > 0; i++ {
		n := min(len(p), chunk.Block)
		if chunk.SumBlock(p[:n], i) != sums[i] {
			return fmt.Errorf("%w: block %d of chunk %s is another", chunk.ErrCorrupt, i, c.Digest)
		}
		p = p[n:]
	}
	return nil
}

// Close gives up the decoder. The source is the caller's.
func (r *Reader) Close() {
	if r.zstd != nil {
		r.zstd.Close()
	}
}
