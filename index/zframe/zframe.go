// Package zframe reads a zstd stream frame by frame, so that who reads it knows where
// each begins and what it asks for before anything is allocated for it. It knows
// neither layers nor spans.
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
}

// New reads src by a decoder, which must have a concurrency of 1. begin is called for
// each frame before it is decoded; its errors are passed on.
func New(src io.Reader, d *zstd.Decoder, begin func(Frame) error) *Reader {
	return &Reader{src: bufio.NewReader(src), d: d, begin: begin}
}

// End is where the last frame ended that was read.
func (r *Reader) End() int64 { return r.end }

func (r *Reader) Read(p []byte) (int, error) {
	for {
		if r.in {
			n, err := r.d.Read(p)
			r.n += int64(n)
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
	if len(magic) == 8 && magic[0]&0xf0 == 0x50 && string(magic[1:4]) == "\x2a\x4d\x18" {
		n := 8 + int64(binary.LittleEndian.Uint32(magic[4:]))
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
	r.head = append(r.head[:0], head[:h.HeaderSize]...)
	if _, err := r.src.Discard(h.HeaderSize); err != nil {
		return err
	}
	r.at += int64(h.HeaderSize)
	r.sum, r.last, r.left, r.in = h.HasCheckSum, false, 0, true
	return r.d.Reset(frame{r})
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
		b, err := r.src.Peek(3)
		if err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return 0, err
		}
		v := uint32(b[0]) | uint32(b[1])<<8 | uint32(b[2])<<16
		r.left = 3 + int(v>>3)
		if v>>1&3 == 1 { // a byte that repeats
			r.left = 3 + 1
		}
		if r.last = v&1 != 0; r.last && r.sum {
			r.left += 4
		}
	}
	n, err = r.src.Read(p[:min(len(p), r.left)])
	r.left -= n
	r.at += int64(n)
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}
