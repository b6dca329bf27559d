package zframe

import "math/bits"

// tree decodes literals (section 4.2): by the next bits of the stream, as many as the
// longest code has.
type tree struct {
	bits  uint8 // of the longest code
	cells [1 << maxCode]uint16
}

const maxCode = 11 // bits

// weightKind is how weights are told of by FSE.
var weightKind = kind{name: "weights", maxLog: 6, base: []uint32{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}, extra: make([]uint8, 12)}

// treeSize returns how long the description is that p begins with.
func treeSize(p []byte) (int, error) {
	n := 1
	if len(p) > 0 {
		if n += int(p[0]); p[0] >= 128 {
			n = 1 + (int(p[0])-126)/2
		}
	}
	if n > len(p) {
		return 0, bad("a Huffman tree of %d bytes in %d", n, len(p))
	}
	return n, nil
}

// read makes t the tree of a description.
func (t *tree) read(p []byte) error {
	var weights [256]uint8
	var n int
	if p[0] >= 128 {
		for n = range int(p[0]) - 127 {
			weights[n] = p[1+n/2] >> (4 - n&1*4) & 15
		}
		n++
	} else {
		var err error
		if n, err = readWeights(weights[:255], p[1:]); err != nil {
			return err
		}
	}
	// The last weight is what makes the sum a power of two.
	var count [maxCode + 2]uint32
	sum := uint32(0)
	for _, w := range weights[:n] {
		if w > maxCode {
			return bad("a Huffman code of weight %d", w)
		}
		count[w]++
		sum += 1 << w >> 1
	}
	log := bits.Len32(sum)
	rest := uint32(1)<<log - sum
	if sum == 0 || log > maxCode || rest&(rest-1) != 0 {
		return bad("Huffman codes of weight %d in all", sum)
	}
	weights[n] = uint8(bits.Len32(rest))
	count[weights[n]]++
	t.bits = uint8(log)
	at, next := uint32(0), [maxCode + 2]uint32{}
	for w := 1; w <= log; w++ {
		next[w] = at
		at += count[w] << (w - 1)
	}
	for s, w := range weights[:n+1] {
		if w == 0 {
			continue
		}
		c := uint16(s)<<8 | uint16(log+1-int(w))
		fill := t.cells[next[w]:][:1<<(w-1)]
		for i := range fill {
			fill[i] = c
		}
		next[w] += 1 << (w - 1)
	}
	return nil
}

// readWeights decodes weights that FSE compressed, by two states in turns.
func readWeights(weights []uint8, p []byte) (int, error) {
	var t table
	n, err := t.read(&weightKind, p)
	if err != nil {
		return 0, err
	}
	var b backward
	if !b.begin(p[n:]) {
		return 0, bad("weights of no bits")
	}
	state := [2]uint32{b.take(t.log), b.take(t.log)}
	n = 0
	for i := 0; ; i ^= 1 {
		if n+2 > len(weights) {
			return 0, bad("more than %d weights", len(weights))
		}
		c := t.cells[state[i]]
		weights[n] = uint8(c.base)
		n++
		if state[i] = uint32(c.next) + b.take(c.read); b.left < 0 {
			weights[n] = uint8(t.cells[state[i^1]].base)
			return n + 1, nil
		}
	}
}

// decode fills dst from one stream, which has to end with it.
func (t *tree) decode(dst, p []byte) error {
	var b backward
	if !b.begin(p) {
		return bad("literals of no bits")
	}
	shift := (64 - t.bits) & 63
	for len(dst) >= 5 && b.left >= 64 {
		v := b.next()
		d := dst[:5]
		used := uint16(0)
		for i := range d {
			c := t.cells[v>>shift&(1<<maxCode-1)]
			d[i] = byte(c >> 8)
			v <<= c & 15
			used += c & 15
		}
		b.left -= int(used)
		dst = dst[5:]
	}
	for i := range dst {
		c := t.cells[b.next()>>shift&(1<<maxCode-1)]
		dst[i] = byte(c >> 8)
		b.left -= int(c & 15)
	}
	if b.left != 0 {
		return bad("%d bits are left of literals", b.left)
	}
	return nil
}

// decode4 fills dst from four streams.
func (t *tree) decode4(dst, p []byte) error {
	if len(p) < 6 || len(dst) < 6 {
		return bad("four streams of literals in %d bytes, for %d", len(p), len(dst))
	}
	sizes := [3]int{int(p[0]) | int(p[1])<<8, int(p[2]) | int(p[3])<<8, int(p[4]) | int(p[5])<<8}
	p = p[6:]
	part := (len(dst) + 3) / 4 // three of them are in six literals and more
	for _, n := range sizes {
		if n > len(p) {
			return bad("a stream of literals with %d bytes of %d", n, len(p))
		}
		if err := t.decode(dst[:part], p[:n]); err != nil {
			return err
		}
		dst, p = dst[part:], p[n:]
	}
	return t.decode(dst, p)
}
