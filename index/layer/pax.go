package layer

import (
	"bytes"
	"strconv"
	"strings"

	"github.com/shale-image/shale/index"
)

// extension is what stands before the header of an entry and adds to it.
type extension struct {
	pax      map[string]string // records that mean something; nil: no pax header
	pairs    []int64           // GNU.sparse.offset and .numbytes, in turn
	longName *string           // GNU 'L'
	longLink *string           // GNU 'K'
	bytes    int64
}

func (x *extension) used() bool { return x.pax != nil || x.longName != nil || x.longLink != nil }

// extend reads an extended header.
func (r *Reader) extend(x *extension, h *header) error {
	x.bytes += h.size
	if h.size > r.lim.HeaderBytes || x.bytes > r.lim.HeaderBytes {
		return r.errorf(index.ErrLimit, h.at, "extended headers of more than %d bytes (HeaderBytes)", r.lim.HeaderBytes)
	}
	if h.typeflag == 'x' && x.pax != nil || h.typeflag == 'L' && x.longName != nil || h.typeflag == 'K' && x.longLink != nil {
		return r.errorf(index.ErrCorrupt, h.at, "a second extended header %q for one entry", h.typeflag)
	}
	at := r.pos
	p, err := r.bytes(h.size)
	if err != nil {
		return err
	}
	switch h.typeflag {
	case 'L', 'K':
		s := cstring(p)
		if s == "" {
			return r.errorf(index.ErrCorrupt, at, "an empty long name")
		}
		if h.typeflag == 'L' {
			x.longName = &s
		} else {
			x.longLink = &s
		}
	case 'x':
		x.pax = map[string]string{}
		return r.records(p, at, x.pax, &x.pairs)
	case 'g':
		x.bytes -= h.size // belongs to no entry
		if r.globals == nil {
			r.globals = map[string]string{}
		}
		return r.globalRecords(p, at)
	}
	return nil
}

// globalRecords merges the records of a global header into those before it.
func (r *Reader) globalRecords(p []byte, at int64) error {
	fresh, pairs := map[string]string{}, []int64(nil)
	if err := r.records(p, at, fresh, &pairs); err != nil {
		return err
	}
	for key, value := range fresh {
		switch {
		case key == "path" || key == "linkpath" || key == "size" || strings.HasPrefix(key, "GNU.sparse."):
			return r.errorf(index.ErrUnsupported, at, "pax record %q for all files", key)
		case value == "" && !isXattr(key):
			delete(r.globals, key)
		default:
			r.globals[key] = value
		}
	}
	if len(pairs) > 0 {
		return r.errorf(index.ErrUnsupported, at, "a sparse map for all files")
	}
	var size int64
	for key, value := range r.globals {
		size += int64(len(key) + len(value))
	}
	return r.checkXattrSize(at, size/4)
}

// records parses pax records, "LENGTH KEY=VALUE\n" each, where the length is
// that of the whole record in decimal:
//
//	30 mtime=1350244992.023960108\n
//
// Those without meaning for the tree are dropped here.
func (r *Reader) records(p []byte, at int64, to map[string]string, pairs *[]int64) error {
	corrupt := func(format string, args ...any) error {
		return r.errorf(index.ErrCorrupt, at, "pax record: "+format, args...)
	}
	var xattrs int64
	next := at
	for len(p) > 0 {
		at = next
		digits := bytes.IndexByte(p[:min(len(p), 20)], ' ')
		if digits < 1 {
			return corrupt("no length")
		}
		n, err := strconv.ParseUint(string(p[:digits]), 10, 31)
		if err != nil || n < uint64(digits)+2 || n > uint64(len(p)) {
			return corrupt("a length of %q with %d bytes left", p[:digits], len(p))
		}
		record := p[digits+1 : n]
		p = p[n:]
		next += int64(n)
		if record[len(record)-1] != '\n' {
			return corrupt("no newline at its end")
		}
		k, v, ok := bytes.Cut(record[:len(record)-1], []byte("="))
		if !ok || len(k) == 0 || bytes.IndexByte(k, 0) >= 0 {
			return corrupt("no key and value")
		}
		key := string(k)
		switch classify(key) {
		case ignored:
			continue
		case refused:
			return r.errorf(index.ErrUnsupported, at, "pax record %q", key)
		}
		switch {
		case isXattr(key):
			// Roughly, for memory; what the file has in the end is looked at later.
			xattrs += int64(len(k) + len(v))
			if err := r.checkXattrSize(at, xattrs/4); err != nil {
				return err
			}
		case key == "GNU.sparse.offset" || key == "GNU.sparse.numbytes":
			// GNU sparse format 0.0 repeats these two in turn.
			n, ok := decimal(string(v))
			if !ok || (key == "GNU.sparse.offset") != (len(*pairs)%2 == 0) {
				return corrupt("%s=%q out of turn", key, cut(v))
			}
			*pairs = append(*pairs, n)
			continue
		case bytes.IndexByte(v, 0) >= 0:
			return corrupt("%s has a NUL byte", key)
		case key == "hdrcharset":
			if s := string(v); s != "" && s != "BINARY" && s != "ISO-IR 10646 2000 UTF-8" {
				return r.errorf(index.ErrUnsupported, at, "pax record hdrcharset=%q", cut(v))
			}
			continue
		}
		to[key] = string(v)
	}
	return nil
}

// cut shortens what goes into an error.
func cut(v []byte) []byte { return v[:min(len(v), 64)] }

// record returns a record of the entry's own header or else of a global one.
// An empty value means that there is none.
func (r *Reader) record(x *extension, key string) string {
	if v, ok := x.pax[key]; ok {
		return v
	}
	return r.globals[key]
}

// decimal reads a number that a size or offset may be.
func decimal(s string) (int64, bool) {
	n, err := strconv.ParseUint(s, 10, 62)
	return int64(n), err == nil
}

type class uint8

const (
	applied class = iota
	ignored
	refused
)

// keys are the records known one by one; see the package documentation.
var keys = map[string]class{
	"path": applied, "linkpath": applied, "size": applied, "uid": applied, "gid": applied, "mtime": applied,
	"hdrcharset":      applied,
	"SCHILY.devmajor": applied, "SCHILY.devminor": applied,
	"GNU.sparse.major": applied, "GNU.sparse.minor": applied, "GNU.sparse.name": applied,
	"GNU.sparse.realsize": applied, "GNU.sparse.size": applied, "GNU.sparse.numblocks": applied,
	"GNU.sparse.map": applied, "GNU.sparse.offset": applied, "GNU.sparse.numbytes": applied,

	"comment": ignored, "atime": ignored, "ctime": ignored, "charset": ignored, "uname": ignored, "gname": ignored,
	"LIBARCHIVE.creationtime": ignored,
	"SCHILY.dev":              ignored, "SCHILY.ino": ignored, "SCHILY.nlink": ignored, "SCHILY.fflags": ignored,
	"GNU.dumpdir": ignored, "GNU.volume.label": ignored,
}

func classify(key string) class {
	if c, ok := keys[key]; ok {
		return c
	}
	if isXattr(key) {
		return applied
	}
	vendor, _, ok := strings.Cut(key, ".")
	if !ok || vendor != strings.ToUpper(vendor) && (vendor == "realtime" || vendor == "security") {
		return refused // POSIX's own
	}
	switch vendor {
	case "GNU", "SCHILY", "LIBARCHIVE", "RHT", "SUN", "MSWINDOWS":
		return refused
	}
	return ignored
}
