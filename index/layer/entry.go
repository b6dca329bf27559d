package layer

import (
	"math"
	"strconv"
	"strings"
	"syscall"

	"github.com/shale-image/shale/index"
)

// entry makes the entry of a header, or nil if there is none for the tree. It
// leaves the stream at the entry's data.
func (r *Reader) entry(h *header, x *extension) (*Entry, error) {
	name, ok1 := pick(h.name, x.longName, r.record(x, "path"))
	target, ok2 := pick(h.linkname, x.longLink, r.record(x, "linkpath"))
	if !ok1 || !ok2 {
		return nil, r.errorf(index.ErrCorrupt, h.at, "GNU and pax headers with different names for %q", cut([]byte(name)))
	}
	if s := x.pax["GNU.sparse.name"]; s != "" {
		name = s
	}
	typ, problem := fileType(h.typeflag, name)
	if problem != "" {
		return nil, r.errorf(index.ErrUnsupported, h.at, "%q is %s", cut([]byte(name)), problem)
	}
	if err := r.body(h, x, typ); err != nil {
		return nil, err
	}
	if h.typeflag == 'V' {
		return nil, nil
	}
	path, problem := CleanPath(name)
	if problem != "" {
		return nil, r.errorf(index.ErrCorrupt, h.at, "%s in %q", problem, cut([]byte(name)))
	}
	c, none, problem := Whiteout(path)
	if problem != "" {
		return nil, r.errorf(index.ErrCorrupt, h.at, "%q is %s", path, problem)
	}
	if none {
		return nil, nil
	}
	e := &Entry{Change: c}
	if c.Op != index.Add {
		return e, r.account(h, int64(len(path)))
	}
	if h.typeflag == '1' {
		e.Op = index.Link
		if e.Target, problem = CleanPath(target); problem != "" || e.Target == "" {
			return nil, r.errorf(index.ErrCorrupt, h.at, "hard link %q to %q", path, cut([]byte(target)))
		}
		return e, r.account(h, int64(len(path)+len(target)))
	}
	return e, r.inode(h, x, e, typ, target)
}

// pick returns the name that counts: pax over GNU over the header's. It
// returns false if the first two are there and differ: readers do too.
func pick(short string, long *string, pax string) (string, bool) {
	switch {
	case pax != "":
		return pax, long == nil || *long == pax
	case long != nil:
		return *long, true
	}
	return short, true
}

// fileType returns the type bits of what a header describes, 0 for what makes
// no inode, or why it is refused.
func fileType(flag byte, name string) (typ uint32, problem string) {
	switch flag {
	case '0', 0, '7':
		if strings.HasSuffix(name, "/") {
			return syscall.S_IFDIR, ""
		}
		return syscall.S_IFREG, ""
	case 'S':
		return syscall.S_IFREG, ""
	case '1', 'V':
		return 0, ""
	case '2':
		return syscall.S_IFLNK, ""
	case '3':
		return syscall.S_IFCHR, ""
	case '4':
		return syscall.S_IFBLK, ""
	case '5', 'D':
		return syscall.S_IFDIR, ""
	case '6':
		return syscall.S_IFIFO, ""
	case 'M':
		return 0, "continued from another volume (type 'M')"
	}
	return 0, "of type " + strconv.QuoteRune(rune(flag)) + ", which is unknown"
}

// body finds out how much data follows the header.
func (r *Reader) body(h *header, x *extension, typ uint32) error {
	size := h.size
	if s := r.record(x, "size"); s != "" {
		var ok bool
		if size, ok = decimal(s); !ok {
			return r.errorf(index.ErrCorrupt, h.at, "pax record size=%q", cut([]byte(s)))
		}
	}
	if size > math.MaxInt64/2 {
		return r.errorf(index.ErrCorrupt, h.at, "a size of %d bytes", size)
	}
	if size > 0 && typ != syscall.S_IFREG && h.typeflag != 'D' {
		none, err := r.atHeader()
		if err != nil {
			return err
		}
		if none {
			size = 0
		}
	}
	r.data, r.pad = size, padding(size)
	return nil
}

// CleanPath makes a name in an archive a path of the tree, or says what is wrong
// with it.
func CleanPath(name string) (path, problem string) {
	if name == "" {
		return "", "an empty name"
	}
	if strings.IndexByte(name, 0) >= 0 {
		return "", "a NUL byte"
	}
	name = strings.Trim(name, "/")
	clean := true
	for elem := range strings.SplitSeq(name, "/") {
		switch {
		case elem == "..":
			return "", `".."`
		case elem == "" || elem == ".":
			clean = false
		case len(elem) > 255:
			return "", "a name of more than 255 bytes"
		}
	}
	if !clean {
		elems := strings.Split(name, "/")
		kept := elems[:0]
		for _, elem := range elems {
			if elem != "" && elem != "." {
				kept = append(kept, elem)
			}
		}
		name = strings.Join(kept, "/")
	}
	if len(name) > 4096 {
		return "", "more than 4096 bytes"
	}
	return name, ""
}

// Whiteout returns the change that a clean path of a layer stands for: where the whiteout rules
// say nothing of it, index.Add. It stands for none if it is housekeeping of aufs. Or it returns
// what is wrong with the path.
func Whiteout(path string) (c index.Change, none bool, problem string) {
	const prefix, meta, opaque = ".wh.", ".wh..wh.", ".wh..wh..opq"
	c.Path = path
	if !strings.Contains(path, prefix) {
		return c, false, ""
	}
	dir, base := "", path
	if i := strings.LastIndexByte(path, '/'); i >= 0 {
		dir, base = path[:i], path[i+1:]
	}
	none = strings.HasPrefix(base, meta) && base != opaque
	for elem := range strings.SplitSeq(dir, "/") {
		if strings.HasPrefix(elem, meta) && elem != opaque {
			none = true
		} else if strings.HasPrefix(elem, prefix) {
			return c, false, "below a whiteout"
		}
	}
	if none {
		return c, true, ""
	}
	hidden, whiteout := strings.CutPrefix(base, prefix)
	switch {
	case !whiteout:
	case base == opaque:
		c.Op, c.Path = index.Opaque, dir
	case hidden == "" || hidden == "." || hidden == "..":
		return c, false, "a whiteout of " + strconv.Quote(hidden)
	default:
		c.Op, c.Path = index.Whiteout, path[:len(path)-len(base)]+hidden
	}
	return c, false, ""
}

// account counts what is kept of an entry.
func (r *Reader) account(h *header, n int64) error {
	if r.metadata += n; r.metadata > r.lim.MetadataBytes {
		return r.errorf(index.ErrLimit, h.at, "names, attributes and sparse maps of more than %d bytes (MetadataBytes)", r.lim.MetadataBytes)
	}
	return nil
}
