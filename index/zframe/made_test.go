package zframe

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/shale-image/shale/index"
)

// bit is a number of so many bits.
type bit struct {
	v uint32
	n uint8
}

// backwards is a stream that such numbers are read from, in this order.
func backwards(bits ...bit) []byte {
	var p []byte
	at := 0
	put := func(v uint32, n uint8) {
		for i := range n {
			if at%8 == 0 {
				p = append(p, 0)
			}
			p[at/8] |= byte(v>>i&1) << (at % 8)
			at++
		}
	}
	for _, b := range slices.Backward(bits) {
		put(b.v, b.n)
	}
	put(1, 1)
	return p
}

const skippable = "\x50\x2a\x4d\x18\x03\x00\x00\x00abc"

// framed is a frame of blocks, with a window of 1<<log bytes.
func framed(log byte, blocks ...[]byte) []byte {
	return append([]byte{0x28, 0xb5, 0x2f, 0xfd, 0, (log - 10) << 3}, bytes.Join(blocks, nil)...)
}

// blockOf is a block that is not the last one.
func blockOf(kind, size int, p ...byte) []byte {
	v := kind<<1 | size<<3
	return append([]byte{byte(v), byte(v >> 8), byte(v >> 16)}, p...)
}

func rawBlock(p []byte) []byte { return blockOf(raw, len(p), p...) }
func packed(parts ...[]byte) []byte {
	p := bytes.Join(parts, nil)
	return blockOf(compressed, len(p), p...)
}

// last makes a block the last one of its frame.
func last(block []byte) []byte {
	block = bytes.Clone(block)
	block[0] |= 1
	return block
}

// Literals: as they are, one repeated, by a tree.
func rawLiterals(p string) []byte {
	return append([]byte{byte(len(p)<<4 | 4), byte(len(p) >> 4)}, p...)
}
func oneLiteral(n int, v byte) []byte {
	return []byte{byte(n<<4 | 0xc | repeat), byte(n >> 4), byte(n >> 12), v}
}
func codedLiterals(kind, n int, four bool, parts ...[]byte) []byte {
	p := bytes.Join(parts, nil)
	v := kind | n<<4 | len(p)<<14
	if four {
		v |= 4
	}
	return append([]byte{byte(v), byte(v >> 8), byte(v >> 16)}, p...)
}

// twoBits is a tree of 'a' to 'd', two bits each: the weights of all before, and of three
// of them, told as they are.
var twoBits = func() []byte {
	p := []byte{127 + 'd'}
	for i := 0; i < 'd'; i += 2 {
		w := func(s int) byte {
			if s >= 'a' && s < 'd' {
				return 1
			}
			return 0
		}
		p = append(p, w(i)<<4|w(i+1))
	}
	return p
}()

// abcd is a stream of literals of that tree.
func abcd(s string) []byte {
	var bits []bit
	for _, c := range s {
		bits = append(bits, bit{uint32(c - 'a'), 2})
	}
	return backwards(bits...)
}

// sequencesOf are so many sequences.
func sequencesOf(count int, modes byte, parts ...[]byte) []byte {
	head := []byte{byte(count)}
	switch {
	case count >= 0x7f00:
		head = binary.LittleEndian.AppendUint16([]byte{255}, uint16(count-0x7f00))
	case count >= 128:
		head = []byte{byte(count>>8) | 128, byte(count)}
	}
	if count > 0 {
		head = append(head, modes)
	}
	return append(head, bytes.Join(parts, nil)...)
}

const (
	singles = modeSingle<<6 | modeSingle<<4 | modeSingle<<2
	agains  = modeAgain<<6 | modeAgain<<4 | modeAgain<<2
)

// match is a sequence of no literals, whose tables have one symbol each, that copies length
// bytes, at least 65539, from so far before.
func match(offset, length int) []byte {
	code := 0
	for 2<<code <= offset+3 {
		code++
	}
	return sequencesOf(1, singles, []byte{0, byte(code), 52}, backwards(bit{uint32(offset+3) - 1<<code, uint8(code)}, bit{uint32(length - 65539), 16}))
}

// far is a block of 128 KiB that lie so far before.
func far(offset int) []byte { return packed(rawLiterals(""), match(offset, MaxBlock)) }

// near copies six bytes from 20 before behind four literals.
func near(modes byte, common bool) []byte {
	if !common { // each table has one symbol
		var symbols []byte
		if modes == singles {
			symbols = []byte{4, 4, 3}
		}
		return sequencesOf(1, modes, symbols, backwards(bit{7, 4}))
	}
	in := func(k int, base uint32) bit {
		i := slices.IndexFunc(predefined[k].cells[:1<<predefined[k].log], func(c cell) bool { return c.base == base })
		return bit{uint32(i), predefined[k].log}
	}
	return sequencesOf(1, modes, backwards(in(literalLengths, 4), in(offsets, 16), in(matchLengths, 6), bit{7, 4}))
}

// made is a frame with all that a block can have, and what it says.
func made() (stored []byte, plain string) {
	var b [][]byte
	add := func(p []byte, what string) { b, plain = append(b, p), plain+what }
	tail := func(literals string) string { // what near makes of them
		p := plain + literals[:4]
		p += p[len(p)-20:][:6]
		return p[len(plain):] + literals[4:]
	}
	add(rawBlock([]byte("The quick brown fox jumps over the lazy dog, as ever.")), "The quick brown fox jumps over the lazy dog, as ever.")
	add(blockOf(repeat, 40, 'r'), strings.Repeat("r", 40))
	add(packed(rawLiterals("0123456789"), near(singles, false)), tail("0123456789"))
	add(packed(codedLiterals(compressed, 5, false, twoBits, abcd("abcda")), near(agains, false)), tail("abcda"))
	add(packed(codedLiterals(again, 4, false, abcd("dcba")), near(0, true)), tail("dcba"))
	add(packed(oneLiteral(70, 'x'), near(agains, true)), tail(strings.Repeat("x", 70)))
	four := func(a, b, c, d string) []byte {
		s := [4][]byte{abcd(a), abcd(b), abcd(c), abcd(d)}
		return codedLiterals(again, len(a)+len(b)+len(c)+len(d), true, []byte{byte(len(s[0])), 0, byte(len(s[1])), 0, byte(len(s[2])), 0}, s[0], s[1], s[2], s[3])
	}
	add(packed(four("aab", "bcc", "dda", "bc"), sequencesOf(0, 0)), "aabbccddabc")
	add(packed(four("abc", "dab", "cda", "b"), near(singles, false)), tail("abcdabcdab"))
	add(packed([]byte{8 << 3, 'o', 'n', 'e', ' ', 'b', 'y', 't', 'e'}, sequencesOf(0, 0)), "one byte")
	// The offsets in turns: what that gives the library says.
	add(packed(rawLiterals(""), sequencesOf(200, singles, []byte{0, 0, 0}, backwards())), "")
	add(packed(rawLiterals(""), sequencesOf(0x7f00, singles, []byte{0, 0, 0}, backwards())), "")
	add(packed(rawLiterals("end"), sequencesOf(1, singles, []byte{2, 1, 0}, backwards(bit{1, 1}))), "")
	add(packed(rawLiterals("end"), sequencesOf(2, singles, []byte{0, 1, 0}, backwards(bit{1, 1}, bit{0, 1}))), "")
	add(last(rawBlock(nil)), "")
	return framed(17, b...), plain
}

// TestMade: a frame by hand has all that blocks can have; the library says the same of it.
func TestMade(t *testing.T) {
	stored, plain := made()
	want, err := whole(stored)
	if err != nil || !strings.HasPrefix(string(want), plain) {
		t.Fatalf("%.1000q, %v; want %q", want, err, plain)
	}
	got, pieces, err := cut(t, stored, 1)
	if err != nil || !bytes.Equal(got, want) || len(pieces) != 13 {
		t.Fatalf("%d spans, %d bytes of %d, %v", len(pieces), len(got), len(want), err)
	}
	check(t, stored, got, pieces)
	if got, err := decode(t, len(want), stored, nil); err != nil || !bytes.Equal(got, want) {
		t.Errorf("as a whole: %v", err)
	}
	for _, every := range []int64{50, 100, 1000} {
		if _, pieces, err = cut(t, stored, every); err != nil {
			t.Fatal(err)
		}
		check(t, stored, want, pieces)
	}
}

// TestFar: matches from as far as the window, of a frame larger than what is kept of it.
func TestFar(t *testing.T) {
	for _, log := range []byte{20, 23, 25} {
		var blocks [][]byte
		window := 1 << log
		for i := range window / MaxBlock {
			blocks = append(blocks, blockOf(repeat, MaxBlock, byte(i)))
		}
		for i := range (2*window + 8<<20) / MaxBlock {
			blocks = append(blocks, far(window-i%3))
		}
		stored := framed(log, append(blocks, last(far(window)))...)
		plain, pieces, err := cut(t, stored, MaxBlock)
		if err != nil || len(pieces) != len(blocks)+1 || len(pieces[len(blocks)].state) < MaxBlock {
			t.Fatalf("window of %d: %d spans of %d blocks, %v", window, len(pieces), len(blocks), err)
		}
		check(t, stored, plain, pieces)
	}
}

// TestNotCut: what cannot be cut says so, once it was read.
func TestNotCut(t *testing.T) {
	zeros := slices.Repeat([][]byte{blockOf(repeat, MaxBlock, 0)}, MaxWindow/MaxBlock+1)
	for _, c := range []struct {
		what   string
		every  int64
		stored []byte
		text   string
	}{
		{"a match from before what is kept", 1, framed(26, append(slices.Clone(zeros), last(far(MaxWindow+1)))...), "a match 33554433 bytes before, of 33554432"},
		{"long spans", 1 << 17, framed(21, append(slices.Repeat([][]byte{rawBlock([]byte("x"))}, 40_000), last(rawBlock(nil)))...), "stored as"},
		{"large spans", 2 << 20, framed(21, append(slices.Clone(zeros[:20]), last(rawBlock(nil)))...), "a span of 1179648 bytes"},
		{"a dictionary", 1, append([]byte{0x28, 0xb5, 0x2f, 0xfd, 1, 7 << 3, 9}, last(rawBlock([]byte("x")))...), "dictionary 9"},
		{"a dictionary, and another frame", 1, slices.Concat([]byte{0x28, 0xb5, 0x2f, 0xfd, 1, 7 << 3, 9}, last(rawBlock([]byte("x"))), framed(17, last(rawBlock([]byte("y"))))), "dictionary 9"},
	} {
		d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderDictRaw(9, []byte("what is known")))
		if err != nil {
			t.Fatal(err)
		}
		kept := 0
		r := New(bytes.NewReader(c.stored), d, func(Frame) error { return nil })
		r.Cut(NewCutter(c.every, c.every, func(index.Span, []byte) error { kept++; return nil }))
		n, err := io.Copy(io.Discard, r)
		if err != nil {
			t.Fatalf("%s: %d bytes, %v", c.what, n, err)
		}
		had := kept
		if err := r.Whole(); !errors.Is(err, index.ErrCorrupt) || !strings.Contains(err.Error(), c.text) || kept != had {
			t.Errorf("%s: %v, want it to say %q", c.what, err, c.text)
		}
		d.Close()
	}
}
