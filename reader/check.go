package reader

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"

	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/layer"
)

// CheckLayers reads the layers of an image, one after the other, and compares what they
// unpack to with the DiffIDs of its config: what can be known about layers that were
// used by another cut than ours. A difference is index.ErrCorrupt. Of the Job it takes
// all but Keep and Places.
func CheckLayers(ctx context.Context, j Job) error {
	if len(j.DiffIDs) != len(j.Layers) {
		return index.Errorf(index.ErrCorrupt, j.Manifest, -1, "%d DiffIDs in the config for %d layers", len(j.DiffIDs), len(j.Layers))
	}
	for n := range j.Layers {
		if err := j.check(ctx, n); err != nil {
			return err
		}
	}
	return nil
}

func (j *Job) check(ctx context.Context, n int) (err error) {
	if err := ctx.Err(); err != nil {
		return err
	}
	r, err := j.Open(ctx, n)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	name := "layer " + j.Layers[n].Digest
	z, _, err := layer.Decompress(r, j.Limits)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	defer z.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, z); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if got := fmt.Sprintf("sha256:%x", sum.Sum(nil)); got != j.DiffIDs[n] {
		return index.Errorf(index.ErrCorrupt, name, -1, "it unpacks to %s, the image's config says %s", got, j.DiffIDs[n])
	}
	return nil
}
