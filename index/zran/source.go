package zran

import (
	"encoding/binary"
	"io"

	"github.com/shale-image/shale/index"
)

// name is what errors call the stream.
const name = "gzip"

const (
	inSize  = 64 << 10 // bytes read ahead
	inSlack = 32       // bytes that fast wants to see before it decodes
)

// source is the compressed stream as bits, the lowest of each byte first.
type source struct {
	r    io.Reader
	err  error // of r, which is not read again; matters when bytes run out
	base int64 // offset in the stream of buf[0]
	skip uint8 // bits of the next byte that were used before it

	pos, end int    // buf[pos:end] is not in bits yet
	bits     uint64 // next bits, the first one lowest; 0 above nbits
	nbits    uint   // how many, up to 64
	buf      [inSize]byte
}

func (s *source) reset(r io.Reader, base int64) {
	s.r, s.base = r, base
	s.err, s.skip, s.pos, s.end, s.bits, s.nbits = nil, 0, 0, 0, 0, 0
}

// offset returns the offset in the stream of the byte with the next bit.
func (s *source) offset() int64 { return s.base + int64(s.pos) - int64(s.nbits+7)/8 }

// bitsUsed tells how many bits of the byte at offset are used.
func (s *source) bitsUsed() uint8 { return uint8(-s.nbits & 7) }

// fill reads until there are at least n bytes in buf, or s.err.
func (s *source) fill(n int) {
	if s.end-s.pos >= n || s.err != nil {
		return
	}
	done := s.pos - int(s.nbits/8) // align may give back the bytes that are in bits
	copy(s.buf[:], s.buf[done:s.end])
	s.base += int64(done)
	s.end -= done
	s.pos -= done
	for idle := 0; s.end-s.pos < n && s.err == nil; {
		m, err := s.r.Read(s.buf[s.end:])
		s.end += m
		s.err = err
		if m > 0 {
			idle = 0
		} else if idle++; idle == 100 && err == nil {
			s.err = io.ErrNoProgress
		}
	}
}

// want makes n bits, up to 56, available in s.bits if the stream has them.
func (s *source) want(n uint) {
	if s.nbits < n {
		s.more(n)
	}
}

func (s *source) more(n uint) {
	if s.end-s.pos >= 8 {
		s.bits |= binary.LittleEndian.Uint64(s.buf[s.pos:]) << s.nbits
		s.pos += int(63-s.nbits) / 8
		s.nbits |= 56
		s.bits &= 1<<s.nbits - 1
		return
	}
	for s.nbits < n {
		if s.pos == s.end {
			if s.fill(1); s.pos == s.end {
				return
			}
		}
		s.bits |= uint64(s.buf[s.pos]) << s.nbits
		s.pos++
		s.nbits += 8
	}
}

// drop advances past n bits, which must be available.
func (s *source) drop(n uint) {
	s.bits >>= n
	s.nbits -= n
}

// take returns the next n bits, up to 32.
func (s *source) take(n uint) (uint32, error) {
	if s.want(n); s.nbits < n {
		return 0, s.cut()
	}
	v := uint32(s.bits & (1<<n - 1))
	s.drop(n)
	return v, nil
}

// align advances to the start of a byte and gives whole bytes back to buf.
func (s *source) align() {
	s.drop(s.nbits & 7)
	s.pos -= int(s.nbits / 8)
	s.bits, s.nbits = 0, 0
}

// peek returns the next n bytes, up to inSlack, without advancing. The stream
// must be aligned.
func (s *source) peek(n int) ([]byte, error) {
	if s.fill(n); s.end-s.pos < n {
		return nil, s.cut()
	}
	return s.buf[s.pos : s.pos+n], nil
}

// cut is the error when the source has fewer bytes than needed.
func (s *source) cut() error {
	if s.err != io.EOF {
		return s.err
	}
	return index.Errorf(index.ErrCorrupt, name, s.base+int64(s.end), "the stream is cut off: %w", io.ErrUnexpectedEOF)
}

// bad is the error about what is at the offset.
func (s *source) bad(format string, args ...any) error {
	return index.Errorf(index.ErrCorrupt, name, s.offset(), format, args...)
}
