// Package convert makes the form of an image that starts lazily: layers in,
// RAFS v6 out. It knows the formats on both sides and repositories to push to;
// where layers come from is package source's. It knows no pool and no mount.
//
// Layers are read in parallel, each in a single pass: a goroutine walks the
// entries and cuts files into chunks, workers that all layers share digest them
// and compress some of them together, a batch, and a third puts batches, in
// order, into the layer's spool (layer.go). What no lower layer has becomes the
// layer's blob: not another file, but the ranges of the spool that stay, and a
// tail (blob.go). So what comes out
// depends on the input alone, not on how many worked on it, and a layer's blob
// on this layer and those below it, so that images share the blobs of a base.
//
// Memory is bounded by the batches on the way (job.go); on disk, in nameless
// files, a conversion takes as much as it makes.
package convert

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/convert/source"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/rafs"
)

// Options say how to convert. Zero values mean the defaults.
type Options struct {
	Platform   image.Platform // of the image to take from an index; default the node's
	ChunkSize  uint32         // default chunk.Size
	BatchSize  uint32         // bytes of small files that are compressed together, default DefaultBatchSize; 1: each file alone
	Compressor chunk.Codec    // none, or the default if Compress is false
	Compress   bool           // Compressor is set; else it is zstd
	Workers    int            // default: one for each processor
	Dict       *Dict          // chunks to refer to
	Prefetch   []string       // paths to be read first, directories with all below them
	TempDir    string         // default os.TempDir; nothing is left in it
	Progress   func(Event)    // may be called from several goroutines

	damage func(*layerBlob) // for tests: called with the blobs before verification
}

// DefaultBatchSize is a compromise: what is compressed together is fetched
// together. docs/BENCHMARKS.md has what others cost.
const DefaultBatchSize = 256 << 10

// Event is a step of a conversion.
type Event struct {
	Platform string // if several are converted
	Layer    int    // position of the layer, or of the blob while pushing; -1: none
	What     string // "read", "verify", "push"
	Done     int64  // bytes
	Total    int64  // bytes; 0 if not known
}

// Result is what came out.
type Result struct {
	ManifestDigest string       `json:"manifest_digest"` // of an index if there are Platforms
	Platform       string       `json:"platform,omitempty"`
	SourceBytes    int64        `json:"source_bytes"`  // of the layers as they were read
	Bytes          int64        `json:"bytes"`         // of blobs and bootstrap layer
	ContentBytes   int64        `json:"content_bytes"` // of all files of the image
	Files          int          `json:"files"`
	Chunks         int          `json:"chunks"`      // that files use
	DictChunks     int          `json:"dict_chunks"` // of these, chunks of the dictionary
	Blobs          []ResultBlob `json:"blobs,omitempty"`
	Platforms      []*Result    `json:"platforms,omitempty"` // of an image for several
}

// ResultBlob is one object of the converted image.
type ResultBlob struct {
	Digest string `json:"digest"`
	Size   int64  `json:"size"`
	Pushed bool   `json:"pushed"` // false: it was there already
}

// ErrSame says that the converted image would take the place of its source.
var ErrSame = errors.New("source and destination are the same: the original would lose its name")

// Convert reads the image src stands for and pushes its converted form to dst.
// What it pushes it has read back and compared with what it read.
func Convert(ctx context.Context, src, dst *image.Repository, o Options) (*Result, error) {
	if err := CheckRefs(src.Ref(), dst.Ref()); err != nil {
		return nil, err
	}
	img, err := source.Repository(ctx, src, o.Platform)
	if err != nil {
		return nil, err
	}
	return Image(ctx, img, dst, o)
}

// CheckRefs tells, with ErrSame, that dst would take the name of src away.
func CheckRefs(src, dst image.Ref) error {
	if src.Digest() == "" && src.Registry() == dst.Registry() && src.Repository() == dst.Repository() && src.Tag() == dst.Tag() &&
		filepath.Clean(src.Dir()) == filepath.Clean(dst.Dir()) {
		return fmt.Errorf("%s: %w", dst, ErrSame)
	}
	return nil
}

// Image converts one image.
func Image(ctx context.Context, img *source.Image, dst *image.Repository, o Options) (*Result, error) {
	res, _, err := convertOne(ctx, img, dst, dst.Ref().Tag(), o)
	return res, err
}

// Images converts the images of several platforms, one after the other, and
// pushes an index of them.
func Images(ctx context.Context, all []*source.Image, dst *image.Repository, o Options) (*Result, error) {
	sum := &Result{}
	var entries []descriptor
	progress := o.Progress
	for _, img := range all {
		if progress != nil {
			o.Progress = func(e Event) {
				e.Platform = img.Platform.String()
				progress(e)
			}
		}
		res, d, err := convertOne(ctx, img, dst, "", o)
		if err != nil {
			return nil, fmt.Errorf("%v: %w", img.Platform, err)
		}
		d.Platform = &img.Platform
		entries = append(entries, d)
		sum.add(res)
	}
	digest, err := pushIndex(ctx, dst, entries)
	sum.ManifestDigest = digest
	return sum, err
}

func (r *Result) add(one *Result) {
	r.Platforms = append(r.Platforms, one)
	r.SourceBytes += one.SourceBytes
	r.Bytes += one.Bytes
	r.ContentBytes += one.ContentBytes
	r.Files += one.Files
	r.Chunks += one.Chunks
	r.DictChunks += one.DictChunks
}

type converter struct {
	o    Options
	img  *source.Image
	dst  *image.Repository
	pool *pool
	seen seen

	files []*os.File // to be closed
	tree  *index.Tree
	blobs []*layerBlob    // parallel to tree.Blobs
	infos []rafs.BlobInfo // parallel to tree.Blobs
}

func convertOne(ctx context.Context, img *source.Image, dst *image.Repository, tag string, o Options) (*Result, descriptor, error) {
	if o.ChunkSize == 0 {
		o.ChunkSize = chunk.Size
	}
	if o.BatchSize == 0 {
		o.BatchSize = DefaultBatchSize
	}
	o.BatchSize = min(o.BatchSize, rafs.MaxChunkSize)
	if !o.Compress {
		o.Compressor = chunk.Zstd
	}
	if o.Workers <= 0 {
		o.Workers = runtime.GOMAXPROCS(0)
	}
	if o.TempDir == "" {
		o.TempDir = os.TempDir()
	}
	if o.Progress == nil {
		o.Progress = func(Event) {}
	}
	if err := o.Dict.check(o.ChunkSize); err != nil {
		return nil, descriptor{}, err
	}
	c := &converter{o: o, img: img, dst: dst}
	defer func() {
		for _, f := range c.files {
			f.Close()
		}
	}()
	layers, err := c.readLayers(ctx)
	if err != nil {
		return nil, descriptor{}, err
	}
	if err := c.assemble(layers); err != nil {
		return nil, descriptor{}, err
	}
	boot, err := c.bootstrap(ctx)
	if err != nil {
		return nil, descriptor{}, fmt.Errorf("the converted image does not read back as it was: %w", err)
	}
	return c.push(ctx, boot, tag)
}

// scratch makes a file without a name, so that nothing has to be removed.
func (c *converter) scratch() (*os.File, error) {
	fd, err := unix.Open(c.o.TempDir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	var f *os.File
	if err == nil {
		f = os.NewFile(uintptr(fd), filepath.Join(c.o.TempDir, "(unnamed)"))
	} else { // a file system that cannot
		if f, err = os.CreateTemp(c.o.TempDir, "shale-convert-"); err != nil {
			return nil, err
		}
		os.Remove(f.Name())
	}
	c.files = append(c.files, f)
	return f, nil
}
