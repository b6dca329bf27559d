package artifact

import (
	"encoding/binary"
	"strings"

	"github.com/shale-image/shale/index"
)

// column reads the numbers of a section. The first error is kept by the
// decoder; from then on all numbers are 0.
type column struct {
	d    *decoder
	id   int
	base int // of p in the content of the frames
	p    []byte
	at   int
}

// fail notes an error about what was read last.
func (c *column) fail(kind error, format string, args ...any) {
	if c.d.err == nil {
		c.d.err = index.Errorf(kind, c.d.name, int64(c.base+c.at), "section "+sectionNames[c.id]+": "+format, args...)
	}
}

// take counts n bytes of memory before they are allocated, and tells whether all is
// well so far.
func (c *column) take(n int64) bool {
	if c.d.bytes += n; c.d.bytes > c.d.lim.Memory {
		c.fail(index.ErrLimit, "it takes more than %d bytes of memory (Memory)", c.d.lim.Memory)
	}
	return c.d.err == nil
}

// uint reads a number.
func (c *column) uint() uint64 {
	if c.at < len(c.p) && c.p[c.at] < 0x80 {
		c.at++
		return uint64(c.p[c.at-1])
	}
	v, n := binary.Uvarint(c.p[c.at:])
	if n <= 0 {
		c.fail(index.ErrCorrupt, "no number, the section has %d bytes", len(c.p))
		return 0
	}
	c.at += n
	return v
}

// int reads a number with a sign.
func (c *column) int() int64 {
	v := c.uint()
	return int64(v>>1) ^ -int64(v&1)
}

// upTo reads a number that is at most max.
func (c *column) upTo(max uint64, what string) uint64 {
	v := c.uint()
	if v > max {
		c.fail(index.ErrCorrupt, "%s %d, want at most %d", what, v, max)
		return 0
	}
	return v
}

// bytes reads n bytes, nil if there are fewer.
func (c *column) bytes(n uint64) []byte {
	if n > uint64(c.left()) {
		c.fail(index.ErrCorrupt, "%d bytes, want %d", c.left(), n)
		return nil
	}
	p := c.p[c.at : c.at+int(n)]
	c.at += int(n)
	return p
}

func (c *column) left() int { return len(c.p) - c.at }

// texts reads strings that end with a NUL each.
type texts struct {
	column
	s string // the whole column
}

func (c *column) texts() texts { return texts{*c, string(c.p)} }

func (x *texts) next() string {
	n := strings.IndexByte(x.s[x.at:], 0)
	if n < 0 {
		x.fail(index.ErrCorrupt, "no string")
		return ""
	}
	s := x.s[x.at : x.at+n]
	x.at += n + 1
	return s
}

// end notes an error unless all has been read.
func (c *column) end() {
	if c.left() > 0 {
		c.fail(index.ErrCorrupt, "%d bytes too many", c.left())
	}
}

// split finds the sections in the content of the frames.
func (d *decoder) split(content []byte) error {
	for id := range d.sec {
		d.sec[id] = column{d: d, id: id}
	}
	bad := func(kind error, at int, format string, args ...any) error {
		return index.Errorf(kind, d.name, int64(at), format, args...)
	}
	last := uint64(0)
	for at := 0; at < len(content); {
		start := at
		id, n := binary.Uvarint(content[at:])
		if n <= 0 || id <= last {
			return bad(index.ErrCorrupt, start, "section %d behind section %d", id, last)
		}
		if id >= sections && id < optional {
			return bad(index.ErrUnsupported, start, "section %d", id)
		}
		last, at = id, at+n
		size, n := binary.Uvarint(content[at:])
		if n <= 0 || size > uint64(len(content)-at-n) {
			return bad(index.ErrCorrupt, at, "section %d of %d bytes, there are %d", id, size, len(content)-at)
		}
		at += n
		if id < sections {
			d.sec[id].base, d.sec[id].p = at, content[at:at+int(size)]
		}
		at += int(size)
	}
	return nil
}
