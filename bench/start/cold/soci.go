package cold

import (
	"bytes"
	"context"
	"fmt"
	"io"

	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index/soci/socitest"
	"github.com/shale-image/shale/reader"
)

// What soci does unless told otherwise, in bytes: how far apart checkpoints are, and
// how large a layer is at least that has a ztoc.
const (
	sociSpan = 4 << 20
	sociMin  = 10 << 20
)

// SOCI pushes a SOCI index of version 1 beside an image of the registry, as soci has
// it by default.
func (l *Lab) SOCI(ctx context.Context, name string) error {
	repo, err := open(ctx, l.Host()+"/"+name)
	if err != nil {
		return err
	}
	defer repo.Close()
	img, err := repo.Resolve(ctx, image.Platform{})
	if err != nil {
		return err
	}
	var ztocs []image.Descriptor
	for _, d := range img.Layers {
		if d.Size < sociMin {
			continue
		}
		body, err := repo.Blob(ctx, d)
		if err != nil {
			return err
		}
		p, err := io.ReadAll(body)
		body.Close()
		if err == nil {
			p, err = socitest.Build(p, sociSpan)
		}
		if err != nil {
			return fmt.Errorf("ztoc of layer %s: %w", d.Digest, err)
		}
		z := image.Descriptor{MediaType: reader.SOCIZtoc, Digest: reader.IndexDigest(p), Size: int64(len(p)), Annotations: map[string]string{reader.SOCILayer: d.Digest}}
		if err := repo.PushBlob(ctx, z, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(p)), nil }); err != nil {
			return err
		}
		ztocs = append(ztocs, z)
	}
	subject := image.Descriptor{MediaType: img.MediaType, Digest: img.ManifestDigest, Size: int64(len(img.ManifestBytes))}
	_, err = repo.PushArtifact(ctx, subject, reader.SOCIType1, ztocs, nil, func(image.Descriptor) bool { return true })
	return err
}
