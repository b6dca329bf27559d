package fleet

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/trace"
)

// tries is how often a list that others make too long meanwhile is made shorter.
const tries = 4

// Push pushes a trace of an image beside it and returns the digest of the
// artifact. previous, if not empty, is what an earlier Push of the same node
// returned: t has all that it had, and takes its place.
func Push(ctx context.Context, repo *image.Repository, img *image.Image, t *trace.Trace, previous string) (digest string, err error) {
	if t.Manifest != img.ManifestDigest {
		return "", fmt.Errorf("push trace: %w: %s and %s", trace.ErrMismatch, t.Manifest, img.ManifestDigest)
	}
	replaced := map[string]bool{previous: true}
	for range tries {
		found, err := list(ctx, repo, img)
		if err != nil {
			return digest, err
		}
		// Some registries list also what was replaced.
		others := slices.DeleteFunc(slices.Clone(found), func(d image.Referrer) bool { return replaced[d.Digest] || d.Digest == digest })
		switch {
		case digest != "" && len(others) < Max:
			return digest, nil
		case len(found) >= maxListed:
			return digest, index.Errorf(index.ErrLimit, "push trace", -1, "%d or more lie beside %s, as if the registry let nobody remove any", len(found), img.ManifestDigest)
		case len(others) >= Max:
			if t, err = merge(ctx, repo, img, t, others, replaced); err != nil {
				return digest, err
			}
		}
		if digest != "" {
			replaced[digest] = true
		}
		if digest, err = push(ctx, repo, img, t, replaced); err != nil {
			return "", err
		}
		delete(replaced, digest)
	}
	return digest, nil
}

// merge merges a trace with all that lie beside the image, and notes which the
// result takes the place of.
func merge(ctx context.Context, repo *image.Repository, img *image.Image, t *trace.Trace, found []image.Referrer, replaced map[string]bool) (*trace.Trace, error) {
	left := len(found)
	err := each(ctx, repo, img, found, func(digest string, other *trace.Trace, err error) error {
		switch {
		case err == nil:
			if t, err = trace.Merge(t, other); err != nil {
				return err
			}
		case errors.Is(err, index.ErrUnsupported): // of a later program, which knows what it is for
			return nil
		}
		replaced[digest] = true
		left--
		return nil
	})
	if err != nil {
		return nil, err
	}
	if left >= Max {
		return nil, index.Errorf(index.ErrLimit, "push trace", -1, "%d that cannot be merged lie beside %s", left, img.ManifestDigest)
	}
	return t, nil
}

func push(ctx context.Context, repo *image.Repository, img *image.Image, t *trace.Trace, replaced map[string]bool) (string, error) {
	p, err := encode(t)
	if err != nil {
		return "", err
	}
	d := image.Descriptor{MediaType: MediaType, Digest: fmt.Sprintf("sha256:%x", sha256.Sum256(p)), Size: int64(len(p))}
	if err := repo.PushBlob(ctx, d, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(p)), nil }); err != nil {
		return "", err
	}
	subject := image.Descriptor{MediaType: img.MediaType, Digest: img.ManifestDigest, Size: int64(len(img.ManifestBytes))}
	return repo.PushArtifact(ctx, subject, ArtifactType, []image.Descriptor{d}, nil, func(d image.Descriptor) bool { return replaced[d.Digest] })
}
