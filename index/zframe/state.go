package zframe

import (
	"encoding/binary"
	"math"
)

// A state is what decoding a span needs that begins inside of a frame, as far as the span
// uses it:
//
//	flags    a byte; bit 0: a checksum of four bytes ends the frame; bit 1: a tree follows
//	offsets  three varints (encoding/binary)
//	tree     as a block has it (section 4.2.1)
//	tables   of literal lengths, offsets and match lengths: a byte, 0 and nothing for the
//	         predefined one, 1 and a symbol, 2 and a table as a block has it (section 4.1.1),
//	         3 and nothing if there is none
//	content  the bytes before the span that matches in it copy, each once and in their
//	         order. Which these are is known when the sequences of the span are.
type state struct {
	sum     bool
	offsets [3]uint32
	tree    []byte // nil: none
	tables  [kinds][]byte
	content []byte
}

const (
	flagSum = 1 << iota
	flagTree
)

func (s *state) append(p []byte) []byte {
	var flags byte
	if s.sum {
		flags |= flagSum
	}
	if s.tree != nil {
		flags |= flagTree
	}
	p = append(p, flags)
	for _, o := range s.offsets {
		p = binary.AppendUvarint(p, uint64(o))
	}
	p = append(p, s.tree...)
	for _, t := range s.tables {
		if t == nil {
			t = []byte{modeAgain}
		}
		p = append(p, t...)
	}
	return append(p, s.content...)
}

// enter makes d what a state says.
func (d *decoder) enter(p []byte) (sum bool, err error) {
	if p[0] > flagSum|flagTree {
		return false, bad("a state with flags %#x", p[0])
	}
	flags := p[0]
	p = p[1:]
	for i := range d.offsets {
		v, n := binary.Uvarint(p)
		if n <= 0 || v == 0 || v > math.MaxUint32 {
			return false, bad("offset %d of a state is %d", i, v)
		}
		d.offsets[i], p = uint32(v), p[n:]
	}
	if flags&flagTree != 0 {
		n, err := treeSize(p)
		if err == nil {
			err = d.tree.read(p[:n])
		}
		if err != nil {
			return false, err
		}
		d.hasTree, p = true, p[n:]
	}
	for k := range kinds {
		if len(p) == 0 {
			return false, bad("a state without tables")
		}
		mode := p[0]
		if mode > modeAgain {
			return false, bad("a table of kind %d", mode)
		}
		if p = p[1:]; mode == modeAgain {
			continue
		}
		n, err := d.tables.set(k, mode, p)
		if err != nil {
			return false, err
		}
		p = p[n:]
	}
	d.content = p
	return flags&flagSum != 0, nil
}

// reference is a match, or the beginning of one, that lies before its span.
type reference struct {
	before   uint32 // bytes before the span, at least one; its length is not more
	length   uint32
	sequence uint32 // that it is of
	at       uint32 // in the content of the state
}

// place sorts references by where they begin and says where in the content they lie. It
// returns how long that is.
func place(refs, spare []reference) (_, _ []reference, size uint32) {
	const width = 9
	for shift := 0; shift < 3*width; shift += width { // up to MaxWindow
		var count [1 << width]uint32
		for i := range refs {
			count[^refs[i].before>>shift&(1<<width-1)]++
		}
		at := uint32(0)
		for i, n := range count {
			count[i] = at
			at += n
		}
		if cap(spare) < len(refs) {
			spare = make([]reference, len(refs), cap(refs))
		}
		spare = spare[:len(refs)]
		for i := range refs {
			n := &count[^refs[i].before>>shift&(1<<width-1)]
			spare[*n] = refs[i]
			*n++
		}
		refs, spare = spare, refs
	}
	var from, to int64 // a run of them, by -before
	for i := range refs {
		r := &refs[i]
		begin := -int64(r.before)
		if i == 0 || begin > to {
			size += uint32(to - from)
			from, to = begin, begin
		}
		r.at = size + uint32(begin-from)
		to = max(to, begin+int64(r.length))
	}
	return refs, spare, size + uint32(to-from)
}
