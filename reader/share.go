package reader

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"

	"github.com/shale-image/shale/image"
)

// Share pushes an index that this node has made (LocalIndex) beside its image, and its
// side, which is read from side, and returns the digest of the artifact. If an index lies
// there already, of whomever, nothing is pushed, and the digest is that of the first: it
// may be signed, or of a later version. What has rotted on disk is not pushed either: it
// is ErrCorrupt.
func (r *Raw) Share(ctx context.Context, repo *image.Repository, img *image.Image, side io.ReaderAt) (digest string, pushed bool, err error) {
	found, err := repo.Referrers(ctx, img.ManifestDigest, ArtifactType)
	if err != nil {
		return "", false, err
	}
	for _, d := range found {
		if d.Type == ArtifactType {
			return d.Digest, false, nil
		}
	}
	if _, err := r.Tree(); err != nil {
		return "", false, err
	}
	sum := sha256.New()
	if _, err := io.Copy(sum, io.NewSectionReader(r.File, 0, r.Size)); err != nil {
		return "", false, err
	}
	layers, files := []image.Descriptor{{MediaType: IndexMediaType, Digest: fmt.Sprintf("sha256:%x", sum.Sum(nil)), Size: r.Size}}, []io.ReaderAt{r.File}
	if r.Side.Size > 0 {
		d := r.Side
		d.MediaType = SideMediaType
		layers, files = append(layers, d), append(files, side)
	}
	digest, err = pushIndex(ctx, repo, img, layers, files, nil, false)
	return digest, err == nil, err
}
