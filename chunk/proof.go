package chunk

import (
	"encoding/binary"
	"fmt"
	"math/bits"

	"lukechampine.com/blake3/guts"
)

// BLAKE3 is a tree, so a block of a chunk can be proved without the others. The
// tree has a leaf for each KiB; cut at 16 KiB, it has one node for each Block
// (the last may be shorter), and the digest is what these nodes' sums add up to:
//
//	          digest
//	       /          \
//	     .              .        left of a node is the largest
//	   /   \          /   \      power of two of blocks that
//	 sum0  sum1     sum2  sum3   leaves something to the right
//
// A chunk of one block has no sums: its digest is that of the block.

// BlockSum is the chaining value of a Block within its chunk's tree.
type BlockSum [32]byte

// Blocks is how many Blocks a chunk of size bytes has.
func Blocks(size uint32) int { return int((int64(size) + Block - 1) / Block) }

// BlockSums returns the sums of all blocks of a chunk, nil if it is one block or
// none.
func BlockSums(p []byte) []BlockSum {
	if len(p) <= Block {
		return nil
	}
	sums := make([]BlockSum, 0, Blocks(uint32(len(p))))
	for i := 0; len(p) > 0; i++ {
		n := min(len(p), Block)
		sums = append(sums, SumBlock(p[:n], i))
		p = p[n:]
	}
	return sums
}

// SumBlock returns the sum of block i of a chunk of several.
func SumBlock(p []byte, i int) BlockSum {
	var buf [Block]byte
	n := guts.CompressBuffer(&buf, copy(buf[:], p), &guts.IV, uint64(i)*(Block/guts.ChunkSize), 0)
	return pack(guts.ChainingValue(n))
}

// VerifySums reports, as an error wrapping ErrCorrupt, that sums are not those of
// the blocks of the content that d names.
func (d Digest) VerifySums(sums []BlockSum) error {
	if d.Algorithm != BLAKE3 || len(sums) < 2 {
		return fmt.Errorf("%w: %d sums of blocks for a chunk with %v digest", ErrCorrupt, len(sums), d.Algorithm)
	}
	root := node(sums)
	root.Flags |= guts.FlagRoot
	if got := pack(guts.ChainingValue(root)); got != BlockSum(d.Sum) {
		return fmt.Errorf("%w: the sums of its blocks make %x, want %s", ErrCorrupt, got, d)
	}
	return nil
}

// node is the parent of at least two sums.
func node(sums []BlockSum) guts.Node {
	mid := 1 << (bits.Len(uint(len(sums)-1)) - 1)
	return guts.ParentNode(value(sums[:mid]), value(sums[mid:]), &guts.IV, 0)
}

func value(sums []BlockSum) [8]uint32 {
	if len(sums) == 1 {
		var v [8]uint32
		for i := range v {
			v[i] = binary.LittleEndian.Uint32(sums[0][4*i:])
		}
		return v
	}
	return guts.ChainingValue(node(sums))
}

func pack(v [8]uint32) (s BlockSum) {
	for i, w := range v {
		binary.LittleEndian.PutUint32(s[4*i:], w)
	}
	return s
}
