package zran

import "sync"

// Huffman tables. A code of up to root bits is decoded by one look-up of the
// next root bits of input; a longer one by a second look-up in a subtable that
// the first entry links to. An entry is a uint32:
//
//	bits  0-5   input bits it uses up, those of both look-ups and extra bits included
//	bits  8-11  length of the code without extra bits; of a link, bits of the second look-up
//	bits 12-15  flags
//	bits 16-31  symbol, literal, least length or distance; of a link the subtable's position
const (
	litBits  = 11 // of the first look-up
	distBits = 9
	preBits  = 7

	litSize  = 4096 // entries, subtables included; powers of two above what RFC 1951's
	distSize = 1024 // limits of symbols and code lengths can ask for
	preSize  = 128

	usedMask = 63

	flagLiteral = 1 << 12
	flagLink    = 1 << 13
	flagEnd     = 1 << 14 // end of block
	flagSlow    = 1 << 15 // set with flagLink and flagEnd; alone: no such code
)

type entry uint32

// used returns how many bits the symbol has in the input.
func (e entry) used() uint { return uint(e & usedMask) }

// literal returns the byte of a literal.
func (e entry) literal() byte { return byte(e >> 16) }

// value returns a length or distance, with its extra bits, which are in the
// input behind the code.
func (e entry) value(bits uint64) int {
	rest := bits >> (e & 63) << (e & 63)
	return int(e>>16) + int((bits^rest)>>(e>>8&15))
}

// second returns the position in the table that a link leads to, for the bits
// behind the first look-up.
func (e entry) second(bits uint64) uint {
	return uint(e>>16) + uint(bits)&(1<<(e>>8&15)-1)
}

const (
	maxCode    = 15  // bits of a code
	numLit     = 288 // literal/length symbols of the fixed code, 286 of which have a meaning
	numDist    = 32  // distance symbols of the fixed code, 30 of which have a meaning
	maxDynLit  = 286
	maxDynDist = 30
	endOfBlock = 256
)

// What symbols mean (RFC 1951, section 3.2.5): the entry without the code's length.
var (
	litSyms  [numLit]entry
	distSyms [numDist]entry
	preSyms  [19]entry
)

func init() {
	for s := range entry(256) {
		litSyms[s] = s<<16 | flagLiteral
	}
	litSyms[endOfBlock] = flagSlow | flagEnd
	length, extra := entry(3), entry(0)
	for s := 257; s < 285; s++ {
		if s >= 265 && (s-265)%4 == 0 {
			extra++
		}
		litSyms[s] = length<<16 | extra
		length += 1 << extra
	}
	litSyms[285] = 258 << 16
	litSyms[286], litSyms[287] = flagSlow, flagSlow
	dist, extra := entry(1), entry(0)
	for s := range 30 {
		if s >= 4 && s%2 == 0 {
			extra++
		}
		distSyms[s] = dist<<16 | extra
		dist += 1 << extra
	}
	distSyms[30], distSyms[31] = flagSlow, flagSlow
	for s := range preSyms {
		preSyms[s] = entry(s) << 16
	}
}

// codes is what decodes the symbols of a block.
type codes struct {
	lit  [litSize]entry
	dist [distSize]entry
}

// fixed returns the codes of RFC 1951, section 3.2.6.
var fixed = sync.OnceValue(func() *codes {
	t := new(codes)
	var lens [numLit]uint8
	for i := range lens {
		switch {
		case i < 144:
			lens[i] = 8
		case i < 256:
			lens[i] = 9
		case i < 280:
			lens[i] = 7
		default:
			lens[i] = 8
		}
	}
	var c code
	c.set(lens[:], false)
	c.fill(t.lit[:], litBits, litSyms[:])
	var five [numDist]uint8
	for i := range five {
		five[i] = 5
	}
	c.set(five[:], false)
	c.fill(t.dist[:], distBits, distSyms[:])
	return t
})
