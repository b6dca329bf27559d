package reader

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/retry"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/estargz"
	"github.com/shale-image/shale/index/rafs"
)

// RAFS is Tree for tools that also look at the bootstrap's tables. Of the
// rafs.Image only what is in memory may be used (Blobs, Flags, ...): its file
// is closed.
func RAFS(ctx context.Context, repo *image.Repository, img *image.Image, tmp string) (*rafs.Image, *index.Tree, error) {
	if _, ok := Bootstrap(img); !ok {
		return nil, nil, fmt.Errorf("%s: not a Nydus image: %w", img.ManifestDigest, ErrNoIndex)
	}
	raw, err := Fetch(ctx, repo, img, Options{TempDir: tmp})
	if err != nil {
		return nil, nil, err
	}
	defer raw.Close()
	return raw.rafs()
}

// NydusRef is the annotation of a layer that has the chunk info of a gzip layer,
// which is in the repository and not in the manifest: that one's digest.
const NydusRef = "containerd.io/snapshot/nydus-ref"

// Meta is where the chunk info of a blob is that a bootstrap does not tell enough
// of. Parts are of the blob that has it, of Size bytes.
type Meta struct {
	Blob  int // in the bootstrap's table
	Name  string
	Size  int64
	Parts []Table
}

// tocMost is how much the end of a blob may have of its table of contents.
const tocMost = 4096

// fetchBootstrap fetches the bootstrap, and into the same file the chunk info that
// it does not make up for. A blob that has nothing else is fetched whole, and
// verified; of others it is what the table of contents says, which
// rafs.ReadBlobMeta compares.
func (r *Raw) fetchBootstrap(ctx context.Context, repo *image.Repository, boot image.Descriptor, tmp string) (err error) {
	r.Name, r.Stored = boot.Digest, boot.Size
	if r.File, r.Size, err = spoolBootstrap(ctx, repo, boot, tmp); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			r.File.Close()
		}
	}()
	needs, err := rafs.Needs(r.File, r.Size, r.Name)
	if err != nil {
		return err
	}
	x := &tables{src: retry.New(repo.Blobs(), retry.Policy{}), file: r.File}
	x.size.Store(r.Size)
	x.base = r.Size
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(tablesAtOnce)
	for n, b := range needs {
		m, l, err := r.findMeta(n, &b)
		if err != nil {
			return err
		}
		for i := range m.Parts {
			p := &m.Parts[i]
			if p.At, err = x.room(l, p.Length); err != nil {
				return err
			}
		}
		r.Metas = append(r.Metas, m)
		g.Go(func() error {
			if b.Features&rafs.FeatureSeparate != 0 {
				return x.whole(gctx, repo, l, m.Parts[0].At)
			}
			for _, p := range m.Parts {
				err := x.copy(gctx, l, p.Offset, p.Length, p.At)
				if errors.Is(err, blob.ErrRange) { // there is no other way to read the image
					err = x.copyFrom(gctx, l, 0, p.Offset, p.Length, p.At)
				}
				if err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	slices.SortFunc(r.Metas, func(a, b Meta) int { return a.Blob - b.Blob })
	r.Stored += x.stored.Load()
	return nil
}

// findMeta tells which layer has the chunk info of blob n, and which parts of it
// are to be fetched.
func (r *Raw) findMeta(n int, b *rafs.BlobInfo) (Meta, image.Descriptor, error) {
	digest := b.Digest()
	separate := b.Features&rafs.FeatureSeparate != 0
	if separate {
		digest = b.MetaDigest()
	}
	i := slices.IndexFunc(r.Layers, func(l image.Descriptor) bool { return l.Digest == digest })
	if i < 0 {
		return Meta{}, image.Descriptor{}, index.Errorf(index.ErrCorrupt, r.Name, -1, "blob %q, which has the chunk info of blob %s of the bootstrap, is not a layer of the manifest", digest, b.ID)
	}
	l := r.Layers[i]
	if ref := l.Annotations[NydusRef]; separate && ref != "" && ref != b.Digest() {
		return Meta{}, l, index.Errorf(index.ErrCorrupt, r.Name, -1, "layer %s says that it is about layer %s, the bootstrap that it is about %s", l.Digest, ref, b.Digest())
	}
	m := Meta{Blob: n, Name: "layer " + l.Digest, Size: l.Size}
	part := func(off, length int64) {
		if off = max(0, min(off, l.Size)); off < l.Size && length > 0 {
			m.Parts = append(m.Parts, Table{Section: estargz.Section{Offset: off, Length: min(length, l.Size-off)}})
		}
	}
	switch {
	case separate:
		part(0, l.Size)
	case b.Features&rafs.FeatureTOC != 0:
		part(l.Size-tocMost, tocMost)
		fallthrough
	default:
		part(int64(b.InfoOffset), int64(b.InfoLength)+rafs.InfoHeader)
	}
	if len(m.Parts) == 0 {
		return Meta{}, l, index.Errorf(index.ErrCorrupt, m.Name, int64(b.InfoOffset), "no chunk info in %d bytes", l.Size)
	}
	return m, l, nil
}

// whole fetches and verifies a layer.
func (x *tables) whole(ctx context.Context, repo *image.Repository, l image.Descriptor, at int64) error {
	n, err := repo.Spool(ctx, l, x.file, at)
	x.stored.Add(n)
	return err
}

// openMeta implements rafs.Metas.
func (r *Raw) openMeta(n int, b *rafs.BlobInfo) (io.ReaderAt, int64, string, error) {
	for i := range r.Metas {
		if m := &r.Metas[i]; m.Blob == n {
			return &parts{m, r.File}, m.Size, m.Name, nil
		}
	}
	return nil, 0, "", index.Errorf(index.ErrCorrupt, r.Name, -1, "no chunk info of blob %s was fetched", b.ID)
}

// parts reads what was fetched of a blob.
type parts struct {
	m    *Meta
	file *os.File
}

func (p *parts) ReadAt(b []byte, off int64) (int, error) {
	for _, t := range p.m.Parts {
		if off >= t.Offset && off-t.Offset <= t.Length-int64(len(b)) {
			return p.file.ReadAt(b, t.At+off-t.Offset)
		}
	}
	return 0, index.Errorf(index.ErrCorrupt, p.m.Name, off, "%d bytes lie elsewhere than the bootstrap says", len(b))
}

func (r *Raw) rafs() (*rafs.Image, *index.Tree, error) {
	b, err := rafs.Open(r.File, r.Size, r.Name, r.openMeta)
	if err != nil {
		return nil, nil, err
	}
	t, err := b.Tree(r.Limits)
	if err != nil {
		return nil, nil, err
	}
	sizes := map[string]int64{}
	for _, l := range r.Layers {
		sizes[l.Digest] = l.Size
	}
	for i, info := range b.Blobs() {
		tb := &t.Blobs[i]
		size, ok := sizes[tb.Digest]
		switch {
		case ok:
			tb.Size = size
		case info.Features&rafs.FeatureSeparate == 0 || tb.Digest == "": // else only the chunk info is a layer
			return nil, nil, index.Errorf(index.ErrCorrupt, r.Name, -1, "blob %s of the bootstrap is not a layer of the manifest", info.ID)
		}
	}
	return b, t, t.CheckSpans()
}
