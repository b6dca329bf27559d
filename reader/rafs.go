package reader

import (
	"context"
	"fmt"

	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/rafs"
)

// RAFS is Tree for tools that also look at the bootstrap's tables. Of the
// rafs.Image only what is in memory may be used (Blobs, Flags, ...): its file
// is closed.
func RAFS(ctx context.Context, repo *image.Repository, img *image.Image, tmp string) (*rafs.Image, *index.Tree, error) {
	boot, ok := Bootstrap(img)
	if !ok {
		return nil, nil, fmt.Errorf("%s: %w", img.ManifestDigest, ErrNotConverted)
	}
	if v := boot.Annotations[NydusFSVersion]; v != "" && v != "6" {
		return nil, nil, fmt.Errorf("%s: RAFS version %s: %w", boot.Digest, v, index.ErrUnsupported)
	}
	f, size, err := spoolBootstrap(ctx, repo, boot, tmp)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	im, err := rafs.Open(f, size, "bootstrap layer "+boot.Digest)
	if err != nil {
		return nil, nil, err
	}
	t, err := im.Tree()
	if err != nil {
		return nil, nil, err
	}
	sizes := map[string]int64{}
	for _, l := range img.Layers {
		sizes[l.Digest] = l.Size
	}
	for i := range t.Blobs {
		size, ok := sizes[t.Blobs[i].Digest]
		if !ok {
			return nil, nil, index.Errorf(index.ErrCorrupt, "bootstrap layer "+boot.Digest, -1, "its blob %s is not a layer of the manifest", im.Blobs()[i].ID)
		}
		t.Blobs[i].Size = size
	}
	return im, t, nil
}
