package convert

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"slices"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/rafs"
	"github.com/shale-image/shale/reader"
)

// Dict is a converted image whose chunks others refer to in place of storing
// them again: the image that refers to a chunk lists its blob as a layer of its
// own. What is referred to is read back and verified like all else. A nil Dict
// is an empty one.
type Dict struct {
	repo   *image.Repository
	name   string
	size   uint32 // of its chunks
	algo   chunk.Algorithm
	tree   *index.Tree
	infos  []rafs.BlobInfo
	chunks map[chunk.Digest]uint32 // of tree
	order  []uint32                // chunks of tree by place
}

// OpenDict reads the index of a converted image. repo is used as long as the
// dictionary is.
func OpenDict(ctx context.Context, repo *image.Repository, platform image.Platform) (*Dict, error) {
	img, err := repo.ResolveManifest(ctx, platform)
	if err != nil {
		return nil, err
	}
	im, tree, err := reader.RAFS(ctx, repo, img, os.TempDir())
	if err != nil {
		return nil, fmt.Errorf("%s: %w", repo.Ref(), err)
	}
	d := &Dict{repo: repo, name: repo.Ref().String(), size: im.ChunkSize(), algo: im.Digester(), tree: tree, infos: im.Blobs(),
		chunks: make(map[chunk.Digest]uint32, len(tree.Chunks))}
	for i := range tree.Chunks {
		if !d.infos[tree.Chunks[i].Blob].Referable() {
			continue
		}
		if _, ok := d.chunks[tree.Chunks[i].Digest]; !ok {
			d.chunks[tree.Chunks[i].Digest] = uint32(i)
		}
		d.order = append(d.order, uint32(i))
	}
	slices.SortFunc(d.order, func(x, y uint32) int { return compareChunks(&tree.Chunks[x], &tree.Chunks[y]) })
	return d, nil
}

// check tells whether the dictionary is of use for chunks of a size.
func (d *Dict) check(size uint32) error {
	if d == nil {
		return nil
	}
	if d.size != size || d.algo != chunk.BLAKE3 {
		return fmt.Errorf("dictionary %s: %w: its chunks are of %d bytes with %v digests, the image's of %d with %v: an image has one kind",
			d.name, index.ErrUnsupported, d.size, d.algo, size, chunk.BLAKE3)
	}
	return nil
}

func (d *Dict) blobs() int {
	if d == nil {
		return 0
	}
	return len(d.infos)
}

func (d *Dict) has(digest chunk.Digest) bool {
	if d == nil {
		return false
	}
	_, ok := d.chunks[digest]
	return ok
}

// fromDict makes a chunk known if the dictionary has it, and its blob one of the
// image's with the first.
func (c *converter) fromDict(digest chunk.Digest, known map[chunk.Digest]uint32) error {
	d := c.o.Dict
	if _, ok := known[digest]; ok || !d.has(digest) {
		return nil
	}
	first := d.tree.Chunks[d.chunks[digest]]
	from := &d.tree.Blobs[first.Blob]
	at := -1
	for i, b := range c.blobs {
		if b.digest == from.Digest {
			at = i
		}
	}
	if at < 0 {
		if len(c.blobs) == rafs.MaxBlobs {
			return fmt.Errorf("%w: more than %d blobs with those of the dictionary", index.ErrLimit, rafs.MaxBlobs)
		}
		at = len(c.blobs)
		c.addBlob(&layerBlob{digest: from.Digest, size: from.Size, dict: true}, d.infos[first.Blob])
	}
	for _, ch := range d.span(first) { // the bootstrap must have all of a batch
		ch.Blob = uint32(at)
		if _, ok := known[ch.Digest]; !ok {
			known[ch.Digest] = uint32(len(c.tree.Chunks))
		}
		c.tree.Chunks = append(c.tree.Chunks, ch)
	}
	return nil
}

// span returns the chunks of the dictionary in the span that a chunk is in.
func (d *Dict) span(ch index.Chunk) (all []index.Chunk) {
	b := &d.tree.Blobs[ch.Blob]
	s := &b.Spans[b.Find(ch.Offset)]
	i, _ := slices.BinarySearchFunc(d.order, index.Chunk{Blob: ch.Blob, Offset: s.Start}, func(n uint32, at index.Chunk) int {
		return compareChunks(&d.tree.Chunks[n], &at)
	})
	for ; i < len(d.order); i++ {
		c := d.tree.Chunks[d.order[i]]
		if c.Blob != ch.Blob || c.Offset >= s.End() {
			break
		}
		all = append(all, c)
	}
	return all
}

// compareChunks is the order of places.
func compareChunks(x, y *index.Chunk) int {
	return cmp.Or(cmp.Compare(x.Blob, y.Blob), cmp.Compare(x.Offset, y.Offset))
}
