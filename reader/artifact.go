package reader

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/fleet"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/artifact"
	"github.com/shale-image/shale/trust"
)

// How an index looks in a registry: an OCI artifact whose subject is the image,
// with the index as its first layer and, unless there is nothing in it, the side
// (package index/scan) as its second.
const (
	ArtifactType   = "application/vnd.shale.index.v1"
	IndexMediaType = "application/vnd.shale.index.v1+binary"
	SideMediaType  = "application/vnd.shale.index.side.v1"

	// BoundIndex is the annotation of an image's manifest that has the digest
	// of the index that its maker stands for.
	BoundIndex = "io.github.shale-image.index"
)

// maxIndex bounds an index as it is stored.
const maxIndex = 256 << 20

// maxArtifacts is how many of the artifacts beside an image are looked at. Each
// index that has been pushed may be there, and whatever a hostile list adds.
const maxArtifacts = 64

// fetchIndex fetches the index that lies beside an image: of those there are the
// one that takes the least trust. One that is not what it should be is passed
// over, and if there is no other it is told what was wrong with it.
func (r *Raw) fetchIndex(ctx context.Context, repo *image.Repository, img *image.Image, o Options) error {
	o.Trust = cmp.Or(o.Trust, Repository)
	none := fmt.Errorf("%s: %w", img.ManifestDigest, ErrNoIndex)
	if o.Trust == Local {
		return none
	}
	types := []string{ArtifactType}
	if o.Start != nil {
		types = append(types, PackArtifactType, fleet.ArtifactType)
	}
	found, err := repo.Referrers(ctx, img.ManifestDigest, types...)
	if err != nil && useless(err) {
		return fmt.Errorf("%w: %w", none, err)
	}
	if err != nil {
		return err
	}
	r.openPack(ctx, repo, found, o) // before all else: it has the index, too
	found = slices.DeleteFunc(found, func(d image.Referrer) bool { return d.Type != ArtifactType })
	var candidates []candidate
	var bad error // the first
	for _, d := range found[:min(len(found), maxArtifacts)] {
		c, err := consider(ctx, repo, img, d.Descriptor, o)
		switch {
		case err == nil:
			candidates = append(candidates, c)
		case errors.Is(err, ErrNoIndex):
			none = err
		case !useless(err):
			return err
		case bad == nil:
			bad = err
		}
	}
	slices.SortStableFunc(candidates, func(a, b candidate) int {
		return cmp.Compare(slices.Index(order, a.trust), slices.Index(order, b.trust))
	})
	for _, c := range candidates {
		err := r.fetchArtifact(ctx, repo, c, o)
		if err == nil || !useless(err) {
			return err
		}
		bad = cmp.Or(bad, err)
	}
	if bad != nil {
		return fmt.Errorf("%w: %w", none, bad)
	}
	return none
}

// useless tells the faults of an index from those of the way to it.
func useless(err error) bool {
	return errors.Is(err, index.ErrCorrupt) || errors.Is(err, index.ErrUnsupported) || errors.Is(err, index.ErrLimit) ||
		errors.Is(err, image.ErrNotImage) || errors.Is(err, blob.ErrNotFound) || errors.Is(err, blob.ErrRange) // the list is not bound to anything
}

func (r *Raw) fetchArtifact(ctx context.Context, repo *image.Repository, a candidate, o Options) error {
	if a.Layers[0].Size > maxIndex {
		return index.Errorf(index.ErrLimit, a.Layers[0].Digest, -1, "index of %d bytes, at most %d are read", a.Layers[0].Size, maxIndex)
	}
	f, err := r.indexFile(ctx, repo, a.Layers[0], o)
	if err != nil {
		return err
	}
	r.Kind, r.Trust, r.Key = Index, a.trust, a.key
	r.Name, r.File, r.Size, r.Stored = a.Layers[0].Digest, f, a.Layers[0].Size, a.Layers[0].Size
	if len(a.Layers) == 2 {
		r.Side = a.Layers[1]
	}
	return nil
}

// indexFile fetches an index, from the pack that is on its way if that has it.
func (r *Raw) indexFile(ctx context.Context, repo *image.Repository, d image.Descriptor, o Options) (*os.File, error) {
	if r.Pack != nil && r.Pack.Index == d.Digest {
		f, err := scratch(o.TempDir)
		if err != nil {
			return nil, err
		}
		if err = r.Pack.metadata(f, d); err == nil {
			return f, nil
		}
		_ = f.Close()
		_ = r.Pack.Close() // it is of no use
		r.Pack = nil
	}
	f, err := scratch(o.TempDir)
	if err != nil {
		return nil, err
	}
	if _, err := repo.Spool(ctx, d, f, 0); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// LocalIndex is the index of an image that this node made: File has what
// artifact.Encode wrote. The caller closes it.
func LocalIndex(manifest string, layers []image.Descriptor, f *os.File, side image.Descriptor) (*Raw, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return &Raw{Kind: Index, Trust: Local, Name: f.Name(), Manifest: manifest, Size: st.Size(), Layers: layers, Side: side, File: f}, nil
}

// artifact reads an index, which must be that of the image's layers.
func (r *Raw) artifact() (*index.Tree, error) {
	p := make([]byte, r.Size)
	if _, err := r.File.ReadAt(p, 0); err != nil {
		return nil, err
	}
	t, info, err := artifact.Decode(p, r.Name, artifact.Limits{Entries: r.Limits.Entries, XattrBytes: r.Limits.XattrBytes, FileSize: r.Limits.FileSize})
	if err != nil {
		return nil, err
	}
	corrupt := func(format string, args ...any) (*index.Tree, error) {
		return nil, index.Errorf(index.ErrCorrupt, r.Name, -1, format, args...)
	}
	// A manifest cannot have the digest of an index that has the manifest's: what
	// it binds is held to its layers alone.
	if info.Manifest != r.Manifest && r.Trust != Bound {
		return corrupt("it is the index of %s, want %s", info.Manifest, r.Manifest)
	}
	if len(t.Blobs) < len(r.Layers) || len(t.Blobs) > len(r.Layers)+1 {
		return corrupt("%d blobs for %d layers", len(t.Blobs), len(r.Layers))
	}
	for i := range t.Blobs {
		want := r.Side
		if i < len(r.Layers) {
			want = r.Layers[i]
		}
		if t.Blobs[i].Digest != want.Digest {
			return corrupt("blob %d is %s, want %s", i, t.Blobs[i].Digest, want.Digest)
		}
		t.Blobs[i].Size = want.Size
	}
	return t, t.CheckSpans()
}

// Push pushes the index of an image beside it, signed by those who sign, in place
// of any that this program has pushed before, and returns the digest of the
// artifact. (A registry that lists by itself what refers to an image lists those
// of before, too.)
func Push(ctx context.Context, repo *image.Repository, img *image.Image, m *Made, signers ...*trust.Signer) (string, error) {
	d := image.Descriptor{MediaType: IndexMediaType, Digest: IndexDigest(m.Encoded), Size: int64(len(m.Encoded))}
	layers := []image.Descriptor{d}
	err := repo.PushBlob(ctx, d, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(m.Encoded)), nil })
	if err != nil {
		return "", err
	}
	if m.Side.Size > 0 {
		if err := repo.PushBlob(ctx, m.Side, m.OpenSide); err != nil {
			return "", err
		}
		layers = append(layers, m.Side)
	}
	signatures, err := sign(statement(img.ManifestDigest, layers), signers)
	if err != nil {
		return "", err
	}
	subject := image.Descriptor{MediaType: img.MediaType, Digest: img.ManifestDigest, Size: int64(len(img.ManifestBytes))}
	return repo.PushArtifact(ctx, subject, ArtifactType, layers, signatures, func(image.Descriptor) bool { return true })
}
