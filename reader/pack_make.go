package reader

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"slices"

	"github.com/shale-image/shale/blob/retry"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/content"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/pack"
	"github.com/shale-image/shale/trace"
)

// MadePack is a start pack that was made.
type MadePack struct {
	PackRef  // Artifact is empty until it is pushed
	Bytes    []byte
	Metadata int64 // bytes of them that are the index
	Table    *pack.Table
}

// MakePack makes the start pack of what a trace says is read of an image: stored
// bytes up to limit besides the index, 0 for no limit. The content comes from the
// image's repository, verified. The same image and trace give the same pack.
func MakePack(ctx context.Context, repo *image.Repository, img *image.Image, o Options, t *trace.Trace, limit int64) (*MadePack, error) {
	if t.Manifest != img.ManifestDigest {
		return nil, fmt.Errorf("%w: the trace is of %s, the image is %s", trace.ErrMismatch, t.Manifest, img.ManifestDigest)
	}
	o.Start = nil
	raw, err := Fetch(ctx, repo, img, o)
	if err != nil {
		return nil, err
	}
	defer raw.Close()
	tree, err := raw.Tree()
	if err != nil {
		return nil, err
	}
	m := &MadePack{PackRef: PackRef{Commands: commands(t)}}
	var metadata []byte
	if raw.Kind == Index { // others come in another way, while the list of packs does
		metadata, m.Index, m.Metadata = make([]byte, raw.Size), raw.Name, raw.Size
		if _, err := raw.File.ReadAt(metadata, 0); err != nil {
			return nil, err
		}
	}
	blocks, data, err := hot(ctx, repo, tree, t)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	m.Table, err = pack.Build(ctx, &out, metadata, blocks, pack.Options{Limit: limit, Content: func(_ context.Context, c pack.Chunk) ([]byte, error) {
		return data[c.Digest], nil
	}})
	m.Bytes = out.Bytes()
	m.Blob = image.Descriptor{MediaType: PackMediaType, Digest: fmt.Sprintf("sha256:%x", sha256.Sum256(m.Bytes)), Size: int64(len(m.Bytes))}
	return m, err
}

// hot returns the blocks of a trace that are content of a tree, and the content of
// their chunks.
func hot(ctx context.Context, repo *image.Repository, tree *index.Tree, t *trace.Trace) (blocks []pack.Block, data map[chunk.Digest][]byte, err error) {
	numbers := map[chunk.Digest]uint32{}
	for i := range tree.Chunks {
		numbers[tree.Chunks[i].Digest] = uint32(i)
	}
	var wanted []uint32
	seen := map[uint32]bool{}
	for _, b := range t.Blocks {
		n, ok := numbers[b.Chunk]
		if !ok || tree.Chunks[n].Size != b.Size || b.Chunk.Algorithm != chunk.BLAKE3 && b.Chunk.Algorithm != chunk.SHA256 {
			continue // it was read by another index of the image, or has no digest of its own
		}
		blocks = append(blocks, pack.Block{Chunk: pack.Chunk{Digest: b.Chunk, Size: b.Size}, Index: b.Index})
		if !seen[n] {
			seen[n] = true
			wanted = append(wanted, n)
		}
	}
	if len(blocks) == 0 {
		return nil, nil, fmt.Errorf("%w: nothing that was read is content of the image's index: with one that shale index --push makes, trace it again", index.ErrUnsupported)
	}
	data = make(map[chunk.Digest][]byte, len(wanted))
	src := content.Cached(retry.New(repo.Blobs(), retry.Policy{}))
	err = content.Chunks(ctx, tree, src, wanted, func(n uint32, p []byte) error {
		data[tree.Chunks[n].Digest] = bytes.Clone(p)
		return nil
	})
	return blocks, data, err
}

// commands lists the commands of a trace, each once, sorted.
func commands(t *trace.Trace) [][]string {
	out := [][]string{}
	for _, r := range t.Runs {
		c := append([]string{}, r.Command...)
		if !slices.ContainsFunc(out, func(x []string) bool { return slices.Equal(x, c) }) {
			out = append(out, c)
		}
	}
	slices.SortFunc(out, slices.Compare)
	return out
}
