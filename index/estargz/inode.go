package estargz

import (
	"cmp"
	"encoding/base64"
	"math"
	"slices"
	"strings"
	"syscall"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/layer"
)

// inode makes the inode of an entry that adds one.
func (b *builder) inode(path string, typ uint32, e *entry) (*index.Inode, error) {
	ino := &index.Inode{Mode: typ | uint32(e.Mode&0o7777)}
	for _, id := range []struct {
		name string
		n    int64
		to   *uint32
	}{{"uid", e.UID, &ino.UID}, {"gid", e.GID, &ino.GID}} {
		if id.n < 0 || id.n >= math.MaxUint32 { // (uid_t)-1 means "leave it" to chown
			return nil, b.errorf(index.ErrUnsupported, "%q has %s %d, want 0 to %d", cut(path), id.name, id.n, uint32(math.MaxUint32-1))
		}
		*id.to = uint32(id.n)
	}
	if e.ModTime != "" {
		t, err := time.Parse(time.RFC3339, e.ModTime)
		if err != nil {
			return nil, b.errorf(index.ErrCorrupt, "%q was modified at %q, want a time like 2006-01-02T15:04:05Z", cut(path), cut(e.ModTime))
		}
		if !t.IsZero() {
			ino.Mtime = index.Time{Sec: t.Unix(), Nsec: uint32(t.Nanosecond())}
		}
	}
	var err error
	if ino.Xattrs, err = b.xattrs(path, e); err != nil {
		return nil, err
	}
	switch typ {
	case syscall.S_IFREG:
		ino.Size = e.Size
	case syscall.S_IFLNK:
		if e.LinkName == "" || len(e.LinkName) > 4095 || strings.IndexByte(e.LinkName, 0) >= 0 {
			return nil, b.errorf(index.ErrCorrupt, "symbolic link %q with a target of %d bytes, want 1 to 4095 without NUL", cut(path), len(e.LinkName))
		}
		ino.Target = e.LinkName
		ino.Mode = typ | 0o777 // Linux has no other, whatever the table says
	case syscall.S_IFCHR, syscall.S_IFBLK:
		if e.DevMajor < 0 || e.DevMajor >= 1<<12 || e.DevMinor < 0 || e.DevMinor >= 1<<20 { // Linux' dev_t
			return nil, b.errorf(index.ErrUnsupported, "%q is device %d:%d, beyond 12 and 20 bits", cut(path), e.DevMajor, e.DevMinor)
		}
		if typ == syscall.S_IFCHR && e.DevMajor == 0 && e.DevMinor == 0 {
			return nil, b.errorf(index.ErrUnsupported, "%q is character device 0:0, which overlayfs takes for a whiteout", cut(path))
		}
		ino.Rdev = unix.Mkdev(uint32(e.DevMajor), uint32(e.DevMinor))
	}
	return ino, nil
}

// xattrs returns the extended attributes of an entry in order of their names.
func (b *builder) xattrs(path string, e *entry) ([]index.Xattr, error) {
	if len(e.Xattrs) == 0 {
		return nil, nil
	}
	out := make([]index.Xattr, 0, len(e.Xattrs))
	var size int64
	for name, encoded := range e.Xattrs {
		value, err := base64.StdEncoding.DecodeString(encoded)
		if err != nil {
			return nil, b.errorf(index.ErrCorrupt, "%q: the value of attribute %q is no base64", cut(path), cut(name))
		}
		plain := layer.GNUXattr(name)
		// libarchive encodes more than GNU tar does, and says so where the table
		// has not kept it.
		if strings.ContainsRune(name, utf8.RuneError) || strings.Count(name, "%") != strings.Count(name, "%3D")+strings.Count(name, "%25") {
			return nil, b.errorf(index.ErrUnsupported, "%q: the table of contents does not tell the name of attribute %q", cut(path), cut(name))
		}
		if kind := layer.CheckXattr(plain, string(value)); kind != nil {
			return nil, b.errorf(kind, "%q has extended attribute %q with %d bytes", cut(path), cut(plain), len(value))
		}
		out = append(out, index.Xattr{Name: plain, Value: string(value)})
		size += int64(len(plain) + len(value))
	}
	if size > b.lim.XattrBytes {
		return nil, b.errorf(index.ErrLimit, "%q has extended attributes of more than %d bytes (XattrBytes)", cut(path), b.lim.XattrBytes)
	}
	slices.SortFunc(out, func(a, b index.Xattr) int { return cmp.Compare(a.Name, b.Name) })
	for i := 1; i < len(out); i++ {
		if out[i].Name == out[i-1].Name {
			return nil, b.errorf(index.ErrCorrupt, "%q has extended attribute %q twice", cut(path), cut(out[i].Name))
		}
	}
	return out, nil
}
