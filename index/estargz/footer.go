package estargz

import (
	"encoding/binary"
	"strconv"

	"github.com/shale-image/shale/index"
)

// FooterSize is how many bytes at the end of a layer tell where its table is.
const FooterSize = 51

// Section is a range of a blob.
type Section struct {
	Offset, Length int64
}

// The footer is an empty gzip member with an extra field. That of eStargz:
//
//	 0  1f 8b 08 04  00 00 00 00  00 ff      header
//	10  1a 00                                the extra field has 26 bytes
//	12  'S' 'G' 16 00                        ... one subfield of 22
//	16  "000000000000abcd"                   offset of the table, hex
//	32  "STARGZ"
//	38  01 00 00 ff ff                       an empty stored block
//	43  00 00 00 00  00 00 00 00             checksum and size
//
// Stargz, which is older, has no line 12 and is 4 bytes shorter. A layer whose
// table is in another image has "STARGZEXTERNALTOC" instead of lines 16 and 32.
const (
	gzipMagic = "\x1f\x8b\x08\x04"
	emptyTail = "\x01\x00\x00\xff\xff\x00\x00\x00\x00\x00\x00\x00\x00"
	magic     = "STARGZ"
	external  = "STARGZEXTERNALTOC"
)

// Locate tells where in a layer of size bytes its table of contents is. tail is
// the layer's last FooterSize bytes, or all of a smaller one. A layer that is no
// eStargz is index.ErrUnsupported; name is for errors.
func Locate(tail []byte, size int64, name string) (Section, error) {
	if len(tail) > FooterSize {
		tail = tail[len(tail)-FooterSize:]
	}
	if _, ok := extra(tail, 46, "SG\x11\x00"+external, 0); ok {
		return Section{}, index.Errorf(index.ErrUnsupported, name, size-46, "its table of contents is in another image")
	}
	footer := int64(FooterSize)
	field, ok := extra(tail, FooterSize, "SG\x16\x00", 16+len(magic))
	if !ok {
		footer = FooterSize - 4
		field, ok = extra(tail, FooterSize-4, "", 16+len(magic))
	}
	if !ok || string(field[16:]) != magic {
		return Section{}, index.Errorf(index.ErrUnsupported, name, max(0, size-FooterSize), "no eStargz footer")
	}
	off, err := strconv.ParseUint(string(field[:16]), 16, 63)
	if err != nil {
		return Section{}, index.Errorf(index.ErrCorrupt, name, size-footer, "the footer says that the table of contents is at %q, want a hexadecimal number", field[:16])
	}
	if int64(off) >= size-footer {
		return Section{}, index.Errorf(index.ErrCorrupt, name, size-footer, "the footer says that the table of contents is at offset %d of %d", off, size)
	}
	return Section{int64(off), size - footer - int64(off)}, nil
}

// extra returns the extra field of a footer of n bytes at the end of tail: n
// bytes behind what it begins with.
func extra(tail []byte, n int, begin string, length int) ([]byte, bool) {
	if len(tail) < n {
		return nil, false
	}
	tail = tail[len(tail)-n:]
	field := tail[12 : n-len(emptyTail)]
	if string(tail[:4]) != gzipMagic || int(binary.LittleEndian.Uint16(tail[10:])) != len(field) ||
		string(tail[n-len(emptyTail):]) != emptyTail ||
		len(field) != len(begin)+length || string(field[:len(begin)]) != begin {
		return nil, false
	}
	return field[len(begin):], true
}
