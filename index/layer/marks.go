package layer

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/zran"
)

// Marks notes, while a layer is decompressed, where its stream can be entered.
type Marks struct {
	Every int64 // least bytes of the stream between two spans; must be positive

	// Window keeps what decoding a span of a gzip layer needs besides, at most
	// 32 KiB, and says where. It is called from the goroutine that inflates; the
	// window is valid during the call only. An error ends decompressing.
	Window func(window []byte) (index.Window, error)

	// Spans covers the stream once it was read to its end.
	Spans []index.Span

	until int64 // end of the last zstd frame: skippable ones are no part of a span
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
func (m *Marks) end(kind Compression, size, stored int64) {
	switch kind {
	case None:
		m.Spans = []index.Span{{}}
	case Zstd:
		stored = m.until
	}
	m.close(size, stored)
}

// frames decodes a zstd stream frame by frame, so that it is known where each
// begins. A span is one frame, or as many as make Marks.Every bytes; a whole
// layer, if it is one frame.
type frames struct {
	src  *bufio.Reader
	d    *zstd.Decoder
	m    *Marks
	n    int64  // bytes decoded
	at   int64  // bytes of src taken
	left int    // of the current block of the current frame, its header included
	last bool   // it is the frame's last block
	sum  bool   // a checksum follows
	in   bool   // in a frame
	head []byte // of the frame: still to be given to the decoder
}

func (f *frames) Read(p []byte) (int, error) {
	for {
		if f.in {
			n, err := f.d.Read(p)
			f.n += int64(n)
			if err == io.EOF {
				f.in, f.m.until, err = false, f.at, nil
			}
			if n > 0 || err != nil {
				return n, err
			}
			continue
		}
		if err := f.next(); err != nil {
			return 0, err
		}
	}
}

// next begins the next frame. Skippable ones are passed over.
func (f *frames) next() error {
	at := f.at
	magic, err := f.src.Peek(8)
	if len(magic) == 0 {
		return err
	}
	if len(magic) == 8 && magic[0]&0xf0 == 0x50 && string(magic[1:4]) == "\x2a\x4d\x18" {
		n := 8 + int64(binary.LittleEndian.Uint32(magic[4:]))
		m, err := io.CopyN(io.Discard, f.src, n)
		f.at += m
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return err
	}
	var h zstd.Header
	head, err := f.src.Peek(zstd.HeaderMaxSize)
	if err := h.Decode(head); err != nil {
		return fmt.Errorf("frame header at offset %d: %w", at, err)
	}
	if err != nil && err != io.EOF {
		return err
	}
	f.head = append(f.head[:0], head[:h.HeaderSize]...)
	if _, err := f.src.Discard(h.HeaderSize); err != nil {
		return err
	}
	f.at += int64(h.HeaderSize)
	f.sum, f.last, f.left, f.in = h.HasCheckSum, false, 0, true
	if k := len(f.m.Spans); k == 0 || f.n-f.m.Spans[k-1].Start >= f.m.Every {
		f.m.close(f.n, f.m.until)
		f.m.Spans = append(f.m.Spans, index.Span{Start: f.n, Offset: at, Codec: chunk.Zstd})
	}
	return f.d.Reset(frame{f})
}

// frame gives the decoder the bytes of one frame.
type frame struct{ f *frames }

func (r frame) Read(p []byte) (n int, err error) {
	f := r.f
	if len(f.head) > 0 {
		n = copy(p, f.head)
		f.head = f.head[n:]
		return n, nil
	}
	if f.left == 0 {
		if f.last {
			return 0, io.EOF
		}
		b, err := f.src.Peek(3)
		if err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return 0, err
		}
		v := uint32(b[0]) | uint32(b[1])<<8 | uint32(b[2])<<16
		f.left = 3 + int(v>>3)
		if v>>1&3 == 1 { // a byte that repeats
			f.left = 3 + 1
		}
		if f.last = v&1 != 0; f.last && f.sum {
			f.left += 4
		}
	}
	n, err = f.src.Read(p[:min(len(p), f.left)])
	f.left -= n
	f.at += int64(n)
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}
