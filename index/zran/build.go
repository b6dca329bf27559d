package zran

import "math/bits"

// code is a canonical Huffman code (RFC 1951, section 3.2.2).
type code struct {
	first  [maxCode + 2]int // position in sorted of the first code of each length
	max    int              // length of the longest
	sorted [numLit]uint16   // symbols in order of their codes
	words  [numLit]uint16   // their codes, first bit lowest
}

// set reads the code lengths of all symbols. It tells whether they make a
// complete code, or one that RFC 1951 admits all the same: a single code of
// one bit, and if none is true no code at all.
func (c *code) set(lens []uint8, none bool) bool {
	var count [maxCode + 1]int
	for _, n := range lens {
		count[n&maxCode]++
	}
	var next, word [maxCode + 1]int
	c.first, c.max = [maxCode + 2]int{}, 0
	left, total := 1, 0
	for n := 1; n <= maxCode; n++ {
		c.first[n], next[n] = total, total
		word[n] = 1<<n - left<<1
		total += count[n]
		if left = left<<1 - count[n]; left < 0 {
			return false
		}
		if count[n] != 0 {
			c.max = n
		}
	}
	c.first[maxCode+1] = total
	if left != 0 && !(total == 1 && c.max == 1) && !(total == 0 && none) {
		return false
	}
	for s, n := range lens {
		if n &= maxCode; n != 0 {
			i := next[n]
			next[n]++
			c.sorted[i] = uint16(s)
			c.words[i] = bits.Reverse16(uint16(word[n])) >> (16 - n)
			word[n]++
		}
	}
	return true
}

// fill writes the table of c with a first look-up of root bits.
//
// It begins as the table for look-ups of no bit and doubles it for each bit
// more: all that is there stays right whatever the new bit is, and the codes
// that end with the new bit are written over it.
func (c *code) fill(t []entry, root int, syms []entry) {
	main := t[:1<<root]
	main[0] = flagSlow
	for n := 1; n <= root; n++ {
		copy(main[1<<(n-1):1<<n], main[:1<<(n-1)])
		for i := c.first[n]; i < c.first[n+1]; i++ {
			main[c.words[i]] = syms[c.sorted[i]] + entry(n)<<8 + entry(n)
		}
	}
	var (
		free = 1 << root // first unused entry of t
		sub  []entry     // subtable of the codes that begin with the bits head
		head = -1
	)
	for n := root + 1; n <= c.max; n++ {
		for i := c.first[n]; i < c.first[n+1]; i++ {
			word := int(c.words[i])
			if h := word & (1<<root - 1); h != head {
				head = h
				bits := c.subBits(root, n, i)
				sub = t[free : free+1<<bits]
				t[head] = flagSlow | flagLink | entry(free)<<16 | entry(bits)<<8
				free += 1 << bits
			}
			e := syms[c.sorted[i]] + entry(n)<<8 + entry(n)
			for j := word >> root; j < len(sub); j += 1 << (n - root) {
				sub[j] = e
			}
		}
	}
}

// subBits returns how many bits the codes have beyond root that begin with the
// same root bits as code i, the first of these and n long.
func (c *code) subBits(root, n, i int) int {
	room := 1 << (n - root)
	for ; n < c.max; n++ {
		if room -= c.first[n+1] - i; room <= 0 {
			break
		}
		i = c.first[n+1]
		room <<= 1
	}
	return n - root
}
