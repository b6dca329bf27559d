package reader

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/artifact"
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

// Trust is whose word on an image's files is taken before all of it is there.
type Trust string

// The kinds of trust, each with those before it.
const (
	Local      Trust = "local"      // an index made on this node
	Bound      Trust = "bound"      // one whose digest is in the image's manifest
	Repository Trust = "repository" // one that lies beside the image
)

// ParseTrust reads a kind of trust; "" is Repository.
func ParseTrust(s string) (Trust, error) {
	switch t := Trust(s); t {
	case "":
		return Repository, nil
	case Local, Bound, Repository:
		return t, nil
	}
	return "", fmt.Errorf("index trust %q: want %s, %s or %s", s, Local, Bound, Repository)
}

// fetchIndex fetches the index that lies beside an image.
func (r *Raw) fetchIndex(ctx context.Context, repo *image.Repository, img *image.Image, o Options) error {
	none := fmt.Errorf("%s: %w", img.ManifestDigest, ErrNoIndex)
	if o.Trust == Local {
		return none
	}
	found, err := repo.Referrers(ctx, img.ManifestDigest, ArtifactType)
	if err != nil {
		return err
	}
	bad := none
	for _, d := range found {
		if bad = r.fetchArtifact(ctx, repo, img, d, o); bad == nil {
			return nil
		}
		if !errors.Is(bad, index.ErrCorrupt) && !errors.Is(bad, index.ErrUnsupported) && !errors.Is(bad, index.ErrLimit) && !errors.Is(bad, ErrNoIndex) {
			return bad
		}
	}
	if !errors.Is(bad, ErrNoIndex) {
		bad = fmt.Errorf("%w: %w", none, bad)
	}
	return bad
}

func (r *Raw) fetchArtifact(ctx context.Context, repo *image.Repository, img *image.Image, d image.Descriptor, o Options) error {
	a, err := repo.Artifact(ctx, d, img.ManifestDigest)
	if err != nil {
		return err
	}
	if len(a.Layers) < 1 || len(a.Layers) > 2 || a.Layers[0].MediaType != IndexMediaType || len(a.Layers) == 2 && a.Layers[1].MediaType != SideMediaType {
		return index.Errorf(index.ErrUnsupported, d.Digest, -1, "an index of other parts than %s and %s", IndexMediaType, SideMediaType)
	}
	r.Trust = Repository
	if img.Annotations[BoundIndex] == a.Layers[0].Digest {
		r.Trust = Bound
	} else if o.Trust == Bound {
		return fmt.Errorf("%s: the manifest names no index %s: %w", img.ManifestDigest, a.Layers[0].Digest, ErrNoIndex)
	}
	if a.Layers[0].Size > maxIndex {
		return index.Errorf(index.ErrLimit, a.Layers[0].Digest, -1, "index of %d bytes, at most %d are read", a.Layers[0].Size, maxIndex)
	}
	f, err := scratch(o.TempDir)
	if err != nil {
		return err
	}
	rc, err := repo.Blob(ctx, a.Layers[0])
	if err != nil {
		f.Close()
		return err
	}
	defer rc.Close()
	if _, err := io.Copy(f, rc); err != nil {
		f.Close()
		return err
	}
	r.Kind, r.Name, r.File, r.Size, r.Stored = Index, a.Layers[0].Digest, f, a.Layers[0].Size, a.Layers[0].Size
	if len(a.Layers) == 2 {
		r.Side = a.Layers[1]
	}
	return nil
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
	t, info, err := artifact.Decode(p, r.Name, artifact.Limits{})
	if err != nil {
		return nil, err
	}
	corrupt := func(format string, args ...any) (*index.Tree, error) {
		return nil, index.Errorf(index.ErrCorrupt, r.Name, -1, format, args...)
	}
	if info.Manifest != r.Manifest {
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

// Push pushes the index of an image beside it, in place of any that this program
// has pushed before, and returns the digest of the artifact.
func Push(ctx context.Context, repo *image.Repository, img *image.Image, m *Made) (string, error) {
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
	subject := image.Descriptor{MediaType: img.MediaType, Digest: img.ManifestDigest, Size: int64(len(img.ManifestBytes))}
	return repo.PushArtifact(ctx, subject, ArtifactType, layers, nil, func(image.Descriptor) bool { return true })
}
