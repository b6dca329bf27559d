package erofs

import (
	"cmp"
	"encoding/binary"
	"slices"
	"strings"

	"github.com/shale-image/shale/index"
)

// xattrPrefixes are the prefixes of attribute names that EROFS has numbers
// for. Those without a final dot are whole names.
var xattrPrefixes = [...]string{
	1: "user.",
	2: "system.posix_acl_access",
	3: "system.posix_acl_default",
	4: "trusted.",
	6: "security.",
}

// splitXattr returns the number of a name's prefix and the rest of the name.
// The number is 0 if EROFS cannot keep the name.
func splitXattr(name string) (prefix uint8, rest string) {
	for i, p := range xattrPrefixes {
		if p == "" || !strings.HasPrefix(name, p) {
			continue
		}
		rest = name[len(p):]
		if (rest == "") == strings.HasSuffix(p, ".") {
			continue
		}
		return uint8(i), rest
	}
	return 0, ""
}

// byName returns the attributes in order of their names, so that equal trees
// become equal images.
func byName(xs []index.Xattr) []index.Xattr {
	order := func(a, b index.Xattr) int { return cmp.Compare(a.Name, b.Name) }
	if !slices.IsSortedFunc(xs, order) {
		xs = slices.Clone(xs)
		slices.SortFunc(xs, order)
	}
	return xs
}

// xattrSize returns the bytes that an inode's attributes take, or why they
// cannot be kept.
func xattrSize(path func() string, xs []index.Xattr) (uint32, error) {
	if len(xs) == 0 {
		return 0, nil
	}
	size, last := int64(xattrHeader), ""
	for i, x := range byName(xs) {
		prefix, rest := splitXattr(x.Name)
		switch {
		case prefix == 0:
			return 0, index.Errorf(index.ErrUnsupported, path(), -1, "attribute %q has no place in EROFS", x.Name)
		case i > 0 && x.Name == last:
			return 0, index.Errorf(index.ErrCorrupt, path(), -1, "attribute %q occurs twice", x.Name)
		case len(x.Name) > maxXattrName || strings.IndexByte(x.Name, 0) >= 0:
			return 0, index.Errorf(index.ErrUnsupported, path(), -1, "attribute %.300q: names have 1 to %d bytes and no NUL", x.Name, maxXattrName)
		case len(x.Value) > maxXattrValue:
			return 0, index.Errorf(index.ErrUnsupported, path(), -1, "attribute %q has %d bytes; EROFS keeps up to %d", x.Name, len(x.Value), maxXattrValue)
		}
		size += roundUp(int64(xattrEntry+len(rest)+len(x.Value)), xattrUnit)
		last = x.Name
	}
	if size > maxXattrBody {
		return 0, index.Errorf(index.ErrUnsupported, path(), -1, "all attributes take %d bytes; EROFS keeps up to %d an inode", size, maxXattrBody)
	}
	return uint32(size), nil
}

// appendXattrs appends attributes that xattrSize accepted.
func appendXattrs(b []byte, xs []index.Xattr) []byte {
	if len(xs) == 0 {
		return b
	}
	b = append(b, make([]byte, xattrHeader)...)
	for _, x := range byName(xs) {
		prefix, rest := splitXattr(x.Name)
		b = append(b, uint8(len(rest)), prefix)
		b = binary.LittleEndian.AppendUint16(b, uint16(len(x.Value)))
		b = append(b, rest...)
		b = append(b, x.Value...)
		for n := xattrEntry + len(rest) + len(x.Value); n%xattrUnit != 0; n++ {
			b = append(b, 0)
		}
	}
	return b
}
