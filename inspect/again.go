package inspect

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/stream"
	"github.com/shale-image/shale/reader"
)

// again makes the index of an image that is not converted once more: the layers
// must be what the image's config says, and the index what they are.
func (c *checker) again(ctx context.Context) error {
	m := c.im.Manifest
	if m.ConfigBytes == nil {
		if err := c.im.repo.LoadConfig(ctx, m); err != nil {
			return err
		}
	}
	job := reader.Job{Manifest: m.ManifestDigest, Layers: m.Layers, DiffIDs: m.Config.DiffIDs,
		Open: func(ctx context.Context, n int) (io.ReadCloser, error) { return c.im.repo.Blob(ctx, m.Layers[n]) }}
	has, says := &contents{}, &contents{}
	if c.im.Kind == reader.Index {
		chunks := c.im.Tree.Chunks
		job.Cut = reader.CutLike(len(chunks), func(i int) uint32 { return chunks[i].Size })
	} else {
		job.Keep = func(d chunk.Digest, p []byte) error {
			has.add(d, p)
			return nil
		}
	}
	if c.im.Kind != reader.Index { // else they have been verified
		if err := c.chunks(ctx, says); err != nil {
			return err
		}
	}
	made, err := reader.Make(ctx, job)
	if err == nil {
		defer made.Close()
		if c.im.Kind == reader.TOC {
			forget(made.Tree, c.im.Tree)
		}
		if c.im.Kind != reader.Index {
			err = adopt(made.Tree, c.im.Tree, has, says)
		}
	}
	if err == nil {
		err = index.Equal(made.Tree, c.im.Tree)
	}
	if err != nil && !isDefect(err) {
		return err
	}
	if err != nil {
		c.add(Defect{Object: "index", Offset: -1, Problem: err.Error(), object: -1})
	}
	return nil
}

// forget takes away from what layers have what their tables of contents do not
// tell: the format's own files, and fractions of seconds.
func forget(layers, tables *index.Tree) {
	for _, name := range []string{".prefetch.landmark", ".no.prefetch.landmark", "stargz.index.json"} {
		if tables.Root.Children[name] == nil {
			delete(layers.Root.Children, name)
		}
	}
	layers.Walk(func(path string, ino *index.Inode) error {
		if other, err := tables.Lookup(path); err == nil && other.Mtime.Nsec == 0 {
			ino.Mtime.Nsec = 0
		}
		return nil
	})
}

// adopt gives the files of want the chunks that those of got have, after it has
// seen that the content is the same.
func adopt(want, got *index.Tree, has, says *contents) error {
	seen := map[*index.Inode]bool{}
	err := want.Walk(func(path string, ino *index.Inode) error {
		other, err := got.Lookup(path)
		if err != nil || !ino.IsRegular() || !other.IsRegular() || seen[ino] {
			return nil // Equal tells
		}
		if seen[ino] = true; has.sum(want, ino) != says.sum(got, other) {
			return fmt.Errorf("%w: %q: content is not what the layers have", index.ErrCorrupt, "/"+path)
		}
		ino.Extents = other.Extents
		return nil
	})
	want.Chunks = got.Chunks
	return err
}

// contents has digests of what chunks hold, block by block, by which files can be
// compared that are cut at different offsets. It takes 8 MiB for a GiB.
type contents struct {
	mu sync.Mutex
	of map[chunk.Digest][][32]byte
}

func (k *contents) add(d chunk.Digest, p []byte) {
	blocks := make([][32]byte, 0, (len(p)+hashBlock-1)/hashBlock)
	for len(p) > 0 {
		var block [hashBlock]byte // the rest of the last one is zeros, like holes
		n := copy(block[:], p)
		p = p[n:]
		var sum [32]byte
		if block != [hashBlock]byte{} {
			sum = sha256.Sum256(block[:])
		}
		blocks = append(blocks, sum)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.of == nil {
		k.of = map[chunk.Digest][][32]byte{}
	}
	k.of[d] = blocks
}

// sum digests the content of a file whose chunks lie at multiples of a block.
func (k *contents) sum(t *index.Tree, ino *index.Inode) [32]byte {
	h := sha256.New()
	for _, e := range ino.Extents {
		for i, sum := range k.of[t.Chunks[e.Chunk].Digest] {
			if sum != [32]byte{} {
				var at [8]byte
				binary.LittleEndian.PutUint64(at[:], uint64(e.Off)+uint64(i)*hashBlock)
				h.Write(at[:])
				h.Write(sum[:])
			}
		}
	}
	return [32]byte(h.Sum(nil))
}

// chunks verifies the chunks of all blobs, and has what they hold added to says.
func (c *checker) chunks(ctx context.Context, says *contents) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(reader.Parallel)
	for _, o := range c.objects {
		if o.blob < 0 || !o.whole { // then it has been told what is wrong
			continue
		}
		g.Go(func() error {
			for rest := o.chunks; len(rest) > 0; {
				n, err := c.stream(ctx, o, rest, says)
				if err != nil {
					return err
				}
				rest = rest[n:]
			}
			return nil
		})
	}
	return g.Wait()
}

// stream verifies chunks of a blob, which are in order of offset, by one request.
// It returns how many it has seen to, at least one: behind what cannot be decoded
// another one has to go on.
func (c *checker) stream(ctx context.Context, o *object, chunks []int, says *contents) (n int, err error) {
	t := c.im.Tree
	from, to := t.Chunks[chunks[0]].Offset, t.Chunks[chunks[0]].End()
	for _, i := range chunks {
		to = max(to, t.Chunks[i].End())
	}
	spans := t.Blobs[o.blob].Cover(from, to)
	off, length := index.Stored(spans, from, to)
	bad := func(chunks []int, err error) {
		d := o.defect(-1, err.Error())
		d.Chunk, d.chunks = t.Chunks[chunks[0]].Digest.String(), chunks
		c.add(d)
	}
	// inSpan is where the chunks end, from number n on, that begin in its span.
	inSpan := func(n int) (k int) {
		b := &t.Blobs[o.blob]
		end := b.Spans[b.Find(t.Chunks[chunks[n]].Offset)].End()
		for k = n + 1; k < len(chunks) && t.Chunks[chunks[k]].Offset < end; k++ {
		}
		return k
	}
	body, err := c.im.Source.Range(ctx, blob.Ref{Digest: o.ref.Digest, Size: o.ref.Size}, off, length)
	if err != nil {
		return 0, err
	}
	defer body.Close()
	r, err := stream.NewReader(body, spans, from, to, nil)
	if err != nil {
		if !isDefect(err) {
			return 0, err
		}
		n = inSpan(0)
		bad(chunks[:n], err)
		return n, nil
	}
	defer r.Close()
	for n, i := range chunks {
		ch := &t.Chunks[i]
		if ch.Offset < r.Pos() { // it shares bytes with the one before
			return n, nil
		}
		var data []byte
		err := r.Skip(ch.Offset - r.Pos())
		if err == nil {
			data, err = r.Next(int(ch.Size))
		}
		if err != nil {
			if !isDefect(err) {
				return 0, err
			}
			k := inSpan(n)
			bad(chunks[n:k], err)
			return k, nil
		}
		if err := r.Verify(ch.Digest, data); err != nil {
			bad([]int{i}, err)
			continue
		}
		says.add(ch.Digest, data)
	}
	return len(chunks), nil
}
