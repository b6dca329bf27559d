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
//	fleet.go  what lies there, and how a trace looks
//	fetch.go  from anybody, so bounded: all of them together
//	push.go   into a list that others change too
//
// It knows repositories and traces; it knows no node.
package fleet

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
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

	maxStored = 8 << 20   // bytes of one, compressed
	maxPlain  = 128 << 20 // bytes of JSON that are read of all of them
)

// Traces fetches the traces that lie beside an image and merges them. If there is
// none that can be used it is blob.ErrNotFound, and says what is wrong with those
// there are.
func Traces(ctx context.Context, repo *image.Repository, img *image.Image) (*trace.Trace, error) {
	found, err := list(ctx, repo, img)
	if err != nil {
		return nil, err
	}
	s := sum{manifest: img.ManifestDigest}
	if err := each(ctx, repo, img, found, s.add); err != nil {
		return nil, err
	}
	return s.trace()
}

// Stored is Traces for who leaves it to another to look into them: Merge does so.
// What is more than limit bytes is left out.
func Stored(ctx context.Context, repo *image.Repository, img *image.Image, limit int) (all [][]byte, err error) {
	found, err := list(ctx, repo, img)
	if err != nil {
		return nil, err
	}
	err = stored(ctx, repo, img, found, func(_ string, p []byte, err error) error {
		if err == nil && len(p) <= limit {
			limit -= len(p)
			all = append(all, p)
		}
		return nil
	})
	return all, err
}

// Merge merges what Stored has returned, of the image with a manifest.
func Merge(manifest string, all [][]byte) (*trace.Trace, error) {
	s, left := sum{manifest: manifest}, int64(maxPlain)
	for i, p := range all {
		name := fmt.Sprintf("trace %d", i)
		t, err := decode(p, manifest, name, &left)
		if err := s.add(name, t, err); err != nil {
			return nil, err
		}
		if left < 0 {
			break
		}
	}
	return s.trace()
}

// sum is a merged trace that grows.
type sum struct {
	manifest string
	all      *trace.Trace
	bad      error // what is wrong with the first that is of no use
}

func (s *sum) add(_ string, t *trace.Trace, err error) error {
	switch {
	case err != nil:
		s.bad = cmp.Or(s.bad, err)
		return nil
	case s.all == nil:
		s.all = t
		return nil
	}
	s.all, err = trace.Merge(s.all, t)
	return err
}

func (s *sum) trace() (*trace.Trace, error) {
	switch {
	case s.all != nil:
		return s.all, nil
	case s.bad != nil:
		return nil, fmt.Errorf("no trace of %s: %w: %w", s.manifest, blob.ErrNotFound, s.bad)
	}
	return nil, fmt.Errorf("no trace lies beside %s: %w", s.manifest, blob.ErrNotFound)
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

// useless tells the faults of a trace from those of the way to it.
func useless(err error) bool {
	return errors.Is(err, index.ErrCorrupt) || errors.Is(err, index.ErrUnsupported) || errors.Is(err, index.ErrLimit) ||
		errors.Is(err, image.ErrNotImage) || errors.Is(err, blob.ErrNotFound) || errors.Is(err, blob.ErrRange)
}

// encode compresses a trace: as much of it as may be pushed.
func encode(t *trace.Trace) ([]byte, error) {
	var b bytes.Buffer
	z, err := zstd.NewWriter(&b, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedBetterCompression), zstd.WithWindowSize(4<<20))
	if err != nil {
		return nil, err
	}
	if err := errors.Join(t.Encode(z), z.Close()); err != nil {
		return nil, err
	}
	switch {
	case b.Len() <= maxStored:
		return b.Bytes(), nil
	case len(t.Blocks) == 0:
		return nil, index.Errorf(index.ErrLimit, "trace", -1, "%d bytes compressed, at most %d are pushed", b.Len(), maxStored)
	}
	return encode(t.First(len(t.Blocks) * 3 / 4))
}
