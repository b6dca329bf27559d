package convert

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/reader"
)

const (
	mediaGzip = "application/vnd.oci.image.layer.v1.tar+gzip"

	// nydusArtifact is how Nydus tools tell that an image is theirs.
	nydusArtifact = "application/vnd.nydus.image.manifest.v1+json"
)

// descriptor, manifest and imageIndex are the OCI JSON objects, fields in their
// usual order.
type descriptor struct {
	MediaType    string            `json:"mediaType"`
	ArtifactType string            `json:"artifactType,omitempty"`
	Digest       string            `json:"digest"`
	Size         int64             `json:"size"`
	Annotations  map[string]string `json:"annotations,omitempty"`
	Platform     *image.Platform   `json:"platform,omitempty"`
}

type manifest struct {
	SchemaVersion int               `json:"schemaVersion"`
	MediaType     string            `json:"mediaType"`
	ArtifactType  string            `json:"artifactType,omitempty"`
	Config        descriptor        `json:"config"`
	Layers        []descriptor      `json:"layers"`
	Annotations   map[string]string `json:"annotations,omitempty"`
}

type imageIndex struct {
	SchemaVersion int          `json:"schemaVersion"`
	MediaType     string       `json:"mediaType"`
	Manifests     []descriptor `json:"manifests"`
}

// push sends what the destination lacks, and the manifest last: a reference
// never points at an image that is not all there.
func (c *converter) push(ctx context.Context, boot *bootLayer, tag string) (*Result, descriptor, error) {
	m := manifest{SchemaVersion: 2, MediaType: image.MediaTypeManifest, ArtifactType: nydusArtifact, Annotations: c.img.Annotations}
	var diffIDs []string
	for _, b := range c.blobs {
		m.Layers = append(m.Layers, descriptor{
			MediaType: reader.NydusBlobMediaType, Digest: b.digest, Size: b.size,
			Annotations: map[string]string{reader.NydusBlob: "true"},
		})
		diffIDs = append(diffIDs, b.digest)
	}
	m.Layers = append(m.Layers, descriptor{
		MediaType: mediaGzip, Digest: boot.digest, Size: boot.size,
		Annotations: map[string]string{reader.NydusBootstrap: "true", reader.NydusFSVersion: "6"},
	})
	config, err := rewriteConfig(c.img.Config, append(diffIDs, boot.diffID))
	if err != nil {
		return nil, descriptor{}, err
	}
	m.Config = descriptor{MediaType: image.MediaTypeConfig, Digest: digestOf(config), Size: int64(len(config))}
	js, err := json.Marshal(m)
	if err != nil {
		return nil, descriptor{}, err
	}
	res := c.result(m)
	if err := c.pushBlobs(ctx, m, config, boot, res); err != nil {
		return nil, descriptor{}, fmt.Errorf("push: %w", err)
	}
	d, err := c.dst.PushManifest(ctx, image.MediaTypeManifest, js, tag)
	if err != nil {
		return nil, descriptor{}, err
	}
	res.ManifestDigest = d.Digest
	return res, descriptor{MediaType: d.MediaType, ArtifactType: nydusArtifact, Digest: d.Digest, Size: d.Size}, nil
}

// pushBlobs sends all that the manifest names.
func (c *converter) pushBlobs(ctx context.Context, m manifest, config []byte, boot *bootLayer, res *Result) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(4)
	for i, l := range m.Layers {
		g.Go(func() error {
			var from io.ReaderAt = boot.file
			var mount []string
			if i < len(c.blobs) {
				b := c.blobs[i]
				from = b
				if b.dict {
					from, mount = nil, c.mountFrom()
				}
			}
			var sent atomic.Bool // open may be called again
			d := image.Descriptor{MediaType: l.MediaType, Digest: l.Digest, Size: l.Size}
			err := c.dst.PushBlob(ctx, d, func() (io.ReadCloser, error) {
				sent.Store(true)
				var r io.ReadCloser
				if from == nil {
					var err error
					if r, err = c.o.Dict.repo.Blob(ctx, d); err != nil {
						return nil, err
					}
				} else {
					r = io.NopCloser(io.NewSectionReader(from, 0, l.Size))
				}
				return &countReader{ReadCloser: r, tell: func(n int64) {
					c.o.Progress(Event{Layer: i, What: "push", Done: n, Total: l.Size})
				}}, nil
			}, mount...)
			res.Blobs[i].Pushed = sent.Load()
			return err
		})
	}
	g.Go(func() error {
		return c.dst.PushBlob(ctx, image.Descriptor{MediaType: image.MediaTypeConfig, Digest: m.Config.Digest, Size: m.Config.Size},
			func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(config)), nil })
	})
	return g.Wait()
}

// mountFrom returns where the registry has the dictionary's blobs, if it does.
func (c *converter) mountFrom() []string {
	if from := c.o.Dict.repo.Ref(); from.Registry() != "" && from.Registry() == c.dst.Ref().Registry() {
		return []string{from.Repository()}
	}
	return nil
}

// countReader tells of progress, not more often than each MiB and at the end.
type countReader struct {
	io.ReadCloser
	tell    func(int64)
	n, told int64
}

func (c *countReader) Read(p []byte) (int, error) {
	n, err := c.ReadCloser.Read(p)
	if c.n += int64(n); c.n-c.told >= 1<<20 || err == io.EOF {
		c.told = c.n
		c.tell(c.n)
	}
	return n, err
}

// pushIndex pushes an index of manifests that are there.
func pushIndex(ctx context.Context, dst *image.Repository, entries []descriptor) (string, error) {
	js, err := json.Marshal(imageIndex{SchemaVersion: 2, MediaType: image.MediaTypeIndex, Manifests: entries})
	if err != nil {
		return "", err
	}
	d, err := dst.PushManifest(ctx, image.MediaTypeIndex, js, dst.Ref().Tag())
	return d.Digest, err
}

// rewriteConfig keeps all that an image's config says but its layers. The
// history would not fit the new layers, and so becomes one entry for each.
func rewriteConfig(config []byte, diffIDs []string) ([]byte, error) {
	var obj map[string]json.RawMessage
	if err := json.Unmarshal(config, &obj); err != nil || obj == nil {
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

// result adds up what the image consists of.
func (c *converter) result(m manifest) *Result {
	res := &Result{Platform: c.img.Platform.String()}
	for _, l := range c.img.Layers {
		res.SourceBytes += l.Size
	}
	for _, l := range m.Layers {
		res.Bytes += l.Size
		res.Blobs = append(res.Blobs, ResultBlob{Digest: l.Digest, Size: l.Size})
	}
	for _, n := range c.byPlace(func(_ uint32, used bool) bool { return used }) {
		res.Chunks++
		if c.blobs[c.tree.Chunks[n].Blob].dict {
			res.DictChunks++
		}
	}
	seen := map[*index.Inode]bool{}
	c.tree.Walk(func(_ string, ino *index.Inode) error {
		if ino.IsRegular() && !seen[ino] {
			seen[ino] = true
			res.Files++
			res.ContentBytes += ino.Size
		}
		return nil
	})
	return res
}

func digestOf(p []byte) string { return fmt.Sprintf("sha256:%x", sha256.Sum256(p)) }
