package layer

import (
	"cmp"
	"io"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/zframe"
	"github.com/shale-image/shale/index/zran"
)

// Marks notes, while a layer is decompressed, where its stream can be entered.
type Marks struct {
	Every  int64 // least bytes of the stream between two spans; must be positive
	Blocks int64 // likewise, of spans inside of a zstd frame

	// Window keeps what decoding a span needs besides, at most 32 KiB of a gzip layer, at most
	// zframe.MaxState of a zstd one, and says where: one behind the other. It is called from
	// the goroutine that inflates; the window is valid during the call only. An error ends
	// decompressing.
	Window func(window []byte) (index.Window, error)

	// Spans covers the stream once it was read to its end.
	Spans []index.Span

	frames *zframe.Reader // of a zstd layer
	blocks []index.Span   // likewise: Spans if frames are cut
	failed error          // of Window, for blocks
}

// DecompressMarked is Decompress that also notes where the stream can be
// entered.
func DecompressMarked(r io.Reader, lim index.Limits, m *Marks) (io.ReadCloser, Compression, error) {
	return decompress(r, lim, m)
}

// close ends the last span where another begins.
func (m *Marks) close(start, offset int64) {
	if n := len(m.Spans); n > 0 {
		s := &m.Spans[n-1]
		s.Size, s.Length = start-s.Start, offset-s.Offset
		if s.Size == 0 { // a member or frame of nothing: the next span begins before it
			m.Spans = m.Spans[:n-1]
		}
	}
}

func (m *Marks) checkpoint(cp zran.Checkpoint, window []byte) error {
	s := index.Span{Start: cp.Out, Offset: cp.In, Codec: chunk.Gzip, Bits: cp.Bits}
	end := cp.In
	if cp.Bits > 0 {
		end++
	}
	m.close(cp.Out, end)
	if !cp.Member {
		var err error
		if s.Window, err = m.Window(window); err != nil {
			return err
		}
	}
	m.Spans = append(m.Spans, s)
	return nil
}

// end closes the last span at the end of the stream.
func (m *Marks) end(kind Compression, size, stored int64) error {
	switch kind {
	case None:
		m.Spans = []index.Span{{}}
	case Zstd:
		stored = m.frames.End() // skippable ones are no part of a span
		if m.frames.Whole() == nil && m.worth(stored) {
			m.Spans = m.blocks
			return m.failed
		}
	}
	m.close(size, stored)
	return m.failed
}

// maxStates is how many times as large as what is stored the states of a zstd layer may be.
// A Debian layer has 0.3 to 0.4 times as much; content that comes again and again could
// have any number.
const maxStates = 2

// worth tells whether frames are cut, and the states are not too large.
func (m *Marks) worth(stored int64) bool {
	cut, states := false, int64(0)
	for i := range m.blocks {
		cut = cut || m.blocks[i].Codec == chunk.ZstdBlocks
		states += int64(m.blocks[i].Window.Length)
	}
	return cut && states <= maxStates*stored
}

// block notes a span of a zstd layer, whose frames are cut.
func (m *Marks) block(s index.Span, state []byte) (err error) {
	if state != nil {
		s.Window, err = m.Window(state)
		m.failed = cmp.Or(m.failed, err)
	}
	m.blocks = append(m.blocks, s)
	return err
}

// frame notes where a zstd frame begins. A span is one frame, or as many as make
// Marks.Every bytes; a whole layer, if it is one frame.
func (m *Marks) frame(f zframe.Frame) error {
	if k := len(m.Spans); k == 0 || f.Out-m.Spans[k-1].Start >= m.Every {
		m.close(f.Out, f.Last)
		m.Spans = append(m.Spans, index.Span{Start: f.Out, Offset: f.Offset, Codec: chunk.Zstd})
	}
	return nil
}
