package inspect

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/rafs"
)

// structure compares what the bootstrap says of each blob with what the blob
// says of itself: table of contents, chunk info, digests.
func (c *checker) structure(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	for _, o := range c.objects {
		if o.blob < 0 || !o.whole || !o.meta.whole {
			continue
		}
		g.Go(func() error {
			r := &readerAt{ctx: ctx, src: c.im.Source, digest: o.meta.ref.Digest, size: o.meta.size}
			s := &blobCheck{c: c, data: o, o: o.meta, b: &c.im.RAFS.Blobs()[o.blob], r: r}
			s.table()
			s.meta()
			s.parts()
			return r.err
		})
	}
	return g.Wait()
}

// blobCheck checks one blob.
type blobCheck struct {
	c    *checker
	data *object
	o    *object // that tells of it
	b    *rafs.BlobInfo
	r    *readerAt // of o
}

func (s *blobCheck) defect(off int64, format string, args ...any) {
	if s.r.err == nil { // else what is found follows from that
		s.c.add(s.o.defect(off, fmt.Sprintf(format, args...)))
	}
}

// fault reports what a reader of the blob's parts says.
func (s *blobCheck) fault(err error) {
	var at *index.Error
	if errors.As(err, &at) {
		s.defect(at.Offset, "%v", at.Err)
	} else {
		s.defect(-1, "%v", err)
	}
}

// table checks the bootstrap's tables alone, where package rafs does not.
func (s *blobCheck) table() {
	// A bootstrap that lies in the blob itself was written before the rest.
	if s.b.Digest() != "" && s.b.Size != s.data.size {
		s.c.add(s.data.defect(-1, fmt.Sprintf("it has %d bytes, the bootstrap says %d", s.data.size, s.b.Size)))
	}
	byAddr := slices.Clone(s.b.Chunks)
	slices.SortFunc(byAddr, func(x, y rafs.ChunkRef) int {
		switch {
		case x.Addr < y.Addr:
			return -1
		case x.Addr > y.Addr:
			return 1
		}
		return 0
	})
	for i := 1; i < len(byAddr); i++ {
		if p, q := &byAddr[i-1], &byAddr[i]; p.Addr+uint64(p.Size) > q.Addr {
			s.defect(int64(q.Offset), "the bootstrap has chunks %d and %d at overlapping addresses %d and %d", p.Index, q.Index, p.Addr, q.Addr)
		}
	}
}

// meta compares the chunk info in the blob with the bootstrap's chunk table.
func (s *blobCheck) meta() {
	m, err := rafs.ReadBlobMeta(s.r, s.o.size, s.o.name, s.b)
	if err != nil {
		s.fault(err)
		return
	}
	for _, r := range s.b.Chunks {
		if int(r.Index) >= len(m.Chunks) {
			s.defect(int64(r.Offset), "chunk %d of the bootstrap is not among the blob's %d", r.Index, len(m.Chunks))
		} else if own := m.Chunks[r.Index]; !own.Same(&r) {
			s.defect(int64(r.Offset), "chunk %d: the blob says %s, the bootstrap %s", r.Index, describe(own), describe(r))
		}
	}
}

func describe(r rafs.ChunkRef) string {
	how := "plain"
	if r.Compressed {
		how = "compressed"
	}
	if r.Batch {
		how += fmt.Sprintf(" batch, %d in it", r.In)
	}
	return fmt.Sprintf("%d bytes, %d stored at %d, %s, address %d", r.Size, r.Length, r.Offset, how, r.Addr)
}

// parts verifies the parts that the table of contents lists, and compares the
// digests among them with those of the bootstrap.
func (s *blobCheck) parts() {
	if s.b.Features&rafs.FeatureTOC == 0 {
		return
	}
	toc, err := rafs.ReadTOC(s.r, s.o.size, s.o.name)
	if err != nil {
		return // meta has told
	}
	for _, e := range toc.Entries {
		if e.Name == "image.blob" || e.Name == "blob.meta" { // chunks are verified one by one; meta has seen the other
			continue
		}
		p, err := toc.Extract(e.Name)
		if err != nil {
			s.fault(err)
		} else if e.Name == "blob.digest" {
			s.digests(p, int64(e.Offset))
		}
	}
}

func (s *blobCheck) digests(p []byte, off int64) {
	if len(p) != 32*int(s.b.ChunkCount) {
		s.defect(off, "digests of %d bytes for %d chunks", len(p), s.b.ChunkCount)
		return
	}
	refs := s.b.Chunks // by offset, as data.chunks
	for i, n := range s.data.chunks {
		ch := &s.c.im.Tree.Chunks[n]
		if at := 32 * int(refs[i].Index); !bytes.Equal(p[at:at+32], ch.Digest.Sum[:]) {
			d := s.o.defect(off+int64(at), fmt.Sprintf("chunk %d: the blob says its digest is %x", refs[i].Index, p[at:at+32]))
			d.Chunk = ch.Digest.String()
			s.c.add(d)
		}
	}
}

// readerAt reads a blob with one request a call. It keeps the first error that
// is no fault of the blob; after that the reader of its parts only stumbles.
type readerAt struct {
	ctx    context.Context
	src    blob.Source
	digest string
	size   int64
	err    error
}

func (r *readerAt) ReadAt(p []byte, off int64) (int, error) {
	n := min(int64(len(p)), max(0, r.size-off))
	if n == 0 {
		return 0, io.EOF
	}
	q, err := blob.ReadAll(r.ctx, r.src, blob.Ref{Digest: r.digest}, off, n)
	if err != nil {
		if !isDefect(err) && r.err == nil {
			r.err = err
		}
		return 0, err
	}
	if copy(p, q) < len(p) {
		return int(n), io.EOF
	}
	return int(n), nil
}
