package pool

import "slices"

// bitmap has a bit for each granule: granule g is bit g%64 of word g/64.
type bitmap []uint64

// words is how many words n granules take.
func words(n int64) int64 { return (n + 63) / 64 }

// mask returns the bits of word w that belong to granules in [from, to), which
// the word must have some of.
func mask(w, from, to int64) uint64 {
	from, to = max(from-w*64, 0), min(to-w*64, 64)
	return ^uint64(0) >> (64 - uint(to-from)) << uint(from)
}

// take sets the bits in [from, to) and tells whether none was set before.
func (b bitmap) take(from, to int64) (free bool) {
	free = !b.any(from, to)
	for w := from / 64; w < words(to); w++ {
		b[w] |= mask(w, from, to)
	}
	return free
}

// any tells whether one of the bits in [from, to) is set.
func (b bitmap) any(from, to int64) bool {
	for w := from / 64; w < words(to); w++ {
		if b[w]&mask(w, from, to) != 0 {
			return true
		}
	}
	return false
}

// empty tells whether no bit is set.
func (b bitmap) empty() bool { return !slices.ContainsFunc(b, func(w uint64) bool { return w != 0 }) }

// next returns the first granule from g on, n at most, whose bit is set, or,
// if set is false, is not. Bits behind the bitmap's end are not set.
func (b bitmap) next(g, n int64, set bool) int64 {
	for g < n {
		var w uint64
		if g/64 < int64(len(b)) {
			w = b[g/64]
		}
		if !set {
			w = ^w
		}
		switch {
		case w == 0:
			g = g/64*64 + 64
		case w>>(g%64)&1 != 0:
			return g
		default:
			g++
		}
	}
	return n
}

// overlaps is any for a bitmap that may be shorter.
func (b bitmap) overlaps(from, to int64) bool { return b.next(from, to, true) < to }
