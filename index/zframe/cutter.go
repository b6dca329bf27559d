package zframe

import (
	"github.com/klauspost/compress/zstd"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// MaxWindow is how much of the content before a span is kept, in bytes: what spans may copy
// of a frame that is cut, whatever its window.
const MaxWindow = 32 << 20

// Cutter says where spans of a stream begin, from its blocks, and keeps their states.
type Cutter struct {
	frames, blocks int64 // least distances
	keep           func(s index.Span, state []byte) error

	span    index.Span
	inside  bool  // the span begins inside of a frame
	start   state // of the span; its content is found when it ends
	count   int   // of spans
	needs   uses  // what the span takes of the state
	has     uses  // and what it need not, having its own
	refs    []reference
	spare   []reference
	window  int64 // what the frame's blocks may copy from before a span
	state   state // behind the block that was read last
	tables  tables
	at      int64 // bytes the stream decodes to, up to there
	frame   int64 // and up to the frame
	seqs    []sequence
	history history
	bytes   []byte
	err     error
}

// uses are parts of a state.
type uses struct {
	tree   bool
	tables [kinds]bool
}

// NewCutter returns a Cutter of spans that begin with a frame at least frames bytes of
// content behind the one before, or inside of one at least blocks bytes behind. It gives
// each one to keep when it is over, in order: of whole frames (chunk.Zstd), or of blocks
// (chunk.ZstdBlocks), with its state, valid during the call, unless it begins with a frame.
func NewCutter(frames, blocks int64, keep func(s index.Span, state []byte) error) *Cutter {
	return &Cutter{frames: frames, blocks: blocks, keep: keep}
}

// begin a frame whose first byte is at offset. The one before ended at last.
func (c *Cutter) beginFrame(h *zstd.Header, offset, last int64) {
	if c.err != nil {
		return
	}
	c.window = int64(min(h.WindowSize, MaxWindow))
	if h.SingleSegment {
		c.window = int64(min(h.FrameContentSize, MaxWindow))
	}
	if h.DictionaryID != 0 {
		c.err = bad("a frame with dictionary %d", h.DictionaryID)
		return
	}
	if c.count == 0 || c.at-c.span.Start >= c.frames {
		c.end(last, chunk.Zstd)
		c.begin(offset, false)
	}
	c.history.grow(c.window)
	c.state = state{sum: h.HasCheckSum, offsets: [3]uint32{1, 4, 8}}
	c.tables.in = [kinds]*table{}
	c.frame = c.at
	c.has = uses{true, [kinds]bool{true, true, true}}
}

// block reads a block of the frame, with its header and what is behind the last one, that
// begins at offset.
func (c *Cutter) block(p []byte, offset int64) {
	if c.at-c.span.Start >= c.blocks && c.history.end >= c.span.Start {
		c.end(offset, chunk.ZstdBlocks)
		c.begin(offset, true)
	}
	if c.err == nil {
		c.err = c.read(p)
	}
	if size := c.at - c.span.Start; c.err == nil && (size > MaxSpan || offset+int64(len(p))-c.span.Offset > 2*size+index.MoreStored) {
		c.err = bad("a span of %d bytes, stored as %d", size, offset+int64(len(p))-c.span.Offset)
	}
}

func (c *Cutter) read(p []byte) error {
	h, err := parseHeader(p)
	if err != nil {
		return err
	}
	if h.kind != compressed {
		c.at += int64(h.size)
		return nil
	}
	s, rest, err := parseLiterals(p[headerSize:][:h.size])
	if err != nil {
		return err
	}
	switch s.kind {
	case compressed:
		c.has.tree = true
		c.state.tree = append(c.state.tree[:0], s.tree...)
	case again:
		c.needs.tree = c.needs.tree || !c.has.tree
	}
	at := c.at
	var size int
	c.seqs, size, err = c.tables.sequences(c.seqs[:0], rest, s.size, &c.state.offsets)
	if err != nil {
		return err
	}
	for k, mode := range c.tables.modes {
		switch {
		case mode < modeAgain:
			c.has.tables[k] = true
		case mode == modeAgain:
			c.needs.tables[k] = c.needs.tables[k] || !c.has.tables[k]
		}
	}
	for _, q := range c.seqs {
		at += int64(q.literals)
		from := at - int64(q.offset)
		if from < c.span.Start || from < c.frame {
			if from < c.frame || int64(q.offset) > c.window {
				return bad("a match %d bytes before, of %d that are kept", q.offset, min(c.window, at-c.frame))
			}
			before := c.span.Start - from
			c.refs = append(c.refs, reference{before: uint32(before), length: uint32(min(int64(q.length), before))})
		}
		at += int64(q.length)
	}
	c.at += int64(size)
	return nil
}

// begin begins a span, perhaps inside of a frame.
func (c *Cutter) begin(offset int64, inside bool) {
	c.span, c.inside = index.Span{Start: c.at, Offset: offset}, inside
	c.count++
	if c.needs, c.has = (uses{}), (uses{}); !inside {
		return
	}
	c.start.sum, c.start.offsets = c.state.sum, c.state.offsets
	c.start.tree = append(c.start.tree[:0], c.state.tree...)
	for k := range c.tables.in {
		if c.start.tables[k] = c.start.tables[k][:0]; c.tables.in[k] != nil {
			c.start.tables[k] = append(c.start.tables[k], c.tables.told[k]...)
		}
	}
	c.refs = c.refs[:0]
}

// end gives the span to keep, whose stored bytes end before an offset.
func (c *Cutter) end(behind int64, codec chunk.Codec) {
	if c.count == 0 || c.err != nil || c.at == c.span.Start {
		return
	}
	c.span.Size, c.span.Length, c.span.Codec = c.at-c.span.Start, behind-c.span.Offset, codec
	if !c.inside {
		c.err = c.keep(c.span, nil)
		return
	}
	c.span.Codec = chunk.ZstdBlocks
	s := state{sum: c.start.sum, offsets: c.start.offsets, content: c.start.content[:0]}
	if c.needs.tree {
		s.tree = c.start.tree
	}
	for k, needs := range c.needs.tables {
		if needs {
			s.tables[k] = c.start.tables[k]
		}
	}
	c.refs, c.spare, _ = place(c.refs, c.spare)
	for _, r := range c.refs { // each goes on where those before have ended, or earlier
		if has := uint32(len(s.content)); r.at+r.length > has {
			from := c.span.Start - int64(r.before) + int64(has-r.at)
			s.content = append(s.content, c.history.get(from, from+int64(r.at+r.length-has))...)
		}
	}
	c.start.content = s.content
	c.bytes = s.append(c.bytes[:0])
	c.err = c.keep(c.span, c.bytes)
}

// output takes what the blocks decode to, in order.
func (c *Cutter) output(p []byte) {
	if c.err == nil {
		c.history.add(p)
	}
}

// close ends the last span. It returns why what was kept are not all spans: keep has
// failed, or there is a frame that cannot be cut.
func (c *Cutter) close(last int64) error {
	if c.err == nil && c.history.end != c.at {
		c.err = bad("blocks of %d bytes have made %d", c.at, c.history.end)
	}
	c.end(last, chunk.Zstd)
	c.count = 0
	return c.err
}

// history is the content that was decoded last.
type history struct {
	p     []byte
	keep  int   // bytes of it
	begin int64 // in the stream, of p
	end   int64
}

// grow has h keep a window, and what a span may have behind it.
func (h *history) grow(window int64) { h.keep = max(h.keep, int(window)+2*MaxSpan) }

func (h *history) add(p []byte) {
	if len(h.p)+len(p) > h.keep+h.keep/2 && len(h.p) > h.keep {
		drop := len(h.p) - h.keep
		h.p = h.p[:copy(h.p, h.p[drop:])]
		h.begin += int64(drop)
	}
	h.p = append(h.p, p...)
	h.end += int64(len(p))
}

func (h *history) get(from, to int64) []byte { return h.p[from-h.begin : to-h.begin] }
