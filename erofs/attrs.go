package erofs

import (
	"encoding/binary"
	"slices"
	"strings"

	"github.com/shale-image/shale/index"
)

// xattrs returns the attributes of an inode in order of their names.
func (rd *reader) xattrs(in *rawInode) ([]index.Xattr, error) {
	v := rd.v
	if in.xattrEnd == in.xattrPos {
		return nil, nil
	}
	if err := v.check(in.xattrPos, in.xattrEnd-in.xattrPos); err != nil {
		return nil, err
	}
	header, err := v.read(in.xattrPos, xattrHeader)
	if err != nil {
		return nil, err
	}
	var xs []index.Xattr
	shared := int64(header[4])
	pos := in.xattrPos + xattrHeader
	if in.xattrEnd-pos < shared*xattrUnit {
		return nil, v.errorf(index.ErrCorrupt, in.xattrPos, "%d shared attributes in %d bytes", shared, in.xattrEnd-pos)
	}
	for ; shared > 0; shared-- {
		id, err := v.read(pos, xattrUnit)
		if err != nil {
			return nil, err
		}
		at := int64(rd.im.super.XattrBlkaddr)*BlockSize + int64(binary.LittleEndian.Uint32(id))*xattrUnit
		if _, err = rd.xattr(at, v.size, &xs); err != nil {
			return nil, err
		}
		pos += xattrUnit
	}
	for pos < in.xattrEnd {
		if pos, err = rd.xattr(pos, in.xattrEnd, &xs); err != nil {
			return nil, err
		}
	}
	slices.SortFunc(xs, func(a, b index.Xattr) int { return strings.Compare(a.Name, b.Name) })
	for i := 1; i < len(xs); i++ {
		if xs[i].Name == xs[i-1].Name {
			return nil, v.errorf(index.ErrCorrupt, in.xattrPos, "attribute %q occurs twice", xs[i].Name)
		}
	}
	return xs, nil
}

// xattr appends the attribute at pos, which must end at end at the latest, and
// returns where the next one starts.
func (rd *reader) xattr(pos, end int64, xs *[]index.Xattr) (next int64, err error) {
	v := rd.v
	b, err := v.read(pos, xattrEntry)
	if err != nil {
		return 0, err
	}
	nameLen, prefix, valueLen := int(b[0]), b[1], int(binary.LittleEndian.Uint16(b[2:]))
	next = roundUp(pos+int64(xattrEntry+nameLen+valueLen), xattrUnit)
	if next > end {
		return 0, v.errorf(index.ErrCorrupt, pos, "attribute of %d and %d bytes ends after %d", nameLen, valueLen, end)
	}
	if int(prefix) >= len(xattrPrefixes) || xattrPrefixes[prefix] == "" {
		return 0, v.errorf(index.ErrUnsupported, pos, "attribute name with prefix %d", prefix)
	}
	if err := rd.take(pos, len(xattrPrefixes[prefix])+nameLen+valueLen); err != nil {
		return 0, err
	}
	if b, err = v.read(pos+xattrEntry, nameLen+valueLen); err != nil {
		return 0, err
	}
	name := xattrPrefixes[prefix] + string(b[:nameLen])
	if number, _ := splitXattr(name); number != prefix || strings.IndexByte(name, 0) >= 0 {
		return 0, v.errorf(index.ErrCorrupt, pos, "attribute name %.300q with prefix %d", name, prefix)
	}
	if s, ok := rd.names[name]; ok {
		name = s // there are few, and they are everywhere
	} else if len(rd.names) < maxInterned {
		rd.names[name] = name
	}
	*xs = append(*xs, index.Xattr{Name: name, Value: string(b[nameLen:])})
	return next, nil
}

const maxInterned = 1024
