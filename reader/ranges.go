package reader

import (
	"context"
	"errors"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/image"
)

// ErrNoRanges says why no image of a registry starts lazily.
var ErrNoRanges = errors.New("the registry does not serve parts of objects")

// HasRanges tells whether a registry serves parts of an image's layers. It is
// believed to unless it says otherwise.
func HasRanges(ctx context.Context, repo *image.Repository, img *image.Image) bool {
	for _, l := range img.Layers {
		if l.Size > 4<<20 { // of less it does not matter
			r, err := repo.Blobs().Range(ctx, l.Ref(), l.Size-1, 1)
			if err == nil {
				r.Close()
			}
			return !errors.Is(err, blob.ErrRange)
		}
	}
	return true
}
