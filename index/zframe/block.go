package zframe

import (
	"slices"

	"github.com/shale-image/shale/index"
)

func bad(format string, args ...any) error {
	return index.Errorf(index.ErrCorrupt, name, -1, format, args...)
}

// Kinds of blocks and of their literals.
const (
	raw = iota
	repeat
	compressed
	again // literals: by the tree of a block before; no block is of this kind
)

// header is what the three bytes before a block say.
type header struct {
	last bool
	kind uint8
	size int // of its content, if that is raw or repeated, else of what is stored
}

const (
	headerSize = 3
	sumSize    = 4 // of a checksum behind the last block
)

func parseHeader(p []byte) (h header, err error) {
	v := uint32(p[0]) | uint32(p[1])<<8 | uint32(p[2])<<16
	h = header{last: v&1 != 0, kind: uint8(v >> 1 & 3), size: int(v >> 3)}
	if h.kind > compressed || h.size > MaxBlock {
		return h, bad("a block of kind %d with %d bytes", h.kind, h.size)
	}
	return h, nil
}

// stored is how many bytes follow the header.
func (h header) stored() int {
	if h.kind == repeat {
		return 1
	}
	return h.size
}

// section are the literals of a compressed block.
type section struct {
	kind   uint8
	size   int    // what they decode to
	four   bool   // streams
	tree   []byte // description, of kind compressed
	stored []byte // behind the tree
}

// parseLiterals reads the head of a compressed block, and returns what follows the literals
// (section 3.1.1.3.1).
func parseLiterals(p []byte) (s section, rest []byte, err error) {
	if len(p) < 2 {
		return s, nil, bad("a compressed block of %d bytes", len(p))
	}
	var head uint64
	for i := range min(5, len(p)) {
		head |= uint64(p[i]) << (8 * i)
	}
	s.kind = p[0] & 3
	format := p[0] >> 2 & 3
	var n, stored int
	if s.kind < compressed {
		switch format {
		case 0, 2:
			n, s.size = 1, int(head&0xff>>3)
		case 1:
			n, s.size = 2, int(head&0xffff>>4)
		case 3:
			n, s.size = 3, int(head&0xffffff>>4)
		}
		if stored = s.size; s.kind == repeat {
			stored = 1
		}
	} else {
		n = [4]int{3, 3, 4, 5}[format]
		width := [4]uint{10, 10, 14, 18}[format]
		s.size, stored, s.four = int(head>>4&(1<<width-1)), int(head>>(4+width)&(1<<width-1)), format > 0
	}
	if n+stored > len(p) || s.size > MaxBlock {
		return s, nil, bad("literals of %d bytes, stored in %d of %d", s.size, stored, len(p))
	}
	s.stored, rest = p[n:n+stored], p[n+stored:]
	if s.kind == compressed {
		m, err := treeSize(s.stored)
		if err != nil {
			return s, nil, err
		}
		s.tree, s.stored = s.stored[:m], s.stored[m:]
	}
	return s, rest, nil
}

// sequence is a run of literals and a match behind it, which copies what is offset bytes
// before. If that lies before the span, it is at a place in the content of the state.
type sequence struct{ literals, length, offset, at uint32 }

// How blocks have a table.
const (
	modePredefined = iota
	modeSingle
	modeOwn
	modeAgain
	modeNone // there are no sequences
)

// tables are those of the last block that had any.
type tables struct {
	in    [kinds]*table
	own   [kinds]table
	modes [kinds]uint8 // of the block that was read last
	told  [kinds][]byte
}

// set takes a table that p begins with, and returns how long that is.
func (t *tables) set(k int, mode uint8, p []byte) (n int, err error) {
	switch mode {
	case modePredefined:
		t.in[k] = &predefined[k]
	case modeSingle:
		if len(p) == 0 || int(p[0]) >= len(all[k].base) {
			return 0, bad("no symbol of %s", all[k].name)
		}
		n = 1
		t.own[k].single(&all[k], p[0])
		t.in[k] = &t.own[k]
	case modeOwn:
		if n, err = t.own[k].read(&all[k], p); err != nil {
			return 0, err
		}
		t.in[k] = &t.own[k]
	case modeAgain:
		if t.in[k] == nil {
			return 0, bad("a table of %s is used again where none was", all[k].name)
		}
		return 0, nil
	}
	t.told[k] = append(append(t.told[k][:0], mode), p[:n]...)
	return n, nil
}

// sequences appends the sequences of a compressed block, of which p is what follows the
// literals, to dst (section 3.1.1.3.2). It takes in the tables and the offsets, and
// returns how many bytes the block decodes to.
func (t *tables) sequences(dst []sequence, p []byte, literals int, offsets3 *[3]uint32) (_ []sequence, size int, err error) {
	t.modes = [kinds]uint8{modeNone, modeNone, modeNone}
	var count int
	switch {
	case len(p) > 0 && p[0] < 128:
		count, p = int(p[0]), p[1:]
	case len(p) > 1 && p[0] < 255:
		count, p = int(p[0]-128)<<8+int(p[1]), p[2:]
	case len(p) > 2:
		count, p = int(p[1])+int(p[2])<<8+0x7f00, p[3:]
	default:
		return nil, 0, bad("a block without a count of sequences")
	}
	if count == 0 {
		if len(p) > 0 {
			return nil, 0, bad("%d bytes behind no sequences", len(p))
		}
		return dst, literals, nil
	}
	if len(p) == 0 {
		return nil, 0, bad("a block of %d sequences is cut off", count)
	}
	modes := p[0]
	if modes&3 != 0 {
		return nil, 0, bad("tables of modes %#x", modes)
	}
	p = p[1:]
	for k := range kinds {
		t.modes[k] = modes >> (6 - 2*k) & 3
		n, err := t.set(k, t.modes[k], p)
		if err != nil {
			return nil, 0, err
		}
		p = p[n:]
	}
	var b backward
	if !b.begin(p) {
		return nil, 0, bad("%d sequences of no bits", count)
	}
	ll, of, ml := t.in[literalLengths], t.in[offsets], t.in[matchLengths]
	l, o, m := b.take(ll.log), b.take(of.log), b.take(ml.log)
	r := *offsets3
	left := uint32(literals)
	size = literals
	had := len(dst)
	dst = slices.Grow(dst, count)[:had+count]
	out := dst[had:]
	for i := range out {
		lc, oc, mc := &ll.cells[l&(1<<maxLog-1)], &of.cells[o&(1<<maxLog-1)], &ml.cells[m&(1<<maxLog-1)]
		v := b.next()
		value := oc.base + top(v, oc.extra)
		v <<= oc.extra & 63
		s := &out[i]
		s.length = mc.base + top(v, mc.extra)
		b.left -= int(oc.extra + mc.extra)
		v = b.next()
		s.literals = lc.base + top(v, lc.extra)
		v <<= lc.extra & 63
		b.left -= int(lc.extra)
		if s.literals > left {
			return nil, 0, bad("a run of %d literals, %d are left", s.literals, left)
		}
		left -= s.literals
		if size += int(s.length); size > MaxBlock {
			return nil, 0, bad("a block that decodes to more than %d bytes", MaxBlock)
		}
		if value > 3 {
			r[0], r[1], r[2] = value-3, r[0], r[1]
		} else {
			if s.literals == 0 {
				value++
			}
			switch value {
			case 2:
				r[0], r[1] = r[1], r[0]
			case 3:
				r[0], r[1], r[2] = r[2], r[0], r[1]
			case 4:
				r[0], r[1], r[2] = r[0]-1, r[0], r[1]
			}
			if r[0] == 0 {
				return nil, 0, bad("an offset of 0")
			}
		}
		s.offset = r[0]
		if i+1 == count {
			break
		}
		l = uint32(lc.next) + top(v, lc.read)
		v <<= lc.read & 63
		m = uint32(mc.next) + top(v, mc.read)
		v <<= mc.read & 63
		o = uint32(oc.next) + top(v, oc.read)
		b.left -= int(lc.read + mc.read + oc.read)
	}
	if b.left != 0 {
		return nil, 0, bad("%d bits are left of %d sequences", b.left, count)
	}
	*offsets3 = r
	return dst, size, nil
}
