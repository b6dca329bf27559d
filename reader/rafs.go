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
	if _, ok := Bootstrap(img); !ok {
		return nil, nil, fmt.Errorf("%s: not a Nydus image: %w", img.ManifestDigest, ErrNoIndex)
	}
	raw, err := Fetch(ctx, repo, img, Options{TempDir: tmp})
	if err != nil {
		return nil, nil, err
	}
	defer raw.Close()
	return raw.rafs()
}
