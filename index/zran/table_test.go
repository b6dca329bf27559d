package zran

import (
	"math/bits"
	"math/rand/v2"
	"testing"
)

// randomCode makes the code lengths of a complete code by splitting the
// longest, the shortest or any code until there are n.
func randomCode(rnd *rand.Rand, n, longest int) []uint8 {
	lens := []uint8{1, 1}
	deep := rnd.IntN(3)
	for len(lens) < n {
		i := rnd.IntN(len(lens))
		if deep == 0 {
			i = len(lens) - 1
		}
		if int(lens[i]) == longest {
			i = rnd.IntN(len(lens))
		}
		if int(lens[i]) < longest {
			lens[i]++
			lens = append(lens, lens[i])
		}
	}
	rnd.Shuffle(n, func(i, j int) { lens[i], lens[j] = lens[j], lens[i] })
	return lens
}

// TestTables compares look-ups with the definition of a canonical code.
func TestTables(t *testing.T) {
	rnd := rand.New(rand.NewPCG(5, 6))
	for range 300 {
		n := 2 + rnd.IntN(maxDynLit-1)
		lens := randomCode(rnd, n, maxCode)
		for s := range lens { // some symbols that do not occur
			if rnd.IntN(50) == 0 && len(lens) < maxDynLit {
				lens = append(lens, lens[s])
				lens[s] = 0
			}
		}
		checkTable(t, lens, litBits, litSize, litSyms[:])
		if lens := randomCode(rnd, 2+rnd.IntN(maxDynDist-1), maxCode); true {
			checkTable(t, lens, distBits, distSize, distSyms[:])
		}
	}
}

func checkTable(t *testing.T, lens []uint8, root, size int, syms []entry) {
	t.Helper()
	var c code
	if !c.set(lens, false) {
		t.Fatalf("not complete: %v", lens)
	}
	table := make([]entry, size)
	for i := range table {
		table[i] = 1<<32 - 1
	}
	c.fill(table, root, syms)
	word := 0
	for n := 1; n <= maxCode; n++ {
		for s, l := range lens {
			if int(l) != n {
				continue
			}
			want := syms[s] + entry(n)<<8 + entry(n)
			for more := range 1 << (maxCode - n) { // all that may follow the code
				in := uint64(bits.Reverse16(uint16(word)))>>(16-n) | uint64(more)<<n
				e := table[in&(1<<root-1)]
				if e&flagLink != 0 && e&flagSlow != 0 {
					e = table[e.second(in>>root)]
				}
				if e != want {
					t.Fatalf("symbol %d, code of %d bits: entry %#x, want %#x", s, n, e, want)
				}
			}
			word++
		}
		word <<= 1
	}
}

func TestCodes(t *testing.T) {
	for _, test := range []struct {
		lens     []uint8
		ok, none bool
	}{
		{[]uint8{1, 1}, true, true},
		{[]uint8{0, 1, 0}, true, true}, // a single code of one bit
		{[]uint8{0, 2, 0}, false, false},
		{[]uint8{}, false, true},
		{[]uint8{0, 0}, false, true},
		{[]uint8{1, 2}, false, false},    // incomplete
		{[]uint8{1, 1, 1}, false, false}, // more than there are
		{[]uint8{2, 2, 2, 2, 15}, false, false},
		{[]uint8{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 15}, true, true},
	} {
		var c code
		if got := c.set(test.lens, false); got != test.ok {
			t.Errorf("%v: %t", test.lens, got)
		}
		if got := c.set(test.lens, true); got != test.none {
			t.Errorf("%v, may be empty: %t", test.lens, got)
		}
	}
}

// The symbols of RFC 1951, section 3.2.5, at the ends of its tables.
func TestSymbols(t *testing.T) {
	for _, test := range []struct {
		e           entry
		base, extra int
	}{
		{litSyms[257], 3, 0}, {litSyms[264], 10, 0}, {litSyms[265], 11, 1}, {litSyms[269], 19, 2}, {litSyms[280], 115, 4},
		{litSyms[284], 227, 5}, {litSyms[285], 258, 0},
		{distSyms[0], 1, 0}, {distSyms[3], 4, 0}, {distSyms[4], 5, 1}, {distSyms[29], 24577, 13},
	} {
		if int(test.e>>16) != test.base || int(test.e.used()) != test.extra {
			t.Errorf("entry %#x, want %d and %d extra bits", test.e, test.base, test.extra)
		}
	}
}
