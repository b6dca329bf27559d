package convert

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"

	"github.com/klauspost/compress/gzip"
	"golang.org/x/sync/errgroup"

	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/reader"
)

const (
	mediaManifest = "application/vnd.oci.image.manifest.v1+json"
	mediaConfig   = "application/vnd.oci.image.config.v1+json"
	mediaGzip     = "application/vnd.oci.image.layer.v1.tar+gzip"

	// nydusArtifact is how Nydus tools tell that an image is theirs.
	nydusArtifact = "application/vnd.nydus.image.manifest.v1+json"
)

// descriptor and manifest are the OCI JSON objects, fields in their usual order.
type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int64             `json:"size"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

type manifest struct {
	SchemaVersion int               `json:"schemaVersion"`
	MediaType     string            `json:"mediaType"`
	ArtifactType  string            `json:"artifactType,omitempty"`
	Config        descriptor        `json:"config"`
	Layers        []descriptor      `json:"layers"`
	Annotations   map[string]string `json:"annotations,omitempty"`
}

// push sends what the destination lacks, and the manifest last: a reference
// never points at an image that is not all there.
func (c *converter) push(ctx context.Context, boot *os.File) (*Result, error) {
	bootLayer, diffID, err := c.bootstrapLayer(boot)
	if err != nil {
		return nil, err
	}
	m := manifest{SchemaVersion: 2, MediaType: mediaManifest, ArtifactType: nydusArtifact, Annotations: c.img.Annotations}
	diffIDs := []string{}
	for _, b := range c.blobs {
		m.Layers = append(m.Layers, descriptor{
			MediaType: reader.NydusBlobMediaType, Digest: b.digest, Size: b.size,
			Annotations: map[string]string{reader.NydusBlob: "true"},
		})
		diffIDs = append(diffIDs, b.digest)
	}
	m.Layers = append(m.Layers, descriptor{
		MediaType: mediaGzip, Digest: bootLayer.digest, Size: bootLayer.size,
		Annotations: map[string]string{reader.NydusBootstrap: "true", reader.NydusFSVersion: "6"},
	})
	config, err := rewriteConfig(c.img.ConfigBytes, append(diffIDs, diffID))
	if err != nil {
		return nil, err
	}
	m.Config = descriptor{MediaType: mediaConfig, Digest: digestOf(config), Size: int64(len(config))}
	js, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}

	res := &Result{ManifestDigest: digestOf(js), Platform: c.img.Platform.String()}
	c.count(res)
	res.Blobs = make([]ResultBlob, len(c.blobs)+1)
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(4)
	for i, b := range append(c.blobs, bootLayer) {
		res.Bytes += b.size
		res.Blobs[i] = ResultBlob{Digest: b.digest, Size: b.size}
		g.Go(func() error {
			return c.dst.PushBlob(gctx, image.Descriptor{MediaType: m.Layers[i].MediaType, Digest: b.digest, Size: b.size},
				func() (io.ReadCloser, error) {
					res.Blobs[i].Pushed = true
					return io.NopCloser(&countReader{
						r:    io.NewSectionReader(b.file, 0, b.size),
						tell: func(n int64) { c.o.Progress(Event{Layer: i, What: "push", Done: n, Total: b.size}) },
					}), nil
				})
		})
	}
	g.Go(func() error {
		return c.dst.PushBlob(gctx, image.Descriptor{MediaType: mediaConfig, Digest: m.Config.Digest, Size: m.Config.Size},
			func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(config)), nil })
	})
	if err := g.Wait(); err != nil {
		return nil, fmt.Errorf("push: %w", err)
	}
	if _, err := c.dst.PushManifest(ctx, mediaManifest, js, c.dst.Ref().Tag()); err != nil {
		return nil, fmt.Errorf("push manifest: %w", err)
	}
	return res, nil
}

// bootstrapLayer wraps the bootstrap into a tar+gzip layer.
func (c *converter) bootstrapLayer(boot *os.File) (*blobFile, string, error) {
	st, err := boot.Stat()
	if err != nil {
		return nil, "", err
	}
	f, err := os.CreateTemp(c.tmp, "bootstrap-layer-")
	if err != nil {
		return nil, "", err
	}
	os.Remove(f.Name())
	sum, diff := sha256.New(), sha256.New()
	zw, err := gzip.NewWriterLevel(io.MultiWriter(f, sum), gzip.BestCompression)
	if err != nil {
		return nil, "", err
	}
	tw := tar.NewWriter(io.MultiWriter(zw, diff))
	for _, h := range []*tar.Header{
		{Name: "image/", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: reader.NydusBootstrapInside, Typeflag: tar.TypeReg, Mode: 0o644, Size: st.Size()},
	} {
		if err := tw.WriteHeader(h); err != nil {
			return nil, "", err
		}
	}
	if _, err := io.Copy(tw, io.NewSectionReader(boot, 0, st.Size())); err != nil {
		return nil, "", err
	}
	if err := tw.Close(); err != nil {
		return nil, "", err
	}
	if err := zw.Close(); err != nil {
		return nil, "", err
	}
	if st, err = f.Stat(); err != nil {
		return nil, "", err
	}
	return &blobFile{"sha256:" + hex.EncodeToString(sum.Sum(nil)), st.Size(), f}, "sha256:" + hex.EncodeToString(diff.Sum(nil)), nil
}

// rewriteConfig keeps all that an image's config says but its layers. The
// history would not fit the new layers, and so becomes one entry for each.
func rewriteConfig(config []byte, diffIDs []string) ([]byte, error) {
	var obj map[string]json.RawMessage
	if err := json.Unmarshal(config, &obj); err != nil {
		return nil, fmt.Errorf("image config: %w: %v", index.ErrCorrupt, err)
	}
	set := func(key string, v any) error {
		js, err := json.Marshal(v)
		obj[key] = js
		return err
	}
	type entry struct {
		CreatedBy string `json:"created_by"`
	}
	history := make([]entry, len(diffIDs))
	for i := range history {
		history[i].CreatedBy = "shale convert"
	}
	if err := set("rootfs", map[string]any{"type": "layers", "diff_ids": diffIDs}); err != nil {
		return nil, err
	}
	if err := set("history", history); err != nil {
		return nil, err
	}
	return json.Marshal(obj)
}

// count adds up what the image consists of.
func (c *converter) count(res *Result) {
	for _, d := range c.img.Layers {
		res.SourceBytes += d.Size
	}
	used := map[uint32]bool{}
	seen := map[*index.Inode]bool{}
	c.tree.Walk(func(_ string, ino *index.Inode) error {
		if !ino.IsRegular() || seen[ino] {
			return nil
		}
		seen[ino] = true
		res.Files++
		res.ContentBytes += ino.Size
		for _, e := range ino.Extents {
			used[e.Chunk] = true
		}
		return nil
	})
	res.Chunks = len(used)
}

func digestOf(p []byte) string {
	sum := sha256.Sum256(p)
	return "sha256:" + hex.EncodeToString(sum[:])
}
