package chunk

import (
	"errors"
	"math/rand/v2"
	"testing"
)

func TestBlockSums(t *testing.T) {
	p := make([]byte, 16*Block)
	rand.NewChaCha8([32]byte{7}).Read(p)
	for _, n := range []int{Block + 1, Block + 1024, 2 * Block, 2*Block + 1, 3 * Block, 5*Block - 7, 7*Block + 4096, Size, Size + 1, 16*Block - 1, 16 * Block} {
		q := p[:n]
		d := Sum(BLAKE3, q)
		sums := BlockSums(q)
		if len(sums) != Blocks(uint32(n)) {
			t.Fatalf("%d bytes: %d sums, want %d", n, len(sums), Blocks(uint32(n)))
		}
		if err := d.VerifySums(sums); err != nil {
			t.Errorf("%d bytes: %v", n, err)
		}
		last := len(sums) - 1
		if got := SumBlock(q[last*Block:], last); got != sums[last] {
			t.Errorf("%d bytes: the last block alone has another sum", n)
		}
		if SumBlock(q[:Block], 1) == sums[0] {
			t.Errorf("%d bytes: a block has the same sum in another place", n)
		}
		for i := range sums {
			bad := append([]BlockSum(nil), sums...)
			bad[i][i%32] ^= 1
			if err := d.VerifySums(bad); !errors.Is(err, ErrCorrupt) {
				t.Errorf("%d bytes, sum %d changed: %v, want ErrCorrupt", n, i, err)
			}
		}
		for _, bad := range [][]BlockSum{nil, sums[:1], sums[:last], append(sums[:last:last], sums[last], sums[last])} {
			if err := d.VerifySums(bad); !errors.Is(err, ErrCorrupt) {
				t.Errorf("%d bytes, %d sums instead of %d: %v, want ErrCorrupt", n, len(bad), len(sums), err)
			}
		}
	}
	for _, n := range []int{0, 1, Block} {
		if s := BlockSums(p[:n]); s != nil {
			t.Errorf("%d bytes: %d sums, want none", n, len(s))
		}
	}
	if err := Sum(SHA256, p).VerifySums(BlockSums(p)); !errors.Is(err, ErrCorrupt) {
		t.Errorf("SHA-256: %v, want ErrCorrupt", err)
	}
}
