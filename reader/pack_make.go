package reader

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/shale-image/shale/blob"
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
	p, err := NewPacker(ctx, repo, img, o)
	if err != nil {
		return nil, err
	}
	return p.Make(ctx, t, limit)
}

// Packer makes start packs of an image.
type Packer struct {
	manifest string
	tempDir  string
	source   blob.Source
	tree     *index.Tree
	numbers  map[chunk.Digest]uint32
	program  bool             // the image has an entrypoint
	index    image.Descriptor // only digest and size; empty if packs have none
	metadata []byte
}

// NewPacker fetches the index of an image.
func NewPacker(ctx context.Context, repo *image.Repository, img *image.Image, o Options) (*Packer, error) {
	o.Start = nil
	raw, err := Fetch(ctx, repo, img, o)
	if err != nil {
		return nil, err
	}
	defer raw.Close()
	p := &Packer{manifest: img.ManifestDigest, tempDir: o.TempDir, source: content.Cached(retry.New(repo.Blobs(), retry.Policy{}), o.TempDir), numbers: map[chunk.Digest]uint32{}}
	if p.tree, err = raw.Tree(); err != nil {
		return nil, err
	}
	if err := repo.LoadConfig(ctx, img); err != nil {
		return nil, err
	}
	p.program = len(img.Config.Entrypoint) > 0
	for i := range p.tree.Chunks {
		p.numbers[p.tree.Chunks[i].Digest] = uint32(i)
	}
	if raw.Kind == Index { // others come in another way, while the list of packs does
		p.metadata, p.index = make([]byte, raw.Size), image.Descriptor{Digest: raw.Name, Size: raw.Size}
		if _, err := raw.File.ReadAt(p.metadata, 0); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// packRatio is how many times as large as stored content is taken to be at most when
// what to fetch for a pack is chosen. Nothing that is read at a start comes near.
const packRatio = 16

// Make makes the pack of a trace, as MakePack does.
func (p *Packer) Make(ctx context.Context, t *trace.Trace, limit int64) (*MadePack, error) {
	if t.Manifest != p.manifest {
		return nil, fmt.Errorf("%w: the trace is of %s, the image is %s", trace.ErrMismatch, t.Manifest, p.manifest)
	}
	blocks, wanted, err := p.hot(t, limit)
	if err != nil {
		return nil, err
	}
	s, err := p.fetch(ctx, wanted)
	if err != nil {
		return nil, err
	}
	defer s.file.Close()
	m := &MadePack{PackRef: PackRef{Commands: commands(t), Index: p.index.Digest, Entrypoint: p.program}, Metadata: p.index.Size}
	var out bytes.Buffer
	m.Table, err = pack.Build(ctx, &out, p.metadata, blocks, pack.Options{Limit: limit, Content: s.content})
	m.Bytes = out.Bytes()
	m.Blob = image.Descriptor{MediaType: PackMediaType, Digest: fmt.Sprintf("sha256:%x", sha256.Sum256(m.Bytes)), Size: int64(len(m.Bytes))}
	return m, err
}

// hot returns the blocks of a trace that are content of the image, and the numbers of
// their chunks: as many as may come into a pack.
func (p *Packer) hot(t *trace.Trace, limit int64) (blocks []pack.Block, wanted []uint32, err error) {
	room := int64(pack.MaxSize)
	if limit > 0 {
		room = min(room, min(limit, room)*packRatio)
	}
	seen := map[uint32]bool{}
	for _, b := range t.Blocks {
		n, ok := p.numbers[b.Chunk]
		if !ok || p.tree.Chunks[n].Size != b.Size || b.Chunk.Algorithm != chunk.BLAKE3 && b.Chunk.Algorithm != chunk.SHA256 {
			continue // it was read by another index of the image, or has no digest of its own
		}
		if !seen[n] {
			if room -= int64(b.Size); room < 0 && len(wanted) > 0 {
				break
			}
			seen[n] = true
			wanted = append(wanted, n)
		}
		blocks = append(blocks, pack.Block{Chunk: pack.Chunk{Digest: b.Chunk, Size: b.Size}, Index: b.Index})
	}
	if len(blocks) == 0 {
		return nil, nil, fmt.Errorf("%w: nothing that was read is content of the image's index: with one that shale index --push makes, trace it again", index.ErrUnsupported)
	}
	return blocks, wanted, nil
}

// contents are the contents of chunks in a file that has no name.
type contents struct {
	file *os.File
	at   map[chunk.Digest]int64
}

func (p *Packer) fetch(ctx context.Context, wanted []uint32) (_ *contents, err error) {
	s := &contents{at: make(map[chunk.Digest]int64, len(wanted))}
	if s.file, err = os.CreateTemp(p.tempDir, ".pack-"); err != nil {
		return nil, err
	}
	if err = os.Remove(s.file.Name()); err == nil {
		out, end := bufio.NewWriterSize(s.file, 1<<20), int64(0)
		err = content.Chunks(ctx, p.tree, p.source, wanted, func(n uint32, data []byte) error {
			s.at[p.tree.Chunks[n].Digest] = end
			end += int64(len(data))
			_, err := out.Write(data)
			return err
		})
		err = errors.Join(err, out.Flush())
	}
	if err != nil {
		return nil, errors.Join(err, s.file.Close())
	}
	return s, nil
}

func (s *contents) content(_ context.Context, c pack.Chunk) ([]byte, error) {
	p := make([]byte, c.Size)
	_, err := s.file.ReadAt(p, s.at[c.Digest])
	return p, err
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
