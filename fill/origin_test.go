package fill

import (
	"context"
	"crypto/sha256"
	"errors"
	"testing"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// origins makes an image of which nobody has told more than the digests of stored
// bytes, and returns what its chunks are in truth.
func (n *node) origins() (*img, map[chunk.Digest]chunk.Digest) {
	known := map[chunk.Digest]chunk.Digest{}
	b := newBuilder(chunk.None)
	b.blob()
	b.file(content(71, 3*cut+100))
	b.gap(1000)
	b.file(content(72, 5000))
	b.broken = func() {
		for i := range b.tree.Chunks {
			c := &b.tree.Chunks[i]
			blob := &b.tree.Blobs[c.Blob]
			s := &blob.Spans[blob.Find(c.Offset)]
			s.Proof = &index.Proof{Stored: sha256.Sum256(b.blobs[c.Blob][s.Offset:][:s.Length])}
			origin := chunk.Digest{Algorithm: chunk.Origin, Sum: c.Digest.Sum}
			n.pieces[origin], known[origin] = n.pieces[c.Digest], c.Digest
			c.Digest = origin
		}
	}
	return n.image(b), known
}

// Chunks without a digest are read by what is stored of them, or not at all.
func TestOrigins(t *testing.T) {
	n := newNode(t, Options{})
	x, _ := n.origins()
	n.setFault(lie)
	for i := range x.linked.Chunks() {
		if err := x.chunk(t, i); !errors.Is(err, chunk.ErrCorrupt) {
			t.Errorf("chunk %d of other stored bytes: %v", i, err)
		}
	}
	x.settle()
	n.setFault(nil)
	x.all(t)
}

// Once all of the image was read another way, they are known by their content.
func TestRescueOrigins(t *testing.T) {
	n := newNode(t, Options{})
	x, known := n.origins()
	read := false
	x.OnWrongIndex(func(context.Context) error {
		read = true
		for _, d := range known {
			if err := n.bring(t, d); err != nil {
				return err
			}
		}
		return nil
	})
	unknown := x.linked.Chunk(1).Digest
	x.OnOrigin(func(d chunk.Digest) (chunk.Digest, bool) {
		if !read {
			t.Error("asked too early")
		}
		return known[d], d != unknown
	})
	n.setFault(lie)
	for i := range x.linked.Chunks() {
		if err := x.chunk(t, i); i == 1 && !errors.Is(err, chunk.ErrCorrupt) || i != 1 && err != nil {
			t.Errorf("chunk %d: %v", i, err)
		}
	}
}
