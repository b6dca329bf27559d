// Package convert makes the form of an image that starts lazily: layers in,
// RAFS v6 out. It knows the formats on both sides and repositories to read
// from and push to; it knows no pool and no mount.
//
// Layers are read in parallel, each in a single pass: a goroutine walks the
// archive and cuts files into chunks, workers digest and compress them, and a
// third puts them, in order, into the layer's spool (layer.go). Then, layer by
// layer, what no lower layer has goes into the layer's blob (blobs.go). So the
// result depends on the input alone, not on how many worked on it.
package convert

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sync/errgroup"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/rafs"
)

// Options say how to convert. Zero values mean the defaults.
type Options struct {
	Platform   image.Platform // of the image to take from an index; default the node's
	ChunkSize  uint32         // default chunk.Size
	Compressor chunk.Codec    // none, or the default if Compress is false
	Compress   bool           // Compressor is set; else it is zstd
	Workers    int            // default: one for each processor
	Progress   func(Event)    // may be called from several goroutines
}

// Event is a step of a conversion.
type Event struct {
	Layer int    // position of the layer, or of the blob while pushing; -1: none
	What  string // "read", "verify", "push"
	Done  int64  // bytes
	Total int64  // bytes; 0 if not known
}

// Result is what came out.
type Result struct {
	ManifestDigest string       `json:"manifest_digest"`
	Platform       string       `json:"platform"`
	SourceBytes    int64        `json:"source_bytes"`  // compressed layers
	Bytes          int64        `json:"bytes"`         // blobs and bootstrap layer
	ContentBytes   int64        `json:"content_bytes"` // of all files of the image
	Files          int          `json:"files"`
	Chunks         int          `json:"chunks"` // that files use
	Blobs          []ResultBlob `json:"blobs"`
}

// ResultBlob is one object of the converted image.
type ResultBlob struct {
	Digest string `json:"digest"`
	Size   int64  `json:"size"`
	Pushed bool   `json:"pushed"` // false: it was there already
}

// Convert reads the image src stands for and pushes its converted form to dst.
// What it pushes it has read back and compared with what it read.
func Convert(ctx context.Context, src, dst *image.Repository, o Options) (*Result, error) {
	if o.ChunkSize == 0 {
		o.ChunkSize = chunk.Size
	}
	if !o.Compress {
		o.Compressor = chunk.Zstd
	}
	if o.Workers == 0 {
		o.Workers = runtime.GOMAXPROCS(0)
	}
	if o.Progress == nil {
		o.Progress = func(Event) {}
	}
	img, err := src.Resolve(ctx, o.Platform)
	if err != nil {
		return nil, err
	}
	tmp, err := os.MkdirTemp("", "shale-convert-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp)
	c := &converter{o: o, src: src, dst: dst, img: img, tmp: tmp, work: make(chan *job)}
	return c.run(ctx)
}

type converter struct {
	o        Options
	src, dst *image.Repository
	img      *image.Image
	tmp      string
	work     chan *job // to the workers

	tree  *index.Tree
	blobs []*blobFile
	infos []rafs.BlobInfo // parallel to tree.Blobs
}

func (c *converter) run(ctx context.Context) (*Result, error) {
	layers, err := c.readLayers(ctx)
	if err != nil {
		return nil, err
	}
	if err := c.assemble(layers); err != nil {
		return nil, err
	}
	boot, err := c.bootstrap()
	if err != nil {
		return nil, err
	}
	if err := c.verify(ctx, boot); err != nil {
		return nil, fmt.Errorf("the converted image does not read back as it was: %w", err)
	}
	return c.push(ctx, boot)
}

// readLayers reads all layers in parallel, with one set of workers for all.
func (c *converter) readLayers(ctx context.Context) ([]*layerSpool, error) {
	g, ctx := errgroup.WithContext(ctx)
	workers, wctx := errgroup.WithContext(ctx)
	for range c.o.Workers {
		workers.Go(func() error { return c.worker(wctx) })
	}
	spools := make([]*layerSpool, len(c.img.Layers))
	g.SetLimit(max(2, c.o.Workers))
	for i, d := range c.img.Layers {
		g.Go(func() (err error) {
			if spools[i], err = c.readLayer(ctx, i, d); err != nil {
				return fmt.Errorf("layer %d (%s): %w", i+1, d.Digest, err)
			}
			return nil
		})
	}
	err := g.Wait()
	close(c.work)
	return spools, errors.Join(err, workers.Wait())
}
