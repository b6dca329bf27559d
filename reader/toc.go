package reader

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/retry"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/estargz"
	"github.com/shale-image/shale/index/scan"
	"github.com/shale-image/shale/index/zstdchunked"
)

// Tables of contents: an eStargz layer has one before its end, and the digest of
// it in an annotation; a zstd:chunked layer says in its annotations where it is
// too. As they are in the image's manifest, the tables are Bound.

const (
	// tail is how much of the end of an eStargz layer is fetched at first. It has
	// the footer and, of some 4,000 files or less, all of the table.
	tail = 256 << 10

	tablesAtOnce = 8 // are fetched
)

// Table is where the table of contents of a layer is. What format it has, and its
// digest, the layer's annotations tell.
type Table struct {
	estargz.Section       // of the layer
	At              int64 // in Raw.File
}

// tableOf tells by the annotations of a layer whether it has a table of contents.
// zstd is where, or nil if only the layer's end tells. Layers that the stargz
// snapshotter has compressed with zstd have the annotations of both formats.
func tableOf(l image.Descriptor) (zstd *zstdchunked.Table, err error) {
	t, err := zstdchunked.Locate(l.Annotations, l.Size, "layer "+l.Digest)
	switch {
	case err == nil:
		return &t, nil
	case errors.Is(err, index.ErrUnsupported) && l.Annotations[estargz.DigestAnnotation] != "":
		return nil, nil
	}
	return nil, err
}

// noTables says that tables of contents are of no use for a reason, unless the
// reason may pass.
func noTables(manifest string, err error) error {
	for _, kind := range []error{index.ErrCorrupt, index.ErrUnsupported, index.ErrLimit, blob.ErrRange} {
		if errors.Is(err, kind) {
			return fmt.Errorf("%s: %w: %w", manifest, ErrNoIndex, err)
		}
	}
	return err
}

// fetchTables fetches the tables of contents of all layers. Their digests are
// verified by who reads them: those of eStargz are of what is compressed.
func (r *Raw) fetchTables(ctx context.Context, repo *image.Repository, img *image.Image, o Options) (err error) {
	have := 0
	var lacks error
	for _, l := range img.Layers {
		if _, err := tableOf(l); err == nil {
			have++
		} else if lacks == nil || errors.Is(err, index.ErrCorrupt) {
			lacks = err
		}
	}
	switch {
	case have == 0 && !errors.Is(lacks, index.ErrCorrupt), slices.Contains(o.refuted, img.ManifestDigest):
		return fmt.Errorf("%s: %w", img.ManifestDigest, ErrNoIndex)
	case lacks != nil:
		return noTables(img.ManifestDigest, fmt.Errorf("%d of %d layers have a table of contents: %w", have, len(img.Layers), lacks))
	}
	x := &tables{src: retry.New(repo.Blobs(), retry.Policy{})}
	if x.file, err = scratch(o.TempDir); err != nil {
		return err
	}
	all := make([]Table, len(img.Layers))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(tablesAtOnce)
	for i, l := range img.Layers {
		g.Go(func() (err error) {
			all[i], err = x.fetch(gctx, l)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		x.file.Close()
		return noTables(img.ManifestDigest, err)
	}
	r.Kind, r.Trust, r.Name, r.Side = TOC, Bound, img.ManifestDigest, image.Descriptor{}
	r.File, r.Size, r.Stored, r.Tables = x.file, x.size.Load(), x.stored.Load(), all
	return nil
}

// tables are being fetched into one file.
type tables struct {
	src    blob.Source
	file   *os.File
	base   int64        // bytes of the file that are something else
	size   atomic.Int64 // of the file
	stored atomic.Int64 // bytes fetched
}

// fetch fetches the table of a layer.
func (x *tables) fetch(ctx context.Context, l image.Descriptor) (Table, error) {
	zstd, err := tableOf(l)
	if err != nil {
		return Table{}, err
	}
	if zstd != nil {
		at, err := x.room(l, zstd.Length)
		if err != nil {
			return Table{}, err
		}
		return Table{estargz.Section{Offset: zstd.Offset, Length: zstd.Length}, at}, x.copy(ctx, l, zstd.Offset, zstd.Length, at)
	}
	var end []byte
	n := min(l.Size, tail)
	from := l.Size - n // of end
	if n > 0 {         // a range is never empty
		if end, err = blob.ReadAll(ctx, x.src, l.Ref(), from, n); err != nil {
			return Table{}, err
		}
	}
	x.stored.Add(n)
	s, err := estargz.Locate(end, l.Size, "layer "+l.Digest)
	if err != nil {
		return Table{}, err
	}
	at, err := x.room(l, s.Length)
	if err != nil {
		return Table{}, err
	}
	before := min(max(0, from-s.Offset), s.Length)
	if before > 0 {
		if err := x.copy(ctx, l, s.Offset, before, at); err != nil {
			return Table{}, err
		}
	}
	_, err = x.file.WriteAt(end[s.Offset+before-from:][:s.Length-before], at+before)
	return Table{s, at}, err
}

// room returns where in the file n bytes may go.
func (x *tables) room(l image.Descriptor, n int64) (int64, error) {
	if n <= maxIndex {
		if end := x.size.Add(n); end <= x.base+maxIndex {
			return end - n, nil
		}
	}
	return 0, index.Errorf(index.ErrLimit, "layer "+l.Digest, -1, "with its tables, of %d bytes, the image has more than %d of them", n, maxIndex)
}

// copy fetches n bytes of a layer into the file.
func (x *tables) copy(ctx context.Context, l image.Descriptor, off, n, at int64) error {
	return x.copyFrom(ctx, l, off, off, n, at)
}

// copyFrom is copy that fetches what lies from an offset on before them, too.
func (x *tables) copyFrom(ctx context.Context, l image.Descriptor, from, off, n, at int64) error {
	body, err := x.src.Range(ctx, l.Ref(), from, off+n-from)
	if err != nil {
		return err
	}
	defer body.Close()
	if m, err := io.CopyN(io.Discard, body, off-from); err != nil {
		x.stored.Add(m)
		return err
	}
	x.stored.Add(off - from)
	m, err := io.Copy(io.NewOffsetWriter(x.file, at), body)
	x.stored.Add(m)
	return err
}

// toc reads the tables of contents of all layers into one tree. That they are of
// no use is known only now: the error then wraps ErrNoIndex too.
func (r *Raw) toc() (*index.Tree, error) {
	t, err := r.mergeTables()
	if err != nil {
		return nil, noTables(r.Manifest, err)
	}
	return t, nil
}

func (r *Raw) mergeTables() (*index.Tree, error) {
	if len(r.Tables) != len(r.Layers) {
		return nil, index.Errorf(index.ErrCorrupt, r.Name, -1, "%d tables of contents of %d layers", len(r.Tables), len(r.Layers))
	}
	first := make([]int64, len(r.Layers))
	t, err := r.merge(make([]*scan.Layer, len(r.Layers)), func(i int) (*scan.Layer, error) {
		t, err := r.readTable(i)
		if err != nil {
			return nil, err
		}
		first[i] = prefetch(t)
		return &scan.Layer{Changes: t.Changes, Chunks: t.Chunks, Spans: t.Spans}, nil
	})
	if err != nil {
		return nil, err
	}
	for i, n := range first {
		t.Blobs[i].First = n
	}
	return t, checked(t)
}

// merge fills layers by read, and makes one tree of them, which has to be checked.
func (r *Raw) merge(layers []*scan.Layer, read func(i int) (*scan.Layer, error)) (*index.Tree, error) {
	blobs := make([]index.Blob, len(r.Layers))
	var took atomic.Int64
	most := r.Limits.WithDefaults().Memory
	var g errgroup.Group
	g.SetLimit(Parallel)
	for i, l := range r.Layers {
		blobs[i] = index.Blob{Digest: l.Digest, Size: l.Size}
		g.Go(func() (err error) {
			if took.Load() > most { // another has said it
				return nil
			}
			if layers[i], err = read(i); err != nil {
				return err
			}
			if took.Add(weight(layers[i].Changes, len(layers[i].Chunks)+len(layers[i].Spans))) > most {
				return index.Errorf(index.ErrLimit, "layer "+l.Digest, -1, "with its table those of the image take more than %d bytes of memory (Memory)", most)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	return scan.Image(layers, blobs, io.Discard)
}

// checked tells whether a tree that tables of others were merged into is sound.
func checked(t *index.Tree) error {
	if err := t.CheckSpans(); err != nil {
		return err
	}
	for i := range t.Chunks {
		if err := t.CheckChunk(&t.Chunks[i]); err != nil {
			return err
		}
	}
	return nil
}

// readTable reads the table of contents of layer i.
func (r *Raw) readTable(i int) (*estargz.Layer, error) {
	l, t := r.Layers[i], r.Tables[i]
	name := "layer " + l.Digest
	if t.Length < 0 || t.At < 0 || t.At > r.Size || t.Length > r.Size-t.At {
		return nil, index.Errorf(index.ErrCorrupt, name, t.Offset, "a table of contents of %d bytes at %d of %d that were fetched", t.Length, t.At, r.Size)
	}
	p := make([]byte, t.Length)
	if _, err := r.File.ReadAt(p, t.At); err != nil {
		return nil, err
	}
	zstd, err := tableOf(l)
	switch {
	case err != nil:
		return nil, err
	case zstd != nil:
		return zstdchunked.Read(p, *zstd, name, r.Limits)
	}
	return estargz.Read(p, t.Section, l.Annotations[estargz.DigestAnnotation], name, r.Limits)
}

// prefetch returns where in the stream of a layer the last of the files ends that its
// builder has put first, for they are read first.
func prefetch(l *estargz.Layer) (end int64) {
	if len(l.Prefetch) == 0 {
		return 0
	}
	files := map[string]bool{}
	for _, path := range l.Prefetch {
		files[path] = true
	}
	for _, c := range l.Changes {
		if c.Inode != nil && files[c.Path] {
			for _, e := range c.Inode.Extents {
				end = max(end, l.Chunks[e.Chunk].End())
			}
		}
	}
	return end
}

// weight is how much memory a table takes, roughly: a hundred bytes for each thing.
func weight(changes []index.Change, others int) int64 {
	n := len(changes) + others
	for _, c := range changes {
		if c.Inode != nil {
			n += len(c.Inode.Extents)
		}
	}
	return 100 * int64(n)
}
