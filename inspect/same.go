package inspect

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/content"
	"github.com/shale-image/shale/index"
)

// sameContent compares the data of two regular files.
func (d *differ) sameContent(at string, a, b *index.Inode) (bool, error) {
	if a.Size != b.Size {
		return false, nil
	}
	same, known := sameChunks(d.from.Tree, d.to.Tree, a.Extents, b.Extents)
	if known {
		return same, nil
	}
	x, err := sum(d.ctx, d.from.Tree, d.from.Source, a)
	if err != nil {
		return false, fmt.Errorf("%s: /%s: %w", d.from.Name, at, err)
	}
	y, err := sum(d.ctx, d.to.Tree, d.to.Source, b)
	if err != nil {
		return false, fmt.Errorf("%s: /%s: %w", d.to.Name, at, err)
	}
	return x == y, nil
}

// sameChunks compares by digests. known is false if they do not tell: where
// chunks begin or end at different offsets, or have digests of different kinds.
// Zeros may be a hole in one and chunks in the other.
func sameChunks(s, t *index.Tree, x, y []index.Extent) (same, known bool) {
	known = true
	for len(x) > 0 || len(y) > 0 {
		if len(x) > 0 && len(y) > 0 {
			p, q := &s.Chunks[x[0].Chunk], &t.Chunks[y[0].Chunk]
			pEnd, qEnd := x[0].Off+int64(p.Size), y[0].Off+int64(q.Size)
			switch {
			case x[0].Off == y[0].Off && p.Size == q.Size && p.Digest.Algorithm == q.Digest.Algorithm:
				if p.Digest != q.Digest {
					return false, true
				}
				x, y = x[1:], y[1:]
				continue
			case x[0].Off < qEnd && y[0].Off < pEnd:
				known = false // they overlap; what follows may still tell
				if pEnd <= qEnd {
					x = x[1:]
				}
				if qEnd <= pEnd {
					y = y[1:]
				}
				continue
			}
		}
		// One has a hole here.
		var c *index.Chunk
		if len(y) == 0 || len(x) > 0 && x[0].Off < y[0].Off {
			c, x = &s.Chunks[x[0].Chunk], x[1:]
		} else {
			c, y = &t.Chunks[y[0].Chunk], y[1:]
		}
		if !zeros(c) {
			return false, known
		}
	}
	return true, known
}

// zeros tells whether a chunk's content is all zeros, by its digest.
func zeros(c *index.Chunk) bool {
	a := c.Digest.Algorithm
	if a != chunk.BLAKE3 && a != chunk.SHA256 || c.Size > chunk.MaxSize {
		return false
	}
	return chunk.Sum(a, make([]byte, c.Size)) == c.Digest
}

// sum digests a file's data, verified, in a way that does not depend on how it
// is cut and what of its zeros are holes: block by block with their offsets,
// those of zeros left out.
func sum(ctx context.Context, t *index.Tree, src blob.Source, ino *index.Inode) ([32]byte, error) {
	h := &blockHash{h: sha256.New()}
	err := content.Pieces(ctx, t, src, ino, func(p content.Piece) error {
		h.add(p.Off, p.Data[:max(0, min(int64(len(p.Data)), ino.Size-p.Off))])
		return nil
	})
	h.flush()
	return [32]byte(h.h.Sum(nil)), err
}

const hashBlock = 4096

type blockHash struct {
	h     hash.Hash
	block [hashBlock]byte
	at    int64 // offset of block
}

// add takes data at an offset not before the end of what it was given last.
func (b *blockHash) add(off int64, data []byte) {
	for len(data) > 0 {
		if at := off &^ (hashBlock - 1); at != b.at {
			b.flush()
			b.at = at
		}
		n := copy(b.block[off-b.at:], data)
		off, data = off+int64(n), data[n:]
	}
}

func (b *blockHash) flush() {
	if b.block == [hashBlock]byte{} {
		return
	}
	var at [8]byte
	binary.LittleEndian.PutUint64(at[:], uint64(b.at))
	b.h.Write(at[:])
	b.h.Write(b.block[:])
	b.block = [hashBlock]byte{}
}
