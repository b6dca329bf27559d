package layer

import (
	"math"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/index"
)

// inode completes an entry that adds an inode.
func (r *Reader) inode(h *header, x *extension, e *Entry, typ uint32, target string) error {
	ino := &index.Inode{Mode: typ | uint32(h.mode)&0o7777, Mtime: index.Time{Sec: h.mtime}}
	e.Inode = ino
	uid, err := r.id(h, x, "uid", h.uid)
	if err != nil {
		return err
	}
	gid, err := r.id(h, x, "gid", h.gid)
	if err != nil {
		return err
	}
	ino.UID, ino.GID = uid, gid
	if s := r.record(x, "mtime"); s != "" {
		var ok bool
		if ino.Mtime, ok = parseTime(s); !ok {
			return r.errorf(index.ErrCorrupt, h.at, "pax record mtime=%q", cut([]byte(s)))
		}
	}
	if ino.Xattrs, err = r.xattrs(h, x); err != nil {
		return err
	}
	if typ != syscall.S_IFREG && (len(x.pairs) > 0 || x.isSparse()) {
		return r.errorf(index.ErrCorrupt, h.at, "%q is sparse but no file", e.Path)
	}
	switch typ {
	case syscall.S_IFREG:
		err = r.file(h, x, e)
	case syscall.S_IFLNK:
		if target == "" || len(target) > 4095 || strings.IndexByte(target, 0) >= 0 {
			return r.errorf(index.ErrCorrupt, h.at, "symbolic link %q with a target of %d bytes, want 1 to 4095 without NUL", e.Path, len(target))
		}
		ino.Target = target
		ino.Mode = typ | 0o777 // Linux has no other, whatever the archive says
	case syscall.S_IFCHR, syscall.S_IFBLK:
		err = r.device(h, x, e)
	}
	if err != nil {
		return err
	}
	n := int64(len(e.Path) + len(ino.Target) + 16*len(e.Fragments))
	for _, a := range ino.Xattrs {
		n += int64(len(a.Name) + len(a.Value))
	}
	return r.account(h, n)
}

// file fills in what regular files have.
func (r *Reader) file(h *header, x *extension, e *Entry) error {
	size := r.data
	if h.typeflag == 'S' || x.isSparse() {
		var err error
		if e.Fragments, size, err = r.sparse(h, x); err != nil {
			return err
		}
	} else if size > 0 {
		e.one[0] = Fragment{0, size}
		e.Fragments = e.one[:]
	}
	if size > r.lim.FileSize {
		return r.errorf(index.ErrLimit, h.at, "%q has %d bytes, want at most %d (FileSize)", e.Path, size, r.lim.FileSize)
	}
	e.Inode.Size = size
	e.DataOffset = r.pos
	return nil
}

func (r *Reader) device(h *header, x *extension, e *Entry) error {
	for key, n := range map[string]*int64{"SCHILY.devmajor": &h.major, "SCHILY.devminor": &h.minor} {
		if s := r.record(x, key); s != "" {
			var ok bool
			if *n, ok = decimal(s); !ok {
				return r.errorf(index.ErrCorrupt, h.at, "pax record %s=%q", key, cut([]byte(s)))
			}
		}
	}
	if h.major < 0 || h.major >= 1<<12 || h.minor < 0 || h.minor >= 1<<20 { // Linux' dev_t
		return r.errorf(index.ErrUnsupported, h.at, "%q is device %d:%d, beyond 12 and 20 bits", e.Path, h.major, h.minor)
	}
	if h.typeflag == '3' && h.major == 0 && h.minor == 0 {
		return r.errorf(index.ErrUnsupported, h.at, "%q is character device 0:0, which overlayfs takes for a whiteout", e.Path)
	}
	e.Inode.Rdev = unix.Mkdev(uint32(h.major), uint32(h.minor))
	return nil
}

// id returns a user or group number.
func (r *Reader) id(h *header, x *extension, key string, n int64) (uint32, error) {
	if s := r.record(x, key); s != "" {
		var err error
		if n, err = strconv.ParseInt(s, 10, 64); err != nil {
			return 0, r.errorf(index.ErrCorrupt, h.at, "pax record %s=%q", key, cut([]byte(s)))
		}
	}
	if n < 0 || n >= math.MaxUint32 { // (uid_t)-1 means "leave it" to chown
		return 0, r.errorf(index.ErrUnsupported, h.at, "%s %d, want 0 to %d", key, n, uint32(math.MaxUint32-1))
	}
	return uint32(n), nil
}

// parseTime reads seconds since 1970 with an optional sign and fraction.
// What is finer than a nanosecond is rounded down, toward the past.
func parseTime(s string) (index.Time, bool) {
	digits, negative := strings.CutPrefix(s, "-")
	whole, fraction, _ := strings.Cut(digits, ".")
	sec, err := strconv.ParseUint(whole, 10, 62)
	if err != nil || strings.Trim(fraction, "0123456789") != "" {
		return index.Time{}, false
	}
	t := index.Time{Sec: int64(sec)}
	for i := range 9 {
		t.Nsec *= 10
		if i < len(fraction) {
			t.Nsec += uint32(fraction[i] - '0')
		}
	}
	if !negative {
		return t, true
	}
	// -1.25 is 0.75 s after -2.
	finer := len(fraction) > 9 && strings.Trim(fraction[9:], "0") != ""
	nsec := int64(t.Nsec)
	if finer {
		nsec++
	}
	t.Sec = -t.Sec
	if nsec > 0 {
		t.Sec--
		nsec = 1e9 - nsec
	}
	t.Nsec = uint32(nsec)
	return t, true
}
