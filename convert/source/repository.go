package source

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/reader"
)

// layerTypes are the media types of layers that are read.
var layerTypes = []string{
	"application/vnd.oci.image.layer.v1.tar",
	"application/vnd.oci.image.layer.v1.tar+gzip",
	"application/vnd.oci.image.layer.v1.tar+zstd",
	"application/vnd.docker.image.rootfs.diff.tar",
	"application/vnd.docker.image.rootfs.diff.tar.gzip",
	"application/vnd.docker.image.rootfs.diff.tar.zstd",
}

// ErrConverted says that an image is a converted one already.
var ErrConverted = fmt.Errorf("the image is converted already: %w", index.ErrUnsupported)

// Repository returns the image that the repository's reference stands for on a
// platform. Errors are those of image.Repository.Resolve; a layer that cannot
// be read is index.ErrUnsupported, by name.
func Repository(ctx context.Context, repo *image.Repository, platform image.Platform) (*Image, error) {
	img, err := repo.ResolveManifest(ctx, platform)
	if err != nil {
		return nil, err
	}
	return load(ctx, repo, img)
}

// Platforms returns the images of all platforms of the index that the
// repository's reference stands for, in the order of the index, or the one image
// if it is none. Attestations and images that are converted already are left
// out.
func Platforms(ctx context.Context, repo *image.Repository) ([]*Image, error) {
	m, err := repo.Manifest(ctx, "")
	if err != nil {
		return nil, err
	}
	var doc struct {
		Manifests []struct {
			image.Descriptor
			Platform *struct {
				image.Platform
				Features []string `json:"os.features"`
			} `json:"platform"`
		} `json:"manifests"`
	}
	if err := json.Unmarshal(m.Bytes, &doc); err != nil {
		return nil, index.Errorf(index.ErrCorrupt, repo.Ref().String(), -1, "manifest: %v", err)
	}
	if doc.Manifests == nil {
		img, err := Repository(ctx, repo.At(m.Digest), image.Platform{})
		var wrong *image.PlatformError
		if errors.As(err, &wrong) && len(wrong.Available) == 1 {
			img, err = Repository(ctx, repo.At(m.Digest), wrong.Available[0])
		}
		if err != nil {
			return nil, err
		}
		return []*Image{img}, nil
	}
	var all []*Image
	seen := map[string]bool{}
	for _, e := range doc.Manifests {
		if e.Platform == nil || e.Platform.OS == "unknown" || seen[e.Digest] ||
			slices.Contains(e.Platform.Features, "nydus.remoteimage.v1") {
			continue
		}
		seen[e.Digest] = true
		at := repo.At(e.Digest)
		img, err := at.ResolveManifest(ctx, e.Platform.Platform)
		if err != nil {
			return nil, err
		}
		img.Platform = e.Platform.Platform // which the configuration may not tell in full
		one, err := load(ctx, at, img)
		if err != nil {
			return nil, fmt.Errorf("%v: %w", img.Platform, err)
		}
		one.Platform = e.Platform.Platform
		all = append(all, one)
	}
	if len(all) == 0 {
		return nil, &image.NotImageError{Name: repo.Ref().String(), What: "index without images for a platform"}
	}
	return all, nil
}

func load(ctx context.Context, repo *image.Repository, img *image.Image) (*Image, error) {
	if boot, ok := reader.Bootstrap(img); ok {
		return nil, fmt.Errorf("%s: %w (layer %s is its bootstrap)", img.Ref, ErrConverted, boot.Digest)
	}
	for i, d := range img.Layers {
		if !slices.Contains(layerTypes, d.MediaType) {
			what := "of type"
			if strings.Contains(d.MediaType, "nondistributable") || strings.Contains(d.MediaType, "foreign") {
				what = "that its publisher does not let registries pass on, of type"
			}
			return nil, index.Errorf(index.ErrUnsupported, fmt.Sprintf("%s: layer %d (%s)", img.Ref, i+1, d.Digest), -1, "a layer %s %.200q", what, d.MediaType)
		}
	}
	if err := repo.LoadConfig(ctx, img); err != nil {
		return nil, err
	}
	if n := len(img.Config.DiffIDs); n != len(img.Layers) {
		return nil, index.Errorf(index.ErrCorrupt, "config "+img.ConfigBlob.Digest, -1, "%d diff_ids for %d layers", n, len(img.Layers))
	}
	out := &Image{Name: img.Ref.String(), Config: img.ConfigBytes, Platform: img.Platform, Annotations: img.Annotations}
	for i, d := range img.Layers {
		name := fmt.Sprintf("layer %d (%s)", i+1, d.Digest)
		out.Layers = append(out.Layers, archiveLayer(name, d.Size, img.Config.DiffIDs[i], func(ctx context.Context) (io.ReadCloser, error) {
			return repo.Blob(ctx, d)
		}))
	}
	return out, nil
}
