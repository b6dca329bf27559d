package layer

import (
	"bytes"
	"encoding/binary"
	"io"
	"math"

	"github.com/shale-image/shale/index"
)

// format is the family of a header, which tells what is in its second half.
type format uint8

const (
	v7    format = iota // nothing
	ustar               // a prefix of 155 bytes
	star                // a prefix of 131 bytes, then times
	gnu                 // times, sparse map
)

// header is one block, decoded. Numbers are as written, not yet checked for
// what the tree can have.
//
//	offset 0   name[100] mode[8] uid[8] gid[8] size[12] mtime[12] chksum[8]
//	offset 156 typeflag[1] linkname[100] magic[8] uname[32] gname[32]
//	offset 329 devmajor[8] devminor[8] prefix[155] pad[12]
type header struct {
	at       int64 // offset in the stream
	format   format
	typeflag byte
	name     string
	linkname string
	mode     int64
	uid, gid int64
	size     int64
	mtime    int64
	major    int64
	minor    int64
	block    *[blockSize]byte // valid until the next header is read
}

// header reads the next header, which is valid until the one after it. It returns io.EOF, with the stream read to its
// end, at the end of the archive.
func (r *Reader) header() (*header, error) {
	at := r.pos
	if err := r.readBlock(); err != nil {
		return nil, err // io.EOF: at a block boundary
	}
	if r.block == [blockSize]byte{} {
		err := r.readBlock()
		if err != nil {
			return nil, err
		}
		if r.block == [blockSize]byte{} {
			return nil, r.end()
		}
		return nil, r.errorf(index.ErrCorrupt, at, "a lone zero block, want two at the end")
	}
	r.head = header{at: at, block: &r.block}
	if problem := r.head.parse(); problem != "" {
		return nil, r.errorf(index.ErrCorrupt, at, "%s", problem)
	}
	return &r.head, nil
}

// readBlock reads one block, or returns io.EOF if there is nothing left.
func (r *Reader) readBlock() error {
	if _, err := r.br.Peek(1); err != nil {
		return err
	}
	return r.full(r.block[:])
}

// atHeader tells whether the next block is a header or the end.
func (r *Reader) atHeader() (bool, error) {
	p, err := r.br.Peek(blockSize)
	if len(p) == 0 {
		return err == io.EOF, nil
	}
	if err != nil {
		return false, r.short(err)
	}
	b := (*[blockSize]byte)(p)
	return *b == [blockSize]byte{} || checksum(b), nil
}

// checksum tells whether the checksum is the sum of the block's bytes, its own
// taken as blanks. Some old programs summed up signed bytes.
func checksum(b *[blockSize]byte) bool {
	want, ok := number(b[148:156])
	if !ok {
		return false
	}
	sum := int64(8 * ' ')
	for _, c := range b {
		sum += int64(c)
	}
	for _, c := range b[148:156] {
		sum -= int64(c)
	}
	if want == sum {
		return true
	}
	for i, c := range b {
		if c >= 0x80 && (i < 148 || i >= 156) {
			sum -= 256
		}
	}
	return want == sum
}

// parse decodes the block. The result tells what is wrong with it.
func (h *header) parse() (problem string) {
	b := h.block
	if !checksum(b) {
		return "no tar header: the checksum is wrong"
	}
	h.typeflag = b[156]
	switch string(b[257:263]) {
	case "ustar\x00":
		h.format = ustar
		if string(b[508:512]) == "tar\x00" {
			h.format = star
		}
	case "ustar ":
		h.format = gnu
	}
	for _, f := range []struct {
		name  string
		field []byte
		value *int64
	}{
		{"mode", b[100:108], &h.mode},
		{"uid", b[108:116], &h.uid},
		{"gid", b[116:124], &h.gid},
		{"size", b[124:136], &h.size},
		{"mtime", b[136:148], &h.mtime},
	} {
		var ok bool
		if *f.value, ok = number(f.field); !ok {
			return "the header's " + f.name + " is no number"
		}
	}
	if h.size < 0 {
		return "the header's size is negative"
	}
	if h.typeflag == '3' || h.typeflag == '4' { // others leave anything there
		var ok1, ok2 bool
		h.major, ok1 = number(b[329:337])
		h.minor, ok2 = number(b[337:345])
		if !ok1 || !ok2 {
			return "the header's device is no number"
		}
	}
	h.name, h.linkname = cstring(b[0:100]), cstring(b[157:257])
	var prefix string
	switch h.format {
	case ustar:
		prefix = cstring(b[345:500])
	case star:
		prefix = cstring(b[345:476])
	}
	if prefix != "" {
		h.name = prefix + "/" + h.name
	}
	return ""
}

// cstring returns a field up to its first NUL.
func cstring(field []byte) string {
	if i := bytes.IndexByte(field, 0); i >= 0 {
		field = field[:i]
	}
	return string(field)
}

// number reads a numeric field: octal digits between blanks and NULs, nothing
// for 0, or, if the highest bit is set, a big-endian two's complement number
// whose sign is the bit below it.
func number(field []byte) (int64, bool) {
	if field[0]&0x80 != 0 {
		return base256(field)
	}
	blank := func(c byte) bool { return c == ' ' || c == 0 }
	i := 0
	for i < len(field) && blank(field[i]) {
		i++
	}
	var n int64
	for ; i < len(field) && '0' <= field[i] && field[i] <= '7'; i++ {
		n = n<<3 | int64(field[i]-'0') // 12 digits have 36 bits
	}
	for ; i < len(field); i++ {
		if !blank(field[i]) {
			return 0, false
		}
	}
	return n, true
}

func base256(field []byte) (int64, bool) {
	var wide [16]byte
	sign := byte(0)
	if field[0]&0x40 != 0 {
		sign = 0xff
	}
	for i := range wide {
		wide[i] = sign
	}
	copy(wide[16-len(field):], field)
	wide[16-len(field)] = field[0]&0x7f | sign&0x80
	high := int64(binary.BigEndian.Uint64(wide[:8]))
	low := int64(binary.BigEndian.Uint64(wide[8:]))
	return low, high == low>>63 && low != math.MinInt64
}
