package packages

import (
	"encoding/binary"
	"io"

	"github.com/shale-image/shale/index"
)

// sqlite reads tables of an SQLite file from their first row to their last: all
// that a list of packages takes, in 150 lines instead of a database of 8 MB
// (sqlite.org/fileformat2.html). It reads no write-ahead log.
type sqlite struct {
	r      io.ReaderAt
	name   string
	page   int // bytes of a page
	usable int // of them
	pages  uint32
	read   uint32 // pages so far: a file that leads in circles ends
}

func openSQLite(r io.ReaderAt, size int64, name string) (*sqlite, error) {
	var h [100]byte
	if _, err := r.ReadAt(h[:], 0); err != nil || string(h[:16]) != "SQLite format 3\x00" {
		return nil, index.Errorf(index.ErrCorrupt, name, 0, "no SQLite file")
	}
	s := &sqlite{r: r, name: name, page: int(binary.BigEndian.Uint16(h[16:]))}
	if s.page == 1 {
		s.page = 64 << 10
	}
	s.usable = s.page - int(h[20])
	if s.page < 512 || s.page&(s.page-1) != 0 || s.usable < 480 {
		return nil, index.Errorf(index.ErrCorrupt, name, 16, "pages of %d bytes, %d of them in use", s.page, s.usable)
	}
	if size > maxFile {
		return nil, index.Errorf(index.ErrLimit, name, -1, "%d bytes, at most %d are read", size, maxFile)
	}
	s.pages = uint32(size / int64(s.page))
	return s, nil
}

func (s *sqlite) corrupt(page uint32, format string, args ...any) error {
	return index.Errorf(index.ErrCorrupt, s.name, int64(page-1)*int64(s.page), format, args...)
}

// get reads a page, the first being 1.
func (s *sqlite) get(n uint32) ([]byte, error) {
	if s.read++; n == 0 || n > s.pages || s.read > 4*s.pages+16 {
		return nil, s.corrupt(1, "page %d of %d, or pages in a circle", n, s.pages)
	}
	p := make([]byte, s.page)
	if _, err := s.r.ReadAt(p, int64(n-1)*int64(s.page)); err != nil {
		return nil, err
	}
	return p, nil
}

// table calls fn for the rows of a table, as records.
func (s *sqlite) table(name string, fn func(record []byte) error) error {
	root := int64(0)
	err := s.rows(1, 0, func(rec []byte) error { // type, name, table, root page, SQL
		cols, err := s.columns(rec, 5)
		if err == nil && string(cols[0].blob) == "table" && string(cols[1].blob) == name {
			root = cols[3].number
		}
		return err
	})
	if err != nil {
		return err
	}
	if root <= 0 || root > int64(s.pages) {
		return s.corrupt(1, "no table %s", name)
	}
	return s.rows(uint32(root), 0, fn)
}

const (
	leafTable     = 13
	interiorTable = 5
	maxTree       = 20 // levels
)

// rows walks the B-tree of a table.
func (s *sqlite) rows(n uint32, depth int, fn func([]byte) error) error {
	p, err := s.get(n)
	if err != nil {
		return err
	}
	h := p
	if n == 1 {
		h = p[100:]
	}
	kind, cells := h[0], int(binary.BigEndian.Uint16(h[3:]))
	at := h[8:]
	if kind == interiorTable {
		at = h[12:]
	}
	if kind != leafTable && kind != interiorTable || 2*cells > len(at) || depth > maxTree {
		return s.corrupt(n, "page of kind %d with %d cells at depth %d", kind, cells, depth)
	}
	for i := range cells {
		off := int(binary.BigEndian.Uint16(at[2*i:]))
		if off+4 > s.usable {
			return s.corrupt(n, "cell %d at %d of %d bytes", i, off, s.usable)
		}
		if kind == interiorTable {
			err = s.rows(binary.BigEndian.Uint32(p[off:]), depth+1, fn)
		} else {
			var rec []byte
			if rec, err = s.payload(n, p[off:s.usable]); err == nil {
				err = fn(rec)
			}
		}
		if err != nil {
			return err
		}
	}
	if kind == interiorTable {
		return s.rows(binary.BigEndian.Uint32(h[8:]), depth+1, fn)
	}
	return nil
}

// payload puts together a cell of a leaf: the size, the key, and the record, the
// rest of which may be in a list of pages of its own.
func (s *sqlite) payload(n uint32, cell []byte) ([]byte, error) {
	size, cell := varint(cell)
	_, cell = varint(cell)
	if size < 0 || size > int64(s.pages)*int64(s.page) {
		return nil, s.corrupt(n, "record of %d bytes", size)
	}
	local, least := s.usable-35, (s.usable-12)*32/255-23
	if size > int64(local) {
		if k := least + int((size-int64(least))%int64(s.usable-4)); k <= local {
			local = k
		} else {
			local = least
		}
	} else {
		local = int(size)
	}
	rest := int(size) - local
	if local > len(cell) || rest > 0 && local+4 > len(cell) {
		return nil, s.corrupt(n, "record of %d bytes leaves its page", size)
	}
	out := append(make([]byte, 0, size), cell[:local]...)
	for next := cell[local:]; rest > 0; {
		p, err := s.get(binary.BigEndian.Uint32(next))
		if err != nil {
			return nil, err
		}
		m := min(rest, s.usable-4)
		out = append(out, p[4:4+m]...)
		next, rest = p, rest-m
	}
	return out, nil
}

// column is a value of a record.
type column struct {
	number int64
	blob   []byte // text, too
}

// columns reads the first columns of a record.
func (s *sqlite) columns(rec []byte, n int) ([]column, error) {
	bad := func() ([]column, error) { return nil, s.corrupt(1, "a record that is cut off") }
	size, kinds := varint(rec)
	if size < 1 || size > int64(len(rec)) {
		return bad()
	}
	kinds, data := kinds[:max(0, int(size)-(len(rec)-len(kinds)))], rec[size:]
	out := make([]column, 0, n)
	for range n {
		if len(kinds) == 0 {
			return bad()
		}
		var kind int64
		kind, kinds = varint(kinds)
		length := int64(0)
		switch {
		case kind >= 1 && kind <= 4:
			length = kind
		case kind == 5:
			length = 6
		case kind == 6 || kind == 7:
			length = 8
		case kind >= 12:
			length = (kind - 12) / 2
		}
		if kind < 0 || length > int64(len(data)) {
			return bad()
		}
		c := column{blob: data[:length]}
		if kind >= 1 && kind <= 6 {
			c.number = int64(int8(data[0]))
			for _, b := range data[1:length] {
				c.number = c.number<<8 | int64(b)
			}
		} else if kind == 9 {
			c.number = 1
		}
		out, data = append(out, c), data[length:]
	}
	return out, nil
}

// varint reads SQLite's: 7 bits a byte, the highest first, of the ninth all 8. It
// returns what follows; -1 if p ends before it does.
func varint(p []byte) (v int64, rest []byte) {
	for i, b := range p[:min(len(p), 9)] {
		if i == 8 {
			return v<<8 | int64(b), p[9:]
		}
		v = v<<7 | int64(b&0x7f)
		if b < 0x80 {
			return v, p[i+1:]
		}
	}
	return -1, nil
}
