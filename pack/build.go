package pack

import (
	"bytes"
	"context"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// Block is a block that a pack is to have.
type Block struct {
	Chunk
	Index int
}

// Options say how a pack is made.
type Options struct {
	// Limit bounds the stored bytes of the pack, its metadata apart: what is
	// wanted last is left out. 0 is no limit but MaxSize.
	Limit int64
	// Content returns the content of a chunk. It may be asked for it again and again:
	// what is wanted may be more than memory holds.
	Content func(context.Context, Chunk) ([]byte, error)
}

// Build writes a pack with metadata and blocks, which are in the order in which
// they are wanted, and returns its table. The same arguments make the same bytes.
// A chunk that cannot be proved in parts comes whole with its first block.
func Build(ctx context.Context, w io.Writer, metadata []byte, blocks []Block, o Options) (*Table, error) {
	if len(metadata) > MaxMetadata {
		return nil, fmt.Errorf("pack: %w: %d bytes of metadata, at most %d", index.ErrLimit, len(metadata), MaxMetadata)
	}
	t, err := plan(blocks)
	if err != nil {
		return nil, err
	}
	limit := int64(MaxSize)
	if o.Limit > 0 {
		limit = min(limit, o.Limit)
	}
	t.fit()
	var table, content []byte
	get := func(ctx context.Context, n int) ([]byte, error) {
		c := t.Chunks[n]
		p, err := o.Content(ctx, c)
		if err == nil && len(p) != int(c.Size) {
			err = fmt.Errorf("%w: %d bytes, want %d", chunk.ErrCorrupt, len(p), c.Size)
		}
		if err == nil {
			err = c.Digest.Verify(p)
		}
		if err != nil {
			return nil, fmt.Errorf("pack: chunk %s: %w", c.Digest, err)
		}
		return p, nil
	}
	for {
		if content, err = t.content(ctx, get, limit); err != nil {
			return nil, err
		}
		if table, err = compress(t.encode()); err != nil {
			return nil, err
		}
		size := int64(headerSize + len(table) + len(content))
		if size <= limit || len(t.Runs) == 0 {
			break
		}
		t.cut(int(int64(len(t.Runs)) * limit / size))
	}
	h := header{metadata: int64(len(metadata)), tableStored: int64(len(table)), table: int64(len(t.encode())), content: t.contentSize()}
	for _, p := range [][]byte{h.encode(), metadata, table, content} {
		if _, err := w.Write(p); err != nil {
			return nil, err
		}
	}
	return t, nil
}

// plan orders blocks into runs.
func plan(blocks []Block) (*Table, error) {
	t := &Table{}
	numbers := map[chunk.Digest]int{}
	had := map[[2]int]bool{}
	for _, b := range blocks {
		n, ok := numbers[b.Digest]
		if !ok {
			n = len(t.Chunks)
			numbers[b.Digest] = n
			t.Chunks = append(t.Chunks, b.Chunk)
		}
		all := chunk.Blocks(b.Size)
		if t.Chunks[n].Size != b.Size || b.Index < 0 || b.Index >= all {
			return nil, fmt.Errorf("pack: %w: block %d of chunk %s of %d bytes", index.ErrCorrupt, b.Index, b.Digest, b.Size)
		}
		if had[[2]int{n, b.Index}] {
			continue
		}
		r := Run{Chunk: n, First: b.Index, Count: 1}
		if b.Digest.Algorithm != chunk.BLAKE3 {
			r = Run{Chunk: n, Count: all}
		}
		for k := r.First; k < r.First+r.Count; k++ {
			had[[2]int{n, k}] = true
		}
		if last := len(t.Runs) - 1; last >= 0 && t.Runs[last].Chunk == n && t.Runs[last].First+t.Runs[last].Count == r.First {
			t.Runs[last].Count += r.Count
			continue
		}
		t.Runs = append(t.Runs, r)
	}
	return t, nil
}

// fit leaves the runs whose sums may be read.
func (t *Table) fit() {
	sums := 0
	for i, n := range t.proofs() {
		if sums += n * len(chunk.BlockSum{}); sums > maxSums {
			t.cut(i)
			return
		}
	}
}

// cut leaves the first n runs.
func (t *Table) cut(n int) {
	t.Runs = t.Runs[:n]
	chunks := 0
	for _, r := range t.Runs {
		chunks = max(chunks, r.Chunk+1)
	}
	t.Chunks = t.Chunks[:chunks]
}

// content compresses what the runs are. With that which passes limit it ends, and so
// do the runs.
func (t *Table) content(ctx context.Context, get func(context.Context, int) ([]byte, error), limit int64) ([]byte, error) {
	var out bytes.Buffer
	z, err := zstd.NewWriter(&out, zstd.WithEncoderLevel(zstd.SpeedBestCompression), zstd.WithWindowSize(Window), zstd.WithEncoderConcurrency(1))
	if err != nil {
		return nil, err
	}
	defer z.Close()
	proofs := t.proofs()
	for i, r := range t.Runs {
		p, err := get(ctx, r.Chunk)
		if err != nil {
			return nil, err
		}
		if proofs[i] > 0 {
			for _, s := range chunk.BlockSums(p) {
				z.Write(s[:]) // an error comes back from Close
			}
		}
		from := int64(r.First) * chunk.Block
		z.Write(p[from : from+t.Bytes(r)])
		if int64(out.Len()) > limit {
			t.cut(i + 1)
			break
		}
	}
	if err := z.Close(); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

func compress(p []byte) ([]byte, error) {
	z, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedBestCompression), zstd.WithEncoderConcurrency(1))
	if err != nil {
		return nil, err
	}
	defer z.Close()
	return z.EncodeAll(p, nil), nil
}
