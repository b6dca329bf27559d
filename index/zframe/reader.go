package zframe

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
)

// Frame is one that begins.
type Frame struct {
	Out    int64 // bytes decoded of those before
	Offset int64 // of its first byte
	Last   int64 // where the frame before ended, skippable ones not counted
	Window int64 // bytes of memory that decoding it takes, roughly
}

// Reader decodes all frames of a stream. Skippable ones are passed over.
type Reader struct {
	src   *bufio.Reader
	d     *zstd.Decoder
	begin func(Frame) error
	n     int64  // bytes decoded
	at    int64  // bytes of src taken
	end   int64  // of the last frame
	left  int    // of the current block of the current frame, its header included
	last  bool   // it is the frame's last block
	sum   bool   // a checksum follows
	in    bool   // in a frame
	head  []byte // of the frame: still to be given to the decoder

	cutter *Cutter // that is told all, or nil
	block  []byte  // for it: what was read of the current block
}

// New reads src by a decoder, which must have a concurrency of 1. begin is called for
// each frame before it is decoded; its errors are passed on.
func New(src io.Reader, d *zstd.Decoder, begin func(Frame) error) *Reader {
	return &Reader{src: bufio.NewReader(src), d: d, begin: begin}
}

// Cut has a cutter told of all frames, blocks and content. It comes before the first Read.
func (r *Reader) Cut(c *Cutter) { r.cutter = c }

// Whole ends a Reader whose cutter is to have been told of all. It returns why the cutter
// has not kept all spans: keep has failed, or there is a frame that cannot be cut.
func (r *Reader) Whole() error { return r.cutter.close(r.end) }

// End is where the last frame ended that was read.
func (r *Reader) End() int64 { return r.end }

func (r *Reader) Read(p []byte) (int, error) {
	for {
		if r.in {
			n, err := r.d.Read(p)
			r.n += int64(n)
			if r.cutter != nil {
				r.cutter.output(p[:n])
			}
			if err == io.EOF {
				r.in, r.end, err = false, r.at, nil
			}
			if n > 0 || err != nil {
				return n, err
			}
			continue
		}
		if err := r.next(); err != nil {
			return 0, err
		}
	}
}

// next begins the next frame.
func (r *Reader) next() error {
	at := r.at
	magic, err := r.src.Peek(8)
	if len(magic) == 0 {
		return err
	}
	if n, ok := skippableSize(magic); ok {
		m, err := io.CopyN(io.Discard, r.src, n)
		r.at += m
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return err
	}
	var h zstd.Header
	head, err := r.src.Peek(zstd.HeaderMaxSize)
	if err != nil && err != io.EOF {
		return err
	}
	if err := h.Decode(head); err != nil {
		return fmt.Errorf("frame header at offset %d: %w", at, err)
	}
	window := h.WindowSize
	if h.SingleSegment {
		window = max(window, h.FrameContentSize)
	}
	if err := r.begin(Frame{Out: r.n, Offset: at, Last: r.end, Window: int64(min(window, 1<<62))}); err != nil {
		return err
	}
	if r.cutter != nil {
		r.cutter.beginFrame(&h, at, r.end)
	}
	r.head = append(r.head[:0], head[:h.HeaderSize]...)
	if _, err := r.src.Discard(h.HeaderSize); err != nil {
		return err
	}
	r.at += int64(h.HeaderSize)
	r.sum, r.last, r.left, r.in = h.HasCheckSum, false, 0, true
	return r.d.Reset(frame{r})
}

// skippableSize tells whether p begins a skippable frame, and its size.
func skippableSize(p []byte) (int64, bool) {
	if len(p) < 8 || p[0]&0xf0 != 0x50 || string(p[1:4]) != "\x2a\x4d\x18" {
		return 0, false
	}
	return 8 + int64(binary.LittleEndian.Uint32(p[4:])), true
}

// frame gives the decoder the bytes of one frame.
type frame struct{ r *Reader }

func (f frame) Read(p []byte) (n int, err error) {
	r := f.r
	if len(r.head) > 0 {
		n = copy(p, r.head)
		r.head = r.head[n:]
		return n, nil
	}
	if r.left == 0 {
		if r.last {
			return 0, io.EOF
		}
		b, err := r.src.Peek(headerSize)
		if err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return 0, err
		}
		h, err := parseHeader(b)
		if err != nil {
			return 0, err
		}
		r.left = headerSize + h.stored()
		if r.last = h.last; r.last && r.sum {
			r.left += sumSize
		}
	}
	n, err = r.src.Read(p[:min(len(p), r.left)])
	r.left -= n
	r.at += int64(n)
	if r.cutter != nil {
		if r.block = append(r.block, p[:n]...); r.left == 0 {
			r.cutter.block(r.block, r.at-int64(len(r.block)))
			r.block = r.block[:0]
		}
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}
