package layer

import (
	"cmp"
	"encoding/base64"
	"net/url"
	"slices"
	"strings"

	"github.com/shale-image/shale/index"
)

const (
	schily     = "SCHILY.xattr."
	libarchive = "LIBARCHIVE.xattr."

	maxXattrName  = 255
	maxXattrValue = 64 << 10 // XATTR_SIZE_MAX
)

func isXattr(key string) bool {
	return strings.HasPrefix(key, schily) || strings.HasPrefix(key, libarchive)
}

// GNUXattr decodes the name of an attribute that GNU tar has written: "=", which would end it,
// as %3D, and so "%" as %25.
func GNUXattr(name string) string { return gnuName.Replace(name) }

var gnuName = strings.NewReplacer("%3D", "=", "%25", "%")

// decodeXattrs makes of the two kinds of records a map of names to values.
//
// libarchive writes both, LIBARCHIVE.xattr.user.a%20b and, with the same
// encoding, SCHILY.xattr.user.a%20b: then they are one attribute, whose name
// is decoded as libarchive does.
func (r *Reader) decodeXattrs(at int64, records map[string]string, to map[string]string) error {
	for key, value := range records {
		name, ok := strings.CutPrefix(key, schily)
		if ok {
			if _, twin := records[libarchive+name]; twin {
				continue
			}
			name = GNUXattr(name)
		} else if name, ok = strings.CutPrefix(key, libarchive); !ok {
			continue
		} else {
			plain, err := url.PathUnescape(name)
			if err != nil {
				return r.errorf(index.ErrCorrupt, at, "pax record %q: the name is badly encoded", key)
			}
			p, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(value, "="))
			if err != nil {
				return r.errorf(index.ErrCorrupt, at, "pax record %q: the value is no base64", key)
			}
			value = string(p)
			if raw, twin := records[schily+name]; twin {
				value = raw
			} else if _, twin := records[schily+plain]; twin {
				continue
			}
			name = plain
		}
		if kind := CheckXattr(name, value); kind != nil {
			return r.errorf(kind, at, "extended attribute %q with %d bytes", cut([]byte(name)), len(value))
		}
		to[name] = value
	}
	return nil
}

// CheckXattr tells whether a file of an image may have an attribute: one that is in the
// namespaces user, trusted, security or an access control list, is no instruction to an overlay
// file system, and is as short as Linux has them. Else it is index.ErrUnsupported or
// index.ErrCorrupt.
func CheckXattr(name, value string) (kind error) {
	namespace, rest, _ := strings.Cut(name, ".")
	switch {
	case strings.HasPrefix(name, "trusted.overlay.") || strings.HasPrefix(name, "user.overlay."):
		return index.ErrUnsupported
	case name == "system.posix_acl_access" || name == "system.posix_acl_default":
	case rest == "" || namespace != "user" && namespace != "trusted" && namespace != "security":
		return index.ErrUnsupported
	}
	if strings.IndexByte(name, 0) >= 0 || len(name) > maxXattrName || len(value) > maxXattrValue {
		return index.ErrCorrupt
	}
	return nil
}

// xattrs returns the extended attributes of an entry in order of their names.
func (r *Reader) xattrs(h *header, x *extension) ([]index.Xattr, error) {
	if len(x.pax) == 0 && len(r.globals) == 0 {
		return nil, nil
	}
	found := map[string]string{}
	for _, records := range []map[string]string{r.globals, x.pax} {
		if err := r.decodeXattrs(h.at, records, found); err != nil {
			return nil, err
		}
	}
	if len(found) == 0 {
		return nil, nil
	}
	out := make([]index.Xattr, 0, len(found))
	var size int64
	for name, value := range found {
		out = append(out, index.Xattr{Name: name, Value: value})
		size += int64(len(name) + len(value))
	}
	slices.SortFunc(out, func(a, b index.Xattr) int { return cmp.Compare(a.Name, b.Name) })
	return out, r.checkXattrSize(h.at, size)
}

func (r *Reader) checkXattrSize(at, size int64) error {
	if size > r.lim.XattrBytes {
		return r.errorf(index.ErrLimit, at, "extended attributes of more than %d bytes (XattrBytes)", r.lim.XattrBytes)
	}
	return nil
}
