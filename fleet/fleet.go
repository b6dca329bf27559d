// Package fleet lets nodes tell each other what runs of an image have read:
// traces lie beside the image in its repository, as OCI artifacts.
//
// There are at most Max of them beside an image. Who finds as many merges them
// with its own and puts one in place of them. To merge is a union of runs that
// have ids (package trace), so nobody has to be asked first: what two nodes
// merge at the same time is not counted twice, and nothing is taken away that
// is not in what takes its place.
//
// Whoever may push to the repository may push a trace, and what it says is no
// more than a hint: nothing is believed for it.
//
// It knows repositories and traces; it knows no node.
package fleet

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/klauspost/compress/zstd"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/trace"
)

// How a trace looks in a registry: docs/formats/trace.md.
const (
	ArtifactType = "application/vnd.shale.trace.v1"
	MediaType    = "application/vnd.shale.trace.v1+zstd"
)

const (
	// Max is how many traces lie beside an image, but for those that come to
	// lie there at the same moment.
	Max = 16

	// maxListed is how many are looked at, and at how many none is pushed: a
	// registry that keeps what was replaced must not come to have a list so long
	// that an image's index is no longer found in it.
	maxListed = 64

	maxStored = 8 << 20 // bytes of one, compressed
	maxAll    = 1 << 20 // blocks that are merged at a time; more than a trace has
)

// Traces fetches the traces that lie beside an image and merges them. If there is
// none that can be used it is blob.ErrNotFound, and says what is wrong with those
// there are.
func Traces(ctx context.Context, repo *image.Repository, img *image.Image) (*trace.Trace, error) {
	found, err := list(ctx, repo, img)
	if err != nil {
		return nil, err
	}
	all, err := fetch(ctx, repo, img, found)
	if err != nil {
		return nil, err
	}
	var sum *trace.Trace
	var bad error
	for _, f := range all {
		if f.err != nil {
			bad = cmp.Or(bad, f.err)
			continue
		}
		if sum, err = add(sum, f.trace); err != nil {
			return nil, err
		}
	}
	switch {
	case sum != nil:
		return sum, nil
	case bad != nil:
		return nil, fmt.Errorf("no trace of %s: %w: %w", img.ManifestDigest, blob.ErrNotFound, bad)
	}
	return nil, fmt.Errorf("no trace lies beside %s: %w", img.ManifestDigest, blob.ErrNotFound)
}

func add(sum, t *trace.Trace) (*trace.Trace, error) {
	if sum == nil {
		return t, nil
	}
	return trace.Merge(sum, t)
}

// list lists the traces of an image, maxListed at most, in order of their digests.
func list(ctx context.Context, repo *image.Repository, img *image.Image) ([]image.Referrer, error) {
	found, err := repo.Referrers(ctx, img.ManifestDigest, ArtifactType)
	if err != nil {
		return nil, err
	}
	slices.SortFunc(found, func(a, b image.Referrer) int { return cmp.Compare(a.Digest, b.Digest) })
	return found[:min(len(found), maxListed)], nil
}

// fetched is one of those listed.
type fetched struct {
	digest string // of the artifact
	trace  *trace.Trace
	err    error // why it is of no use
}

// fetch fetches what was listed. It fails if the repository cannot be read.
func fetch(ctx context.Context, repo *image.Repository, img *image.Image, found []image.Referrer) ([]fetched, error) {
	var out []fetched
	blocks := 0
	for _, d := range found {
		t, err := fetchOne(ctx, repo, img, d.Descriptor)
		if err != nil && !useless(err) {
			return nil, err
		}
		if err == nil {
			if blocks += len(t.Blocks); blocks > maxAll {
				break // the rest another time
			}
		}
		out = append(out, fetched{d.Digest, t, err})
	}
	return out, nil
}

// useless tells the faults of a trace from those of the way to it.
func useless(err error) bool {
	return errors.Is(err, index.ErrCorrupt) || errors.Is(err, index.ErrUnsupported) || errors.Is(err, index.ErrLimit) ||
		errors.Is(err, image.ErrNotImage) || errors.Is(err, blob.ErrNotFound) || errors.Is(err, blob.ErrRange)
}

func fetchOne(ctx context.Context, repo *image.Repository, img *image.Image, d image.Descriptor) (*trace.Trace, error) {
	a, err := repo.Artifact(ctx, d, img.ManifestDigest)
	if err != nil {
		return nil, err
	}
	name := "trace " + a.Digest
	if a.Type != ArtifactType || len(a.Layers) != 1 || a.Layers[0].MediaType != MediaType {
		return nil, index.Errorf(index.ErrUnsupported, name, -1, "an artifact of type %.100q with %d layers, want %s and one of %s", a.Type, len(a.Layers), ArtifactType, MediaType)
	}
	if a.Layers[0].Size > maxStored {
		return nil, index.Errorf(index.ErrLimit, name, -1, "%d bytes, at most %d are read", a.Layers[0].Size, maxStored)
	}
	rc, err := repo.Blob(ctx, a.Layers[0])
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	stored, err := io.ReadAll(rc)
	if err != nil {
		return nil, err
	}
	t, err := decode(stored, name)
	if err == nil && t.Manifest != img.ManifestDigest {
		err = index.Errorf(index.ErrCorrupt, name, -1, "it is a trace of %.100q, want %s", t.Manifest, img.ManifestDigest)
	}
	return t, err
}

// decode reads what encode made.
func decode(stored []byte, name string) (*trace.Trace, error) {
	z, err := zstd.NewReader(bytes.NewReader(stored), zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(8<<20))
	if err != nil {
		return nil, err
	}
	defer z.Close()
	plain := &source{r: z}
	t, err := trace.Decode(plain, name)
	if plain.err != nil {
		return nil, index.Errorf(index.ErrCorrupt, name, -1, "zstd: %v", plain.err)
	}
	return t, err
}

// source keeps the error of a reader.
type source struct {
	r   io.Reader
	err error
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil && err != io.EOF {
		s.err = err
	}
	return n, err
}

func encode(t *trace.Trace) ([]byte, error) {
	var b bytes.Buffer
	z, err := zstd.NewWriter(&b, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedBetterCompression), zstd.WithWindowSize(4<<20))
	if err != nil {
		return nil, err
	}
	if err := errors.Join(t.Encode(z), z.Close()); err != nil {
		return nil, err
	}
	if b.Len() > maxStored {
		return nil, index.Errorf(index.ErrLimit, "trace", -1, "%d bytes compressed, at most %d are pushed", b.Len(), maxStored)
	}
	return b.Bytes(), nil
}
