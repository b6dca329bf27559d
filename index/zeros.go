package index

import (
	"sync"

	"github.com/shale-image/shale/chunk"
)

var zeroDigests sync.Map // sizedAlgorithm -> chunk.Digest

type sizedAlgorithm struct {
	algorithm chunk.Algorithm
	size      uint32
}

// zeros tells whether a chunk's content is all zeros, by its digest.
func (c *Chunk) zeros() bool {
	a := c.Digest.Algorithm
	if a != chunk.BLAKE3 && a != chunk.SHA256 || c.Size > chunk.MaxSize {
		return false
	}
	key := sizedAlgorithm{a, c.Size}
	d, ok := zeroDigests.Load(key)
	if !ok {
		d, _ = zeroDigests.LoadOrStore(key, chunk.Sum(a, make([]byte, c.Size)))
	}
	return d == c.Digest
}
