package layer

import (
	"strings"
	"syscall"

	"github.com/shale-image/shale/index"
)

// Header is an entry of an archive as somebody else has read it: what extended
// headers say of names, sizes, owners and times is applied already.
type Header struct {
	Type           byte // '0' to '6'
	Name, Linkname string
	Mode, UID, GID int64
	Size           int64
	Mtime          index.Time
	Major, Minor   int64
	Records        map[string]string // of pax headers
	DataOffset     int64             // in the archive, of the data of a file
}

// Lister makes entries of headers that others have read, by the same rules as a
// Reader does of an archive. It is not safe for concurrent use.
type Lister struct{ r Reader }

// NewLister returns a Lister; the name is that of the layer in errors.
func NewLister(name string, lim index.Limits) *Lister {
	return &Lister{Reader{name: name, lim: lim.WithDefaults()}}
}

// Entry returns the entry of a header, nil if there is none for the tree. A sparse
// file is index.ErrUnsupported: where its data lies is not in its header.
func (l *Lister) Entry(from *Header) (*Entry, error) {
	r := &l.r
	at := from.DataOffset
	if r.entries++; r.entries > r.lim.Entries {
		return nil, r.errorf(index.ErrLimit, at, "more than %d headers (Entries)", r.lim.Entries)
	}
	h := &header{
		at: at, typeflag: from.Type, name: from.Name, linkname: from.Linkname, mode: from.Mode, uid: from.UID, gid: from.GID,
		size: from.Size, mtime: from.Mtime.Sec, major: from.Major, minor: from.Minor,
	}
	typ, _ := fileType(h.typeflag, h.name)
	switch {
	case typ != syscall.S_IFREG:
		h.size = 0
	case h.size < 0:
		return nil, r.errorf(index.ErrCorrupt, at, "%q has %d bytes", cut([]byte(h.name)), h.size)
	}
	x := &extension{pax: map[string]string{}}
	for key, value := range from.Records {
		switch classify(key) {
		case ignored:
			continue
		case refused:
			return nil, r.errorf(index.ErrUnsupported, at, "pax record %q", cut([]byte(key)))
		}
		switch key {
		case "path", "linkpath", "size", "uid", "gid", "mtime", "hdrcharset":
			continue
		}
		if strings.HasPrefix(key, "GNU.sparse.") {
			return nil, r.errorf(index.ErrUnsupported, at, "%q is sparse", cut([]byte(h.name)))
		}
		x.pax[key] = value
	}
	r.pos = at
	e, err := r.entry(h, x)
	if err == nil && e != nil && e.Inode != nil {
		e.Inode.Mtime = from.Mtime
	}
	return e, err
}
