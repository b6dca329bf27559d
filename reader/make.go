package reader

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"sort"
	"strings"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/artifact"
	"github.com/shale-image/shale/index/scan"
)

// Parallel is how many layers are read at once: each has a decompressor, and a
// zstd layer may want up to 128 MiB for its own.
const Parallel = 4

// Job is an image whose index is to be made.
type Job struct {
	Manifest string             // digest of the image's
	Layers   []image.Descriptor // lowest first
	DiffIDs  []string           // of the layers, from the image's config

	// Open opens layer n as it is stored, at most Parallel of them at once and
	// in order. Its bytes need not be verified: DiffIDs are.
	Open func(ctx context.Context, n int) (io.ReadCloser, error) `json:"-"`

	// Keep is scan.Options.Keep.
	Keep func(chunk.Digest, []byte) error `json:"-"`

	// Cut is scan.Options.Cut.
	Cut uint32 `json:"cut,omitempty"`

	// Places has what was made remember where in the layers all content lies, for
	// Identify.
	Places bool `json:"places,omitempty"`

	TempDir string
	Limits  index.Limits
}

// CutLike returns how files are cut that have n chunks of such sizes, if Shale has, now
// or earlier.
func CutLike(n int, size func(int) uint32) uint32 {
	largest := uint32(0)
	for i := range n {
		largest = max(largest, size(i))
	}
	if largest > chunk.Size && largest <= chunk.Earlier {
		return chunk.Earlier
	}
	return chunk.Size
}

// Made is an index that was made.
type Made struct {
	Tree    *index.Tree
	Encoded []byte           // artifact.Encode
	Side    image.Descriptor // Size is 0 if there is none

	side   *os.File        // without a name
	places [][]index.Chunk // by layer, in order of offset
}

// Close gives up the side.
func (m *Made) Close() error { return m.side.Close() }

// OpenSide reads what lies beside the layers.
func (m *Made) OpenSide() (io.ReadCloser, error) {
	return io.NopCloser(io.NewSectionReader(m.side, 0, m.Side.Size)), nil
}

// Make reads all layers of an image, once, and makes its index. The same image
// gives the same index.
func Make(ctx context.Context, j Job) (_ *Made, err error) {
	if len(j.DiffIDs) != len(j.Layers) {
		return nil, index.Errorf(index.ErrCorrupt, j.Manifest, -1, "%d DiffIDs in the config for %d layers", len(j.DiffIDs), len(j.Layers))
	}
	layers := make([]*scan.Layer, len(j.Layers))
	defer func() {
		for _, l := range layers {
			if l != nil {
				err = errors.Join(err, l.Close())
			}
		}
	}()
	var entries atomic.Int64
	most := int64(j.Limits.WithDefaults().Entries)
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(Parallel)
	for n := range j.Layers {
		g.Go(func() (err error) {
			layers[n], err = j.scan(gctx, n)
			if err == nil && entries.Add(int64(len(layers[n].Changes))) > most {
				err = index.Errorf(index.ErrLimit, j.Manifest, -1, "with layer %s the image has more than %d entries (Entries)", j.Layers[n].Digest, most)
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	m := &Made{}
	if m.side, err = scratch(j.TempDir); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.side.Close())
		}
	}()
	blobs := make([]index.Blob, len(j.Layers))
	for i, l := range j.Layers {
		blobs[i] = index.Blob{Digest: l.Digest, Size: l.Size}
	}
	if j.Places {
		m.places = places(layers)
	}
	if m.Tree, err = scan.Image(layers, blobs, m.side); err != nil {
		return nil, err
	}
	if err := m.Tree.CheckLimits(j.Limits); err != nil {
		return nil, fmt.Errorf("%s: %w", j.Manifest, err)
	}
	if n := len(m.Tree.Blobs); n > len(blobs) {
		m.Side = image.Descriptor{MediaType: SideMediaType, Digest: m.Tree.Blobs[n-1].Digest, Size: m.Tree.Blobs[n-1].Size}
	}
	m.Encoded, err = artifact.Encode(m.Tree, artifact.Info{Manifest: j.Manifest, DiffIDs: j.DiffIDs}, j.Limits)
	return m, err
}

// places returns where in the streams of layers their content lies.
func places(layers []*scan.Layer) [][]index.Chunk {
	all := make([][]index.Chunk, len(layers))
	for i, l := range layers {
		for _, c := range l.Chunks {
			if c.Blob == 0 && c.Offset >= 0 { // what is not in one piece is nowhere
				all[i] = append(all[i], c)
			}
		}
	}
	return all
}

// Identify returns the digest of what lies in the layers where a chunk of another
// tree does, if Job.Places was set and this tree has a chunk there.
func (m *Made) Identify(c *index.Chunk) (chunk.Digest, bool) {
	if int64(c.Blob) >= int64(len(m.places)) {
		return chunk.Digest{}, false
	}
	l := m.places[c.Blob]
	i := sort.Search(len(l), func(i int) bool { return l[i].Offset >= c.Offset })
	if i == len(l) || l[i].Offset != c.Offset || l[i].Size != c.Size {
		return chunk.Digest{}, false
	}
	if l[i].Digest == (chunk.Digest{}) {
		return chunk.Sum(chunk.BLAKE3, make([]byte, c.Size)), true // zeros have none
	}
	return l[i].Digest, true
}

// scan reads one layer.
func (j *Job) scan(ctx context.Context, n int) (*scan.Layer, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // a read that waits must end
	r, err := j.Open(ctx, n)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	name := "layer " + j.Layers[n].Digest
	l, err := scan.Scan(ctx, r, name, scan.Options{Limits: j.Limits, Cut: j.Cut, TempDir: j.TempDir, Keep: j.Keep})
	if err != nil {
		if !strings.Contains(err.Error(), j.Layers[n].Digest) {
			err = fmt.Errorf("%s: %w", name, err)
		}
		return nil, err
	}
	if l.DiffID != j.DiffIDs[n] {
		return nil, errors.Join(index.Errorf(index.ErrCorrupt, name, -1, "it unpacks to %s, the image's config says %s", l.DiffID, j.DiffIDs[n]), l.Close())
	}
	return l, nil
}

// IndexDigest is what an encoded index is called.
func IndexDigest(encoded []byte) string { return fmt.Sprintf("sha256:%x", sha256.Sum256(encoded)) }
