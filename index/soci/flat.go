package soci

import (
	"encoding/binary"
	"fmt"
)

// flat reads a flatbuffer. A table is known by its position, 0 if it is not there;
// a field that is not there is 0 or empty. What leads out of the buffer is an
// error that stays, and reads as what is not there: no length is believed before
// it is known to fit.
//
//	root      u32      position of the root table
//	table     i32      how far before it its vtable is, then its fields
//	vtable    u16      its own size, u16 the table's, then for each field
//	          u16      where in the table it is, 0 if it is not there
//	string    u32      length, then bytes
//	vector    u32      length, then elements
//
// Fields and elements that are strings, vectors or tables are u32: how far behind
// them these lie.
type flat struct {
	b   []byte
	err error
}

// at returns n bytes at a position, or nil.
func (f *flat) at(pos, n int) []byte {
	if pos < 0 || n < 0 || pos > len(f.b)-n {
		if f.err == nil {
			f.err = fmt.Errorf("%d bytes at offset %d of %d", n, pos, len(f.b))
		}
		return nil
	}
	return f.b[pos : pos+n]
}

func (f *flat) u32At(pos int) uint32 {
	if p := f.at(pos, 4); p != nil {
		return binary.LittleEndian.Uint32(p)
	}
	return 0
}

func (f *flat) root() int { return f.indirect(0) }

// indirect returns the position that a position refers to, 0 if it is none.
func (f *flat) indirect(pos int) int {
	to := int64(pos) + int64(f.u32At(pos))
	if f.err != nil {
		return 0
	}
	if to <= int64(pos) || to > int64(len(f.b)) {
		f.err = fmt.Errorf("a reference from offset %d to %d of %d", pos, to, len(f.b))
		return 0
	}
	return int(to)
}

// field returns the position of a field of a table, 0 if it is not there.
func (f *flat) field(table, n int) int {
	if table == 0 {
		return 0
	}
	vtable := int64(table) - int64(int32(f.u32At(table)))
	if f.err == nil && (vtable < 0 || vtable > int64(len(f.b))) {
		f.err = fmt.Errorf("the table at offset %d has its fields at %d of %d", table, vtable, len(f.b))
	}
	if f.err != nil {
		return 0
	}
	size := f.at(int(vtable), 2)
	if size == nil || int(binary.LittleEndian.Uint16(size)) < 4+2*n+2 {
		return 0
	}
	p := f.at(int(vtable)+4+2*n, 2)
	if p == nil || binary.LittleEndian.Uint16(p) == 0 {
		return 0
	}
	return table + int(binary.LittleEndian.Uint16(p))
}

func (f *flat) i8(table, n int, unset int8) int8 {
	if pos := f.field(table, n); pos > 0 {
		if p := f.at(pos, 1); p != nil {
			return int8(p[0])
		}
	}
	return unset
}

func (f *flat) u32(table, n int) uint32 {
	if pos := f.field(table, n); pos > 0 {
		return f.u32At(pos)
	}
	return 0
}

func (f *flat) i32(table, n int) int32 { return int32(f.u32(table, n)) }

func (f *flat) i64(table, n int) int64 {
	if pos := f.field(table, n); pos > 0 {
		if p := f.at(pos, 8); p != nil {
			return int64(binary.LittleEndian.Uint64(p))
		}
	}
	return 0
}

// table returns the table that a field refers to.
func (f *flat) table(table, n int) int {
	if pos := f.field(table, n); pos > 0 {
		return f.indirect(pos)
	}
	return 0
}

// vector returns where the elements of a field are, each of some size, and how
// many there are.
func (f *flat) vector(table, n, size int) (pos, count int) {
	if pos = f.table(table, n); pos == 0 {
		return 0, 0
	}
	count = int(f.u32At(pos))
	if count > len(f.b)/size || f.at(pos+4, count*size) == nil {
		if f.err == nil {
			f.err = fmt.Errorf("%d elements of %d bytes at offset %d of %d", count, size, pos, len(f.b))
		}
		return 0, 0
	}
	return pos + 4, count
}

// bytes returns a field that is a string or a vector of bytes. It is in the buffer.
func (f *flat) bytes(table, n int) []byte {
	pos, count := f.vector(table, n, 1)
	return f.at(pos, count)
}

// text returns the string that a position refers to.
func (f *flat) text(pos int) []byte {
	pos = f.indirect(pos)
	if f.err != nil {
		return nil
	}
	return f.at(pos+4, int(f.u32At(pos)))
}
