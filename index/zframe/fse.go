package zframe

import (
	"math/bits"
)

// table decodes one kind of symbol: FSE (RFC 8878, section 4.1) of at most maxLog bits.
type table struct {
	log   uint8
	cells [1 << maxLog]cell
}

// cell is a state: what it decodes to, and how the next one is found.
type cell struct {
	base  uint32 // of the value
	extra uint8  // bits of the value that follow in the stream
	read  uint8  // bits of the next state that do
	next  uint16 // added to those
}

const maxLog = 9

// kind is what is told of a kind of symbol (section 3.1.1.3.2).
type kind struct {
	name   string
	maxLog uint8
	base   []uint32
	extra  []uint8
	common []int16 // the predefined distribution
	log    uint8   // of that
}

// Kinds, in the order in which blocks have their tables.
const (
	literalLengths = iota
	offsets
	matchLengths
	kinds
)

var all = [kinds]kind{
	literalLengths: {
		name: "literal lengths", maxLog: 9, log: 6,
		common: []int16{4, 3, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3, 2, 1, 1, 1, 1, 1, -1, -1, -1, -1},
	},
	offsets: {
		name: "offsets", maxLog: 8, log: 5,
		common: []int16{1, 1, 1, 1, 1, 1, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1},
	},
	matchLengths: {
		name: "match lengths", maxLog: 9, log: 6,
		common: []int16{1, 4, 3, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1},
	},
}

var predefined [kinds]table

func init() {
	// Lengths from where extra bits begin.
	fill := func(k *kind, first uint32, plain int, extra []uint8) {
		for v := range uint32(plain) {
			k.base, k.extra = append(k.base, first+v), append(k.extra, 0)
		}
		next := first + uint32(plain)
		for _, x := range extra {
			k.base, k.extra = append(k.base, next), append(k.extra, x)
			next += 1 << x
		}
	}
	fill(&all[literalLengths], 0, 16, []uint8{1, 1, 1, 1, 2, 2, 3, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16})
	fill(&all[matchLengths], 3, 32, []uint8{1, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16})
	for c := range 32 {
		all[offsets].base, all[offsets].extra = append(all[offsets].base, 1<<c), append(all[offsets].extra, uint8(c))
	}
	for i := range all {
		k := &all[i]
		predefined[i].build(k, k.common, k.log)
	}
}

// single makes t a table of one symbol, which takes no bits.
func (t *table) single(k *kind, symbol uint8) {
	t.log = 0
	t.cells[0] = cell{base: k.base[symbol], extra: k.extra[symbol]}
}

// build makes t the table of a distribution of 1<<log states, where -1 stands for less
// than one.
func (t *table) build(k *kind, counts []int16, log uint8) {
	t.log = log
	size := uint32(1) << log
	var symbols [1 << maxLog]uint8
	var next [64]uint16
	high := size - 1
	for s, c := range counts {
		if next[s] = uint16(c); c == -1 {
			symbols[high] = uint8(s)
			high--
			next[s] = 1
		}
	}
	step, mask, at := size>>1+size>>3+3, size-1, uint32(0)
	for s, c := range counts {
		for ; c > 0; c-- {
			symbols[at] = uint8(s)
			for at = (at + step) & mask; at > high; at = (at + step) & mask {
			}
		}
	}
	for i := range size {
		s := symbols[i]
		x := next[s]
		next[s]++
		read := log - uint8(bits.Len16(x)-1)
		t.cells[i] = cell{base: k.base[s], extra: k.extra[s], read: read, next: x<<read - uint16(size)}
	}
}

// read makes t the table that p begins with (section 4.1.1), and returns how long that is.
func (t *table) read(k *kind, p []byte) (int, error) {
	wrong := func(what string) (int, error) { return 0, bad("the table of %s %s", k.name, what) }
	var counts [64]int16
	at, n := uint(0), 0 // bits used; symbols
	take := func(n uint) uint32 {
		var v uint32
		for i := at / 8; i < (at+n+7)/8; i++ {
			if i < uint(len(p)) {
				v |= uint32(p[i]) << (8 * (i - at/8))
			}
		}
		return v >> (at % 8) & (1<<n - 1)
	}
	log := uint8(take(4)) + 5
	at = 4
	if log > k.maxLog {
		return wrong("is too large")
	}
	left := int32(1) << log
	for left > 0 {
		// A count plus one, up to left + 1, in as many bits as that needs or one less.
		width := uint(bits.Len32(uint32(left + 1)))
		v := int32(take(width))
		low := int32(1)<<width - 1 - (left + 1) // so many values are short
		switch short := v & (1<<(width-1) - 1); {
		case short < low:
			v = short
			at += width - 1
		case v >= 1<<(width-1):
			v -= low
			fallthrough
		default:
			at += width
		}
		if n >= len(k.base) {
			return wrong("has too many symbols")
		}
		v--
		counts[n] = int16(v)
		n++
		left -= max(v, -v)
		if v == 0 {
			for {
				z := int(take(2))
				at += 2
				if n += z; n > len(k.base) {
					return wrong("has too many symbols")
				}
				if z < 3 {
					break
				}
			}
		}
		if at > uint(8*len(p)) {
			return wrong("is cut off")
		}
	}
	t.build(k, counts[:n], log)
	return int(at+7) / 8, nil
}
