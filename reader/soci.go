package reader

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/scan"
	"github.com/shale-image/shale/index/soci"
)

// How a SOCI index looks in a registry: an artifact whose layers are ztocs. That of
// version 1 has the image as its subject; the digest of that of version 2 is in the
// image's manifest.
const (
	SOCIType1 = "application/vnd.amazon.soci.index.v1+json"
	SOCIType2 = "application/vnd.amazon.soci.index.v2+json"
	SOCIZtoc  = "application/octet-stream" // media type

	SOCILayer = "com.amazon.soci.image-layer-digest" // annotation of a ztoc
	BoundSOCI = "com.amazon.soci.index-digest"       // annotation of an image's manifest
)

// Part is what Raw.File has for a layer of an image with a SOCI index: its ztoc or,
// if the index has none, the layer itself. It leaves out small ones, of which a
// ztoc would be worth less than it takes.
type Part struct {
	Ztoc string // digest; "": it is the layer
	Size int64
	At   int64 // in Raw.File
}

// fetchSOCI fetches the SOCI index of an image: the one that its manifest names, or
// else one that lies beside it.
func (r *Raw) fetchSOCI(ctx context.Context, repo *image.Repository, img *image.Image, o Options) error {
	trust := cmp.Or(o.Trust, Repository)
	none := fmt.Errorf("%s: %w", img.ManifestDigest, ErrNoIndex)
	var bad error
	try := func(a *image.Artifact, err error, kind string, from Trust) (done bool, _ error) {
		if err == nil && a.Type != kind {
			err = index.Errorf(index.ErrCorrupt, "artifact "+a.Digest, -1, "it is a %.100q, want %s", a.Type, kind)
		}
		if err == nil && slices.Contains(o.refuted, a.Digest) {
			return false, nil
		}
		if err == nil {
			err = r.fetchParts(ctx, repo, img, a, o)
		}
		if err == nil {
			r.Kind, r.Trust, r.Key, r.Name, r.Side, r.TempDir = SOCI, from, "", a.Digest, image.Descriptor{}, o.TempDir
			return true, nil
		}
		if !useless(err) || ctx.Err() != nil {
			return true, err
		}
		bad = cmp.Or(bad, err)
		return false, nil
	}
	if d := img.Annotations[BoundSOCI]; d != "" && trust.Allows(Bound) {
		lctx, cancel := context.WithTimeout(ctx, listTime)
		a, err := repo.BoundArtifact(lctx, d)
		cancel()
		if done, err := try(a, err, SOCIType2, Bound); done {
			return err
		}
	}
	found, err := r.list(ctx, repo, img, SOCIType1)
	if err != nil && !errors.Is(err, ErrNoIndex) {
		return err
	}
	bad = cmp.Or(bad, err)
	switch {
	case trust.Allows(Repository):
		for _, d := range found[:min(len(found), maxArtifacts)] {
			lctx, cancel := context.WithTimeout(ctx, listTime)
			a, err := repo.Artifact(lctx, d.Descriptor, img.ManifestDigest)
			cancel()
			if done, err := try(a, err, SOCIType1, Repository); done {
				return err
			}
		}
	case len(found) > 0:
		none = fmt.Errorf("%s: %w", img.ManifestDigest, needsTrust{Repository, trust})
	}
	if bad != nil {
		return fmt.Errorf("%w: %w", none, bad)
	}
	return none
}

// fetchParts fetches what an index has of each layer of the image, and those it has
// nothing of.
func (r *Raw) fetchParts(ctx context.Context, repo *image.Repository, img *image.Image, a *image.Artifact, o Options) (err error) {
	parts, from := make([]Part, len(img.Layers)), make([]image.Descriptor, len(img.Layers))
	x := &tables{}
	ztocs := 0
	for i, l := range img.Layers {
		from[i] = l
		n := slices.IndexFunc(a.Layers, func(d image.Descriptor) bool { return d.MediaType == SOCIZtoc && d.Annotations[SOCILayer] == l.Digest })
		if n >= 0 {
			ztocs++
			from[i], parts[i].Ztoc = a.Layers[n], a.Layers[n].Digest
		}
		parts[i].Size = from[i].Size
		if parts[i].At, err = x.room(from[i], from[i].Size); err != nil {
			return err
		}
	}
	if ztocs == 0 {
		return index.Errorf(index.ErrUnsupported, "artifact "+a.Digest, -1, "it has no ztoc of any layer of the image")
	}
	if x.file, err = scratch(o.TempDir); err != nil {
		return err
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(tablesAtOnce)
	for i, d := range from {
		g.Go(func() error {
			return besideBlob(gctx, repo, d, x.file, parts[i].At)
		})
	}
	if err := g.Wait(); err != nil {
		x.file.Close()
		return err
	}
	r.File, r.Size, r.Stored, r.Parts = x.file, x.size.Load(), x.size.Load(), parts
	return nil
}

// soci reads what an image with a SOCI index has of its layers into one tree. That
// it is of no use is known only now: the error then wraps ErrNoIndex too.
func (r *Raw) soci() (*index.Tree, error) {
	t, err := r.mergeParts()
	if err != nil && useless(err) {
		return nil, fmt.Errorf("%s: %w: SOCI index %s: %w", r.Manifest, ErrNoIndex, r.Name, err)
	}
	return t, err
}

func (r *Raw) mergeParts() (_ *index.Tree, err error) {
	if len(r.Parts) != len(r.Layers) {
		return nil, index.Errorf(index.ErrCorrupt, r.Name, -1, "%d parts of %d layers", len(r.Parts), len(r.Layers))
	}
	layers := make([]*scan.Layer, len(r.Layers))
	defer func() {
		for i, l := range layers {
			if l != nil && r.Parts[i].Ztoc == "" {
				err = errors.Join(err, l.Close())
			}
		}
	}()
	t, err := r.merge(layers, r.readPart)
	if err != nil {
		return nil, err
	}
	if len(t.Blobs) > len(layers) {
		return nil, index.Errorf(index.ErrUnsupported, r.Name, -1, "a sparse file in a layer that it has no ztoc of")
	}
	// Windows are where they have always been, in the ztocs.
	for i, p := range r.Parts {
		if p.Ztoc == "" {
			continue
		}
		for k := range t.Blobs[i].Spans {
			if w := &t.Blobs[i].Spans[k].Window; w.Length > 0 {
				w.Blob = uint32(len(t.Blobs))
			}
		}
		t.Blobs = append(t.Blobs, index.Blob{Digest: p.Ztoc, Size: p.Size})
	}
	return t, checked(t)
}

// readPart reads the ztoc of a layer, or the layer.
func (r *Raw) readPart(i int) (*scan.Layer, error) {
	l, p := r.Layers[i], r.Parts[i]
	if p.Size < 0 || p.At < 0 || p.At > r.Size || p.Size > r.Size-p.At {
		return nil, index.Errorf(index.ErrCorrupt, r.Name, -1, "%d bytes at %d of %d that were fetched", p.Size, p.At, r.Size)
	}
	if p.Ztoc == "" {
		// Nobody will fetch it again: one span is enough.
		return scan.Scan(context.Background(), io.NewSectionReader(r.File, p.At, p.Size), "layer "+l.Digest,
			scan.Options{Limits: r.Limits, Cut: r.Cut, TempDir: r.TempDir, Keep: r.Keep, Every: math.MaxInt64})
	}
	b := make([]byte, p.Size)
	if _, err := r.File.ReadAt(b, p.At); err != nil {
		return nil, err
	}
	z, err := soci.Read(b, soci.Subject{Layer: l.Digest, Size: l.Size, Ztoc: p.Ztoc, Cut: r.Cut}, r.Limits)
	if err != nil {
		return nil, err
	}
	return &scan.Layer{Changes: z.Changes, Chunks: z.Chunks, Spans: z.Spans}, nil
}

// Fetched tells whether File has all of a blob of the tree, whose content goes to
// Keep.
func (r *Raw) Fetched(blob int) bool {
	return r.Kind == SOCI && blob < len(r.Parts) && r.Parts[blob].Ztoc == ""
}

// Beside calls fn with what a SOCI index has besides the layers: windows are in it.
func (r *Raw) Beside(fn func(ref blob.Ref, content io.Reader) error) error {
	for _, p := range r.Parts {
		if p.Ztoc != "" {
			if err := fn(blob.Ref{Digest: p.Ztoc, Size: p.Size}, io.NewSectionReader(r.File, p.At, p.Size)); err != nil {
				return err
			}
		}
	}
	return nil
}
