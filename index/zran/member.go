package zran

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"io"
)

// state is what comes next in the stream.
type state uint8

const (
	atFirstMember state = iota // the header of the first member that is read
	atMember                   // the header of another one, or the end
	atBlock                    // the header of a block
	inStored                   // bytes of a stored block
	inCodes                    // symbols of a block
	atTrailer                  // the end of a member
)

// inflate decodes about n bytes to o.buf. It sets z.err where that ends.
func (z *Reader) inflate(n int) {
	limit := z.out.room(n)
	for z.err == nil && z.out.n < limit {
		switch z.state {
		case atFirstMember, atMember:
			z.err = z.member()
		case atBlock:
			z.err = z.block()
		case inStored:
			z.err = z.copyStored(limit)
		case inCodes:
			z.err = z.symbols(limit)
		case atTrailer:
			z.err = z.trailer()
		}
	}
	if z.err == io.EOF {
		if err := z.tell(); err != nil {
			z.err = err
		}
	}
	z.out.sum() // while it is in the cache
}

// The flags of a member's header (RFC 1952, section 2.3.1).
const (
	flagHeaderCRC = 1 << 1
	flagExtraData = 1 << 2
	flagName      = 1 << 3
	flagComment   = 1 << 4
	flagsReserved = 0xe0
)

// member reads the header of a member (RFC 1952, section 2.3).
func (z *Reader) member() error {
	s := &z.src
	s.align()
	if z.state == atMember {
		if err := z.padding(); err != nil {
			return err
		}
	}
	start := s.offset()
	head, err := s.peek(10)
	if err != nil {
		return err
	}
	flags := head[3]
	switch {
	case head[0] != 0x1f || head[1] != 0x8b:
		return s.bad("want the header of a gzip member, got %x", head[:2])
	case head[2] != 8:
		return s.bad("compression method %d is unknown", head[2])
	case flags&flagsReserved != 0:
		return s.bad("reserved flags are set: %#x", flags)
	}
	z.crc = 0
	z.pass(len(head))
	if flags&flagExtraData != 0 {
		size, err := s.peek(2)
		if err != nil {
			return err
		}
		left := int(binary.LittleEndian.Uint16(size))
		for z.pass(2); left > 0; {
			if _, err := s.peek(1); err != nil {
				return err
			}
			left -= z.pass(min(left, s.end-s.pos))
		}
	}
	for _, f := range [...]byte{flagName, flagComment} { // each ends with a zero byte
		for more := flags&f != 0; more; {
			if _, err := s.peek(1); err != nil {
				return err
			}
			n := bytes.IndexByte(s.buf[s.pos:s.end], 0) + 1
			if more = n == 0; more {
				n = s.end - s.pos
			}
			z.pass(n)
		}
	}
	if flags&flagHeaderCRC != 0 {
		stored, err := s.peek(2)
		if err != nil {
			return err
		}
		if got, want := uint16(z.crc), binary.LittleEndian.Uint16(stored); got != want {
			return s.bad("the checksum of the header is %#04x, stored is %#04x", got, want)
		}
		z.pass(2)
	}
	z.out.sum()
	z.out.begin()
	z.start, z.partial = z.out.offset(), false
	z.state = atBlock
	return z.checkpoint(Checkpoint{In: start, Member: true})
}

// pass advances past n bytes of a header, which must be there. It returns n.
func (z *Reader) pass(n int) int {
	s := &z.src
	z.crc = crc32.Update(z.crc, crc32.IEEETable, s.buf[s.pos:s.pos+n])
	s.pos += n
	return n
}

// padding skips zero bytes behind a member. At the end it returns io.EOF.
func (z *Reader) padding() error {
	s := &z.src
	padded := false
	for {
		if s.fill(1); s.pos == s.end {
			return s.err // maybe io.EOF
		}
		for s.pos < s.end && s.buf[s.pos] == 0 {
			s.pos++
			padded = true
		}
		if s.pos < s.end {
			break
		}
	}
	if padded {
		return s.bad("bytes that are not zero behind the padding of the last member")
	}
	return nil
}

// trailer verifies a member (RFC 1952, section 2.3.1).
func (z *Reader) trailer() error {
	s := &z.src
	s.align()
	crc, err := s.take(32)
	if err != nil {
		return err
	}
	size, err := s.take(32)
	if err != nil {
		return err
	}
	z.out.sum()
	if !z.partial {
		if crc != z.out.crc {
			return s.bad("the checksum of the decompressed bytes is %#08x, stored is %#08x", z.out.crc, crc)
		}
		if n := z.out.offset() - z.start; size != uint32(n) {
			return s.bad("the member has %d decompressed bytes, stored is %d (modulo 1<<32)", n, size)
		}
	}
	z.state = atMember
	return nil
}
