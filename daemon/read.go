package daemon

import (
	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/retry"
	"github.com/shale-image/shale/image"
)

// source is where a mount's bytes come from: the image's own repository, asked
// again when it stumbles.
func source(repo *image.Repository) blob.Source {
	return retry.New(repo.Blobs(), retry.Policy{})
}
