package zframe

import (
	"bytes"
	"errors"
	"io"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// TestHostile: what is wrong with a span or its state is said.
func TestHostile(t *testing.T) {
	alphabet := []byte("abcdefghijklmnopqrstuvwxyz")
	plain := func(size int) []byte { return packed(rawLiterals(string(alphabet[:size])), sequencesOf(0, 0)) }
	coded := func(parts ...[]byte) []byte { // four literals
		return packed(codedLiterals(compressed, 4, false, parts...), sequencesOf(0, 0))
	}
	copies := last(packed(rawLiterals("0123"), near(singles, false))) // of 20 before
	beginning := func() *state { return &state{offsets: [3]uint32{1, 4, 8}, content: []byte("copies")} }
	with := func(change func(s *state)) []byte {
		s := beginning()
		change(s)
		return s.append(nil)
	}
	good := beginning().append(nil)
	if p, err := decode(t, 10, copies, good); err != nil || string(p) != "0123copies" {
		t.Fatalf("%q, %v", p, err)
	}
	if p, err := decode(t, 10, copies, with(func(s *state) { s.sum = true })); err != nil || string(p) != "0123copies" { // and is cut off
		t.Fatalf("%q, %v", p, err)
	}
	framed := func(blocks ...[]byte) []byte { return framed(17, blocks...) }
	begun := framed(rawBlock(alphabet)) // a frame that goes on
	weights := func(w ...byte) []byte {
		p := []byte{byte(127 + len(w))}
		for i := 0; i < len(w); i += 2 {
			p = append(p, w[i]<<4)
			if i+1 < len(w) {
				p[len(p)-1] |= w[i+1]
			}
		}
		return p
	}
	cases := []struct {
		what   string
		size   int
		stored []byte
		state  []byte
		text   string
	}{
		// States.
		{"unknown flags", 10, copies, append([]byte{4}, good[1:]...), "flags 0x4"},
		{"all flags", 10, copies, append([]byte{255}, good[1:]...), "flags 0xff"},
		{"flags alone", 10, copies, good[:1], "offset 0 of a state is 0"},
		{"an offset of 0", 10, copies, with(func(s *state) { s.offsets[1] = 0 }), "offset 1 of a state is 0"},
		{"a large offset", 10, copies, append([]byte{0, 1, 1, 0x80, 0x80, 0x80, 0x80, 0x10}, good[4:]...), "offset 2 of a state is 4294967296"},
		{"an endless offset", 10, copies, append([]byte{0}, bytes.Repeat([]byte{0xff}, 20)...), "offset 0"},
		{"two offsets", 10, copies, good[:3], "offset 2"},
		{"no tables", 10, copies, good[:4], "without tables"},
		{"two tables", 10, copies, good[:6], "without tables"},
		{"a table of an unknown kind", 10, copies, with(func(s *state) { s.tables[0] = []byte{4} }), "a table of kind 4"},
		{"no symbol", 10, copies, append(slices.Clone(good[:4]), modeAgain, modeAgain, modeSingle), "no symbol of match lengths"},
		{"a large symbol", 10, copies, with(func(s *state) { s.tables[offsets] = []byte{modeSingle, 32} }), "no symbol of offsets"},
		{"a cut table", 10, copies, append(slices.Clone(good[:4]), modeAgain, modeAgain, modeOwn, 0), "is cut off"},
		{"no tree", 10, copies, append([]byte{flagTree}, good[1:4]...), "a Huffman tree of 1 bytes in 0"},
		{"a cut tree", 10, copies, append([]byte{flagTree, 1, 4, 8}, twoBits[:20]...), "a Huffman tree of 51 bytes in 20"},
		{"a wrong tree", 10, copies, with(func(s *state) { s.tree = weights(12) }), "weight 12"},
		{"little content", 10, copies, with(func(s *state) { s.content = s.content[:5] }), "5 bytes of content, the span copies 6"},
		{"no content", 10, copies, with(func(s *state) { s.content = nil }), "0 bytes of content"},
		{"much content", 10, copies, with(func(s *state) { s.content = append(s.content, 'x') }), "7 bytes of content"},
		{"no state", 10, copies, nil, "no frame"},
		{"a state of a span that begins with a frame", 26, framed(last(rawBlock(alphabet))), good, "a block of kind 0 with 390821 bytes"},
		{"a state, and a frame that copies", 10, append(last(rawBlock(nil)), framed(copies)...), good, "20 bytes before"[2:]},
		{"a match from far before", MaxBlock, last(far(MaxWindow + 1)), good, "a match 33554433 bytes before"},
		{"the largest offset", 3, last(packed(rawLiterals(""), sequencesOf(1, singles, []byte{1, 0, 0}, backwards()))),
			with(func(s *state) { s.offsets[0] = math.MaxUint32 }), "a run of 1 literals, 0 are left"},
		{"the largest offset again", 4, last(packed(rawLiterals("a"), sequencesOf(1, singles, []byte{1, 0, 0}, backwards()))),
			with(func(s *state) { s.offsets[0] = math.MaxUint32 }), "a match 4294967294 bytes before"},
		{"an offset less one", 3, last(packed(rawLiterals(""), sequencesOf(1, singles, []byte{0, 1, 0}, backwards(bit{1, 1})))), good, "an offset of 0"},
		{"a tree that a state lacks", 4, last(packed(codedLiterals(again, 4, false, abcd("abcd")), sequencesOf(0, 0))), with(func(s *state) { s.content = nil }), "tree is used again"},
		{"a table that a state lacks", 10, last(packed(rawLiterals("0123"), near(agains, false))), good, "a table of literal lengths is used again"},

		// Frames and blocks.
		{"nothing", 1, nil, nil, "no frame that can be decoded at 0 of 0"},
		{"a cut head", 26, begun[:5], nil, "no frame"},
		{"no block", 26, begun[:6], nil, "no block at 6 of 6"},
		{"a cut head of a block", 26, begun[:8], nil, "no block at 6 of 8"},
		{"a cut block", 26, begun[:20], nil, "a block of 26 bytes at 6 of 20"},
		{"no more blocks", 27, begun, nil, "no block at 35 of 35"},
		{"no more frames", 27, framed(last(rawBlock(alphabet))), nil, "no frame that can be decoded at 35 of 35"},
		{"a dictionary", 1, append([]byte{0x28, 0xb5, 0x2f, 0xfd, 1, 0x38, 9}, last(rawBlock([]byte("x")))...), nil, "no frame"},
		{"a cut skippable frame", 26, append([]byte(skippable[:10]), 0x50)[:10], nil, "a skippable frame of 11 bytes at 0 of 10"},
		{"a large skippable frame", 26, []byte("\x5f\x2a\x4d\x18\xff\xff\xff\xff"), nil, "a skippable frame of 4294967303 bytes"},
		{"a reserved kind", 26, framed(blockOf(3, 26, alphabet...)), nil, "a block of kind 3"},
		{"a large block", MaxSpan, framed(rawBlock(make([]byte, MaxBlock+1))), nil, "with 131073 bytes"},
		{"more than is wanted, as it is", 25, begun, nil, "a block of 26 bytes, 25 are wanted"},
		{"more than is wanted, repeated", 25, framed(blockOf(repeat, 26, 'x')), nil, "a block of 26 bytes, 25 are wanted"},
		{"more than is wanted, packed", 25, framed(plain(26)), nil, "a block of 26 bytes, 25 are wanted"},
		{"a match before the frame", 10, framed(copies), nil, "16 bytes before its frame"},
		{"a match before the second frame", 36, append(framed(last(rawBlock(alphabet))), framed(copies)...), nil, "16 bytes before its frame"},
		{"a match into the second frame's past", 51, slices.Concat(framed(last(rawBlock(alphabet))), framed(rawBlock(alphabet[:15]), copies)), nil, "1 bytes before its frame"},

		// Literals.
		{"one byte", 1, framed(packed([]byte{0})), nil, "a compressed block of 1 bytes"},
		{"cut literals", 5, framed(packed(rawLiterals("01234")[:6])), nil, "stored in 5 of 6"},
		{"a cut head of literals", 5, framed(packed([]byte{0x4e, 0})), nil, "literals"},
		{"many literals", MaxSpan, framed(packed(oneLiteral(MaxBlock+1, 'x'), sequencesOf(0, 0))), nil, "literals of 131073 bytes"},
		{"literals of no tree", 4, framed(coded()), nil, "a Huffman tree of 1 bytes in 0"},
		{"a cut tree", 4, framed(coded(twoBits[:20])), nil, "a Huffman tree of 51 bytes in 20"},
		{"a tree of one weight of 0", 4, framed(coded(weights(0), abcd("a"))), nil, "of weight 0"},
		{"a tree that is too deep", 4, framed(coded(weights(11, 11), abcd("a"))), nil, "of weight 2048"},
		{"a tree that cannot be completed", 4, framed(coded(weights(3, 1), abcd("a"))), nil, "of weight 5"},
		{"a weight of FSE's", 4, framed(coded([]byte{0}, abcd("a"))), nil, "the table of weights is cut off"},
		{"weights without bits", 4, framed(coded([]byte{2, 0xf0, 3}, abcd("a"))), nil, "weights of no bits"},
		{"weights without end", 4, framed(coded([]byte{4, 0xf0, 3, 0, 0x80}, abcd("a"))), nil, "more than 255 weights"},
		{"no bits", 4, framed(coded(twoBits)), nil, "literals of no bits"},
		{"no last bit", 4, framed(coded(twoBits, []byte{1, 0})), nil, "literals of no bits"},
		{"fewer literals", 4, framed(coded(twoBits, abcd("abc"))), nil, "-2 bits are left of literals"},
		{"more literals", 4, framed(coded(twoBits, abcd("abcda"))), nil, "2 bits are left of literals"},
		{"a tree again, of none", 4, framed(packed(codedLiterals(again, 4, false, abcd("abcd")), sequencesOf(0, 0))), nil, "tree is used again"},
		{"a tree again, of another frame", 8, slices.Concat(framed(last(coded(twoBits, abcd("abcd")))), framed(packed(codedLiterals(again, 4, false, abcd("abcd")), sequencesOf(0, 0)))), nil, "tree is used again"},
		{"four streams in five bytes", 8, framed(packed(codedLiterals(compressed, 8, true, twoBits, make([]byte, 5)), sequencesOf(0, 0))), nil, "four streams of literals in 5 bytes"},
		{"four streams of five literals", 5, framed(packed(codedLiterals(compressed, 5, true, twoBits, make([]byte, 20)), sequencesOf(0, 0))), nil, "four streams of literals in 20 bytes, for 5"},
		{"a stream that is cut", 8, framed(packed(codedLiterals(compressed, 8, true, twoBits, []byte{9, 0, 0, 0, 0, 0}, abcd("ab")), sequencesOf(0, 0))), nil, "a stream of literals with 9 bytes of 1"},
		{"a stream of nothing", 8, framed(packed(codedLiterals(compressed, 8, true, twoBits, []byte{1, 0, 0, 0, 0, 0}, abcd("ab")), sequencesOf(0, 0))), nil, "literals of no bits"},

		// Sequences.
		{"no count", 4, framed(packed(rawLiterals("abcd"))), nil, "without a count of sequences"},
		{"half a count", 4, framed(packed(rawLiterals("abcd"), []byte{128})), nil, "without a count of sequences"},
		{"two thirds of a count", 4, framed(packed(rawLiterals("abcd"), []byte{255, 0})), nil, "without a count of sequences"},
		{"a count alone", 4, framed(packed(rawLiterals("abcd"), []byte{1})), nil, "a block of 1 sequences is cut off"},
		{"no tables", 4, framed(packed(rawLiterals("abcd"), []byte{1, singles})), nil, "no symbol of literal lengths"},
		{"tables again, of none", 36, framed(rawBlock(alphabet), packed(rawLiterals("0123"), near(agains, false))), nil, "a table of literal lengths is used again"},
		{"no bits of sequences", 10, framed(packed(rawLiterals("0123"), sequencesOf(1, 0))), nil, "1 sequences of no bits"},
		{"few bits of sequences", 10, framed(packed(rawLiterals("0123"), sequencesOf(1, 0, backwards(bit{0, 10})))), nil, "bits are left of 1 sequences"},
		{"a sequence less", 32, framed(rawBlock(alphabet), packed(rawLiterals("0123"), sequencesOf(1, singles, []byte{4, 4, 3}, backwards(bit{7, 4}, bit{7, 4})))), nil, "4 bits are left of 1 sequences"},
		{"many literals of a sequence", 36, framed(rawBlock(alphabet), packed(rawLiterals("012"), near(singles, false))), nil, "a run of 4 literals, 3 are left"},
		{"a long match", MaxSpan, framed(rawBlock(alphabet), packed(rawLiterals(""), match(10, MaxBlock+1))), nil, "a block that decodes to more than 131072"},
		{"an offset of 0", 30, framed(rawBlock(alphabet), packed(rawLiterals(""), sequencesOf(1, singles, []byte{0, 1, 0}, backwards(bit{1, 1})))), nil, "an offset of 0"},
		{"a large table", 4, framed(packed(rawLiterals("abcd"), []byte{1, modeOwn << 6, 15, 0})), nil, "the table of literal lengths is too large"},
		{"many symbols", 4, framed(packed(rawLiterals("abcd"), []byte{1, modeOwn << 6, 0x10, 0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff})), nil, "the table of literal lengths has too many symbols"},
		{"many symbols of -1", 4, framed(packed(rawLiterals("abcd"), append([]byte{1, modeOwn << 6, 3}, make([]byte, 40)...))), nil, "the table of literal lengths has too many symbols"},
		{"a cut table", 4, framed(packed(rawLiterals("abcd"), []byte{1, modeOwn << 6, 0x30})), nil, "the table of literal lengths is cut off"},
	}
	for _, c := range cases {
		if _, err := decode(t, c.size, c.stored, c.state); err == nil || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v, want it to say %q", c.what, err, c.text)
		}
		if len(c.state) == 0 { // and the library has nothing else to say
			if p, err := whole(c.stored); err == nil && len(p) >= c.size && c.size > 0 && !strings.Contains(c.what, "offset of 0") && !strings.Contains(c.what, "more than is wanted") {
				t.Errorf("%s: the library makes %d bytes of it", c.what, len(p))
			}
		}
	}
	// The same where a stream is cut: either the library refuses it, or the cutter does.
	for _, c := range cases {
		if len(c.state) > 0 || strings.Contains(c.what, "more than is wanted") || strings.Contains(c.what, "no more") || strings.Contains(c.what, "nothing") {
			continue
		}
		d := library(t)
		r := New(bytes.NewReader(c.stored), d, func(Frame) error { return nil })
		r.Cut(NewCutter(1, 1, func(index.Span, []byte) error { return nil }))
		if p, err := io.ReadAll(r); err == nil {
			if err := r.Whole(); !errors.Is(err, index.ErrCorrupt) {
				t.Errorf("%s: %d bytes were cut, %v", c.what, len(p), err)
			}
		}
	}
}

// TestMixed: frames of all sizes, with skippable ones between and empty ones, make spans of
// several frames, of parts of one, and of the end of one and the begin of another.
func TestMixed(t *testing.T) {
	var stored, plain []byte
	e, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(16<<10), zstd.WithZeroFrames(true)) // and blocks
	if err != nil {
		t.Fatal(err)
	}
	text := samples(300_000)["mixed"]
	for i, n := range []int{0, 100, 0, 5000, 60_000, 10, 0, 10, 70_000, 3000, 3000, 3000, 100_000, 0} {
		if i%3 == 0 {
			stored = append(stored, skippable...)
		}
		stored = e.EncodeAll(text[:n], stored)
		plain = append(plain, text[:n]...)
		text = text[n:]
	}
	stored = append(append(stored, skippable...), framed(10, last(rawBlock(nil)))...)
	for _, every := range []int64{1, 1000, 4000, 20_000, 50_000, 100_000, 1 << 19} {
		got, pieces, err := cut(t, stored, every)
		if err != nil || !bytes.Equal(got, plain) {
			t.Fatal(len(got), err)
		}
		check(t, stored, plain, pieces)
		for i, p := range pieces {
			if p.Size < every && i+1 < len(pieces) {
				t.Errorf("every %d: span %d has %d bytes", every, i, p.Size)
			}
		}
		count := map[chunk.Codec]int{}
		into := 0 // spans that begin inside of a frame and end in another
		for _, p := range pieces {
			count[p.Codec]++
			if p.state != nil && bytes.Contains(stored[p.Offset:][:p.Length], []byte("\x28\xb5\x2f\xfd")) {
				into++
			}
		}
		switch {
		case every == 1000 && (count[chunk.Zstd] < 4 || count[chunk.ZstdBlocks] < 10), every == 20_000 && into < 2, every == 1<<19 && (len(pieces) != 1 || count[chunk.Zstd] != 1):
			t.Errorf("every %d: %v, %d of them in two frames", every, count, into)
		}
	}
	if _, pieces, err := cut(t, []byte(skippable), 1); err != nil || len(pieces) != 0 {
		t.Errorf("no frame: %d spans, %v", len(pieces), err)
	}
}

// TestLong: a stream of many times what is kept of it.
func TestLong(t *testing.T) {
	plain := bytes.Repeat(samples(2 << 20)["mixed"], 5)
	e, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(256<<10))
	if err != nil {
		t.Fatal(err)
	}
	testSpans(t, e.EncodeAll(plain, nil), plain)
}

// TestKeepFails: who keeps spans may fail. It is not called again, and told.
func TestKeepFails(t *testing.T) {
	stored, _ := made()
	no := errors.New("no")
	for fail := 1; fail <= 13; fail++ {
		calls := 0
		r := New(bytes.NewReader(stored), library(t), func(Frame) error { return nil })
		r.Cut(NewCutter(1, 1, func(index.Span, []byte) error {
			if calls++; calls == fail {
				return no
			}
			return nil
		}))
		_, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := r.Whole(); err != no || calls != fail {
				t.Errorf("the %dth of %d fails: %v", fail, calls, err)
			}
		}
	}
	r := New(bytes.NewReader(stored), library(t), func(Frame) error { return nil })
	r.Cut(NewCutter(1, 1, func(index.Span, []byte) error { return nil }))
	if _, err := io.ReadFull(r, make([]byte, 60)); err != nil {
		t.Fatal(err)
	}
	if err := r.Whole(); !errors.Is(err, index.ErrCorrupt) || !strings.Contains(err.Error(), "have made 60") {
		t.Errorf("a part: %v", err)
	}
}

// TestWholeAgain: that a stream has ended may be said twice.
func TestWholeAgain(t *testing.T) {
	stored, _ := made()
	for _, every := range []int64{1, 1 << 19} {
		calls := 0
		r := New(bytes.NewReader(stored), library(t), func(Frame) error { return nil })
		r.Cut(NewCutter(every, every, func(index.Span, []byte) error { calls++; return nil }))
		if _, err := io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
		first := r.Whole()
		had := calls
		if again := r.Whole(); first != nil || again != nil || had == 0 || calls != had {
			t.Errorf("every %d: %d spans, %v; then %d, %v", every, had, first, calls, again)
		}
	}
}

// TestEmptyBlocks: a span may have any number of blocks of nothing, which take no memory.
func TestEmptyBlocks(t *testing.T) {
	stored := append(bytes.Repeat(rawBlock(nil), 1<<18), last(rawBlock([]byte("x")))...)
	d := new(decoder)
	if err := d.read(1, stored, (&state{offsets: [3]uint32{1, 4, 8}}).append(nil)); err != nil {
		t.Fatal(err)
	}
	if cap(d.blocks) > 10 {
		t.Errorf("%d blocks", cap(d.blocks))
	}
	if p, err := decode(t, 1, stored, (&state{offsets: [3]uint32{1, 4, 8}}).append(nil)); err != nil || string(p) != "x" {
		t.Errorf("%q, %v", p, err)
	}
}
