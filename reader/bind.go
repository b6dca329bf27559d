package reader

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"

	"golang.org/x/sync/errgroup"

	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/trust"
)

// ociTypes are the names that a manifest with annotations has for what Docker's has.
var ociTypes = map[string]string{
	image.MediaTypeDockerConfig:                         image.MediaTypeConfig,
	"application/vnd.docker.image.rootfs.diff.tar":      "application/vnd.oci.image.layer.v1.tar",
	"application/vnd.docker.image.rootfs.diff.tar.gzip": "application/vnd.oci.image.layer.v1.tar+gzip",
	"application/vnd.docker.image.rootfs.diff.tar.zstd": "application/vnd.oci.image.layer.v1.tar+zstd",
}

// Bind pushes to another reference, with its tag, what is the same image but for a
// manifest that names the digest of its index (BoundIndex), and the index beside it, as
// Push does. Who believes the manifest believes the index then. Layers are copied if the
// repository is another one. It returns the digest of the manifest and that of the
// artifact. The same image and index give the same manifest.
func Bind(ctx context.Context, from *image.Repository, img *image.Image, to *image.Repository, m *Made, signers ...*trust.Signer) (manifest, artifact string, err error) {
	p, err := boundManifest(img, IndexDigest(m.Encoded))
	if err != nil {
		return "", "", err
	}
	var mount []string
	if r := from.Ref(); r.Registry() != "" && r.Registry() == to.Ref().Registry() && r.Repository() != to.Ref().Repository() {
		mount = []string{r.Repository()}
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(Parallel)
	for _, l := range img.Layers {
		g.Go(func() error {
			return to.PushBlob(gctx, l, func() (io.ReadCloser, error) { return from.Blob(gctx, l) }, mount...)
		})
	}
	g.Go(func() error {
		return to.PushBlob(gctx, img.ConfigBlob, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(img.ConfigBytes)), nil }, mount...)
	})
	if err := g.Wait(); err != nil {
		return "", "", err
	}
	d, err := to.PushManifest(ctx, image.MediaTypeManifest, p, "")
	if err != nil {
		return "", "", err
	}
	bound := &image.Image{ManifestDigest: d.Digest, MediaType: d.MediaType, ManifestBytes: p}
	if artifact, err = Push(ctx, to, bound, m, signers...); err != nil {
		return "", "", err
	}
	_, err = to.PushManifest(ctx, image.MediaTypeManifest, p, to.Ref().Tag()) // last: who finds it finds the index
	return d.Digest, artifact, err
}

// boundManifest is the manifest of an image with the digest of an index, as OCI has it.
func boundManifest(img *image.Image, digest string) ([]byte, error) {
	bad := func(format string, args ...any) ([]byte, error) {
		return nil, index.Errorf(index.ErrUnsupported, "manifest "+img.ManifestDigest, -1, format, args...)
	}
	var doc map[string]any
	d := json.NewDecoder(bytes.NewReader(img.ManifestBytes))
	d.UseNumber()
	if err := d.Decode(&doc); err != nil {
		return bad("%v", err)
	}
	doc["mediaType"] = image.MediaTypeManifest
	layers, _ := doc["layers"].([]any)
	for _, x := range append([]any{doc["config"]}, layers...) {
		e, ok := x.(map[string]any)
		if !ok {
			return bad("a descriptor that is a %T", x)
		}
		kind, _ := e["mediaType"].(string)
		if oci, ok := ociTypes[kind]; ok {
			e["mediaType"] = oci
		} else if img.MediaType != image.MediaTypeManifest {
			return bad("a %.100q, for which OCI has no name", kind)
		}
	}
	annotations, ok := doc["annotations"].(map[string]any)
	if !ok && doc["annotations"] != nil {
		return bad("annotations that are a %T", doc["annotations"])
	}
	if annotations == nil {
		annotations = map[string]any{}
	}
	annotations[BoundIndex] = digest
	doc["annotations"] = annotations
	p, err := json.Marshal(doc)
	if err != nil {
		return nil, fmt.Errorf("manifest %s: %w", img.ManifestDigest, err)
	}
	return p, nil
}
