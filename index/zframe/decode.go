package zframe

import (
	"encoding/binary"
	"sync"

	"github.com/klauspost/compress/zstd"
)

// decoder decodes one span after the other. Its tables are large, so it is used again.
type decoder struct {
	// The state between blocks.
	offsets [3]uint32
	tree    tree
	hasTree bool
	tables  tables

	// What the span consists of.
	blocks    []block
	sequences []sequence
	literals  []byte
	refs      []reference
	spare     []reference
	content   []byte // of the state
}

// block is a block that has been read: its literals, and where in decoder.sequences those
// end that go with them.
type block struct {
	literals  []byte
	sequences int
}

var decoders = sync.Pool{New: func() any { return new(decoder) }}

// Decode fills dst from the stored bytes of a span and its state, which is empty if the
// span begins with a frame. Errors wrap index.ErrCorrupt. A wrong state can make wrong
// bytes; who needs to know has to have a digest of them.
func Decode(dst, stored, state []byte) error {
	d := decoders.Get().(*decoder)
	defer d.release()
	if err := d.read(len(dst), stored, state); err != nil {
		return err
	}
	d.execute(dst)
	return nil
}

// Memory is how many bytes decoding a span takes besides, of what encoders make.
func Memory(size int64) int64 { return 256<<10 + 2*size }

// release has d used again, without what is its caller's, unless it has grown large.
func (d *decoder) release() {
	clear(d.blocks)
	if d.content = nil; cap(d.sequences) <= 256<<10 && cap(d.blocks) <= 4<<10 {
		decoders.Put(d)
	}
}

// read reads the blocks of a span of so many bytes.
func (d *decoder) read(size int, p, state []byte) (err error) {
	d.reset()
	d.blocks, d.sequences, d.refs, d.content = d.blocks[:0], d.sequences[:0], d.refs[:0], nil
	if d.literals = d.literals[:0]; cap(d.literals) < size {
		d.literals = make([]byte, 0, size)
	}
	in, entered, sum := len(state) > 0, len(state) > 0, false
	if in {
		if sum, err = d.enter(state); err != nil {
			return err
		}
	}
	stored, frame := len(p), 0 // where in the span the frame begins
	for n := 0; n < size; {
		if !in {
			if skip, ok := skippableSize(p); ok {
				if skip > int64(len(p)) {
					return bad("a skippable frame of %d bytes at %d of %d", skip, stored-len(p), stored)
				}
				p = p[skip:]
				continue
			}
			var h zstd.Header
			if err := h.Decode(p); err != nil || h.Skippable || h.DictionaryID != 0 {
				return bad("no frame that can be decoded at %d of %d bytes", stored-len(p), stored)
			}
			p = p[h.HeaderSize:]
			d.reset()
			in, entered, frame, sum = true, false, n, h.HasCheckSum
		}
		if len(p) < headerSize {
			return bad("no block at %d of %d bytes", stored-len(p), stored)
		}
		h, err := parseHeader(p)
		if err != nil {
			return err
		}
		if headerSize+h.stored() > len(p) {
			return bad("a block of %d bytes at %d of %d", h.stored(), stored-len(p), stored)
		}
		begin := n
		b := p[headerSize:][:h.stored()]
		p = p[headerSize+len(b):]
		first := len(d.sequences)
		if n, err = d.block(h, b, n, size); err != nil {
			return err
		}
		if err := d.refer(first, begin, frame, entered); err != nil {
			return err
		}
		if h.last {
			if in = false; sum {
				p = p[min(sumSize, len(p)):]
			}
		}
	}
	var content uint32
	d.refs, d.spare, content = place(d.refs, d.spare)
	if int64(content) != int64(len(d.content)) {
		return bad("a state with %d bytes of content, the span copies %d", len(d.content), content)
	}
	for i := range d.refs {
		r := &d.refs[i]
		d.sequences[r.sequence].at = r.at
	}
	return nil
}

// reset makes d what a frame begins with.
func (d *decoder) reset() {
	d.offsets = [3]uint32{1, 4, 8}
	d.tables.in = [kinds]*table{}
	d.hasTree = false
}

// block reads a block at n in a span, and returns where it ends.
func (d *decoder) block(h header, p []byte, n, size int) (int, error) {
	literals, behind := p, h.size
	switch h.kind {
	case repeat:
		if h.size > size-n {
			break
		}
		literals = d.room(h.size)
		for i := range literals {
			literals[i] = p[0]
		}
	case compressed:
		s, rest, err := parseLiterals(p)
		if err != nil {
			return 0, err
		}
		if d.sequences, behind, err = d.tables.sequences(d.sequences, rest, s.size, &d.offsets); err != nil {
			return 0, err
		}
		if behind > size-n {
			break
		}
		if literals, err = d.decodeLiterals(&s); err != nil {
			return 0, err
		}
	}
	if behind > size-n {
		return 0, bad("a block of %d bytes, %d are wanted", behind, size-n)
	}
	if behind > 0 { // of those of nothing there may be many
		d.blocks = append(d.blocks, block{literals, len(d.sequences)})
	}
	return n + behind, nil
}

// room returns room for literals: there are no more than the span decodes to.
func (d *decoder) room(n int) []byte {
	at := len(d.literals)
	d.literals = d.literals[:at+n]
	return d.literals[at:]
}

// refer notes which of the sequences from first on, which begin at n in the span, copy
// from before it. Only in a frame that was entered they may.
func (d *decoder) refer(first, n, frame int, entered bool) error {
	for i := first; i < len(d.sequences); i++ {
		q := &d.sequences[i]
		n += int(q.literals)
		if from := n - int(q.offset); from < frame {
			if !entered || from < -MaxWindow {
				return bad("a match %d bytes before its frame or what is kept", frame-from)
			}
			d.refs = append(d.refs, reference{before: uint32(-from), length: min(q.length, uint32(-from)), sequence: uint32(i)})
		}
		n += int(q.length)
	}
	return nil
}

// execute makes dst of what was read.
func (d *decoder) execute(dst []byte) {
	n, i := 0, 0
	for _, b := range d.blocks {
		literals := b.literals
		for ; i < b.sequences; i++ {
			q := &d.sequences[i]
			l := int(q.literals)
			if l <= 16 && len(literals) >= 16 && len(dst)-n >= 16 {
				copy16(dst[n:], literals)
			} else {
				copy(dst[n:], literals[:l])
			}
			n, literals = n+l, literals[l:]
			length, from := int(q.length), n-int(q.offset)
			if from < 0 {
				if p := d.content[q.at:]; length <= min(16, -from) && len(p) >= 16 && len(dst)-n >= 16 {
					copy16(dst[n:], p)
					n += length
					continue
				}
				m := copy(dst[n:n+length], d.content[q.at:][:min(length, -from)])
				if n, length = n+m, length-m; length == 0 {
					continue
				}
				from = 0
			}
			switch gap := n - from; {
			case gap >= 16 && length <= 16 && len(dst)-n >= 16:
				copy16(dst[n:], dst[from:])
				n += length
			case gap >= length:
				copy(dst[n:n+length], dst[from:])
				n += length
			default: // what is copied is copied from
				for end := n + length; n < end; {
					n += copy(dst[n:end], dst[from:n])
				}
			}
		}
		n += copy(dst[n:], literals)
	}
}

// copy16 copies 16 bytes, which both have.
func copy16(dst, src []byte) {
	a, b := binary.LittleEndian.Uint64(src), binary.LittleEndian.Uint64(src[8:])
	binary.LittleEndian.PutUint64(dst, a)
	binary.LittleEndian.PutUint64(dst[8:], b)
}

// decodeLiterals returns the literals of a block, valid until the next.
func (d *decoder) decodeLiterals(s *section) ([]byte, error) {
	if s.kind == raw {
		return s.stored, nil
	}
	out := d.room(s.size)
	if s.kind == repeat {
		for i := range out {
			out[i] = s.stored[0]
		}
		return out, nil
	}
	if s.kind == compressed {
		d.hasTree = false
		if err := d.tree.read(s.tree); err != nil {
			return nil, err
		}
		d.hasTree = true
	}
	if !d.hasTree {
		return nil, bad("a tree is used again where none was")
	}
	if s.four {
		return out, d.tree.decode4(out, s.stored)
	}
	return out, d.tree.decode(out, s.stored)
}
