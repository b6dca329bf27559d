package reader

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strconv"
	"time"

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

// maxArtifacts is how many of the artifacts beside an image are looked at, and
// considered at once. Each index that has been pushed may be there, and whatever a
// hostile list adds.
const (
	maxArtifacts = 64
	considered   = 8
)

// fetchIndex fetches the index that lies beside an image: of those there are the
// one that takes the least trust. One that is not what it should be, or cannot be
// had, is passed over, and if there is no other it is told what was wrong with it.
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
	found, err := r.list(ctx, repo, img, types...)
	if err != nil {
		return err
	}
	r.openPack(ctx, repo, found, o) // before all else: it has the index, too
	found = slices.DeleteFunc(found, func(d image.Referrer) bool { return d.Type != ArtifactType })
	var coming *early
	if r.Pack == nil {
		coming = fetchEarly(ctx, repo, img, found, o)
		defer coming.close()
	}
	candidates, unbelieved, bad := considerAll(ctx, repo, img, found[:min(len(found), maxArtifacts)], o)
	if bad != nil && (!useless(bad) || ctx.Err() != nil) {
		return bad
	}
	none = cmp.Or(unbelieved, none)
	if len(o.refuted) >= maxRefuted-2 { // the layers may have tables
		candidates = nil
	}
	for _, c := range candidates {
		if slices.Contains(o.refuted, c.Layers[0].Digest) {
			continue
		}
		err := r.fetchArtifact(ctx, repo, c, o, coming)
		if err == nil || !useless(err) || ctx.Err() != nil {
			return err
		}
		bad = cmp.Or(bad, err)
	}
	if bad != nil {
		return fmt.Errorf("%w: %w", none, bad)
	}
	return none
}

// What lies beside an image is worth waiting for, but not as long as all of the image
// would take. Tests have less time.
var (
	listTime  = 10 * time.Second // for the list, and for the manifests of indexes
	stallTime = 10 * time.Second // for more of an index to come
)

// list lists what lies beside an image. Where that cannot be had the error wraps
// ErrNoIndex, as the image can, and nobody is asked again.
func (r *Raw) list(ctx context.Context, repo *image.Repository, img *image.Image, types ...string) ([]image.Referrer, error) {
	if r.unlisted != nil {
		return nil, r.unlisted
	}
	lctx, cancel := context.WithTimeout(ctx, listTime)
	defer cancel()
	found, err := repo.Referrers(lctx, img.ManifestDigest, types...)
	if err != nil && ctx.Err() == nil && useless(err) {
		err = fmt.Errorf("%s: %w", img.ManifestDigest, unknown{err})
		r.unlisted = err
	}
	return found, err
}

// unknown is ErrNoIndex where nobody can tell whether there is one.
type unknown struct{ error }

func (u unknown) Error() string {
	return "what lies beside the image cannot be had: " + u.error.Error()
}
func (u unknown) Unwrap() error        { return u.error }
func (u unknown) Is(target error) bool { return target == ErrNoIndex }

// useless tells the faults of an index, and of a registry that does not give it, from
// those of this node.
func useless(err error) bool {
	for _, kind := range []error{
		index.ErrCorrupt, index.ErrUnsupported, index.ErrLimit, image.ErrNotImage, blob.ErrNotFound, blob.ErrRange, // the list is not bound to anything
		blob.ErrUnauthorized, blob.ErrUnavailable, context.DeadlineExceeded,
	} {
		if errors.Is(err, kind) {
			return true
		}
	}
	return false
}

// besideBlob writes a blob that lies beside an image, verified, to w at an offset. It gives
// up when nothing comes any more.
func besideBlob(ctx context.Context, repo *image.Repository, d image.Descriptor, w io.WriterAt, at int64) error {
	sctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	t := time.AfterFunc(stallTime, func() {
		cancel(fmt.Errorf("blob %s: %w: nothing came for %v", d.Digest, blob.ErrUnavailable, stallTime))
	})
	defer t.Stop()
	_, err := repo.Spool(sctx, d, progress{w, t}, at)
	if err != nil && ctx.Err() == nil && sctx.Err() != nil {
		err = context.Cause(sctx)
	}
	return err
}

// progress resets a timer with each byte that comes.
type progress struct {
	io.WriterAt
	timer *time.Timer
}

func (p progress) WriteAt(b []byte, off int64) (int, error) {
	p.timer.Reset(stallTime)
	return p.WriterAt.WriteAt(b, off)
}

func (r *Raw) fetchArtifact(ctx context.Context, repo *image.Repository, a candidate, o Options, e *early) error {
	if a.Layers[0].Size > maxIndex {
		return index.Errorf(index.ErrLimit, a.Layers[0].Digest, -1, "index of %d bytes, at most %d are read", a.Layers[0].Size, maxIndex)
	}
	f, err := r.indexFile(ctx, repo, a.Layers[0], o, e)
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

// indexFile fetches an index, from the pack that is on its way if that has it, if it is not on
// its way itself.
func (r *Raw) indexFile(ctx context.Context, repo *image.Repository, d image.Descriptor, o Options, e *early) (*os.File, error) {
	if f, err := e.take(d); f != nil || err != nil {
		return f, err
	}
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
	if err := besideBlob(ctx, repo, d, f, 0); err != nil {
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
	t, info, err := artifact.Decode(p, r.Name, r.Limits)
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
	if m.Side.Size > 0 {
		layers = append(layers, m.Side)
	}
	signatures, err := sign(statement(img.ManifestDigest, layers), signers)
	if err != nil {
		return "", err
	}
	return pushIndex(ctx, repo, img, layers, []io.ReaderAt{bytes.NewReader(m.Encoded), m.side}, signatures, true)
}

// pushIndex pushes an artifact, and before that its layers, from files. Its annotations are the
// signatures, and what says what it will be asked for.
func pushIndex(ctx context.Context, repo *image.Repository, img *image.Image, layers []image.Descriptor, files []io.ReaderAt, signatures map[string]string, replaces bool) (string, error) {
	for i, d := range layers {
		err := repo.PushBlob(ctx, d, func() (io.ReadCloser, error) { return io.NopCloser(io.NewSectionReader(files[i], 0, d.Size)), nil })
		if err != nil {
			return "", err
		}
	}
	subject := image.Descriptor{MediaType: img.MediaType, Digest: img.ManifestDigest, Size: int64(len(img.ManifestBytes))}
	annotations := map[string]string{indexDigest: layers[0].Digest, indexSize: strconv.FormatInt(layers[0].Size, 10)}
	maps.Copy(annotations, signatures)
	return repo.PushArtifact(ctx, subject, ArtifactType, layers, annotations, func(image.Descriptor) bool { return replaces })
}
