package zframe

import (
	"encoding/binary"
	"math/bits"
)

// backward reads bits from the end of p, where the highest bit set of the last byte is
// none of them.
type backward struct {
	p    []byte
	left int // bits; less than 0 if more were taken than there are
}

// begin returns false if there is no end.
func (b *backward) begin(p []byte) bool {
	if len(p) == 0 || p[len(p)-1] == 0 {
		return false
	}
	b.p, b.left = p, 8*len(p)-9+bits.Len8(p[len(p)-1])
	return true
}

// next returns the next 57 bits or more, the first of them highest, and zeros where there
// are none.
func (b *backward) next() uint64 {
	if end := (b.left + 7) >> 3; end >= 8 {
		return binary.LittleEndian.Uint64(b.p[end-8:end]) << (uint(end*8-b.left) & 63)
	}
	return b.last()
}

func (b *backward) last() (v uint64) {
	if b.left <= 0 {
		return 0
	}
	for i := range (b.left + 7) >> 3 {
		v |= uint64(b.p[i]) << (8 * i)
	}
	return v << (64 - b.left)
}

// top returns the highest n bits of v, fewer than 64.
func top(v uint64, n uint8) uint32 { return uint32(v >> 1 >> ((63 - n) & 63)) }

// take returns the next n bits, up to 32.
func (b *backward) take(n uint8) uint32 {
	v := top(b.next(), n)
	b.left -= int(n)
	return v
}
