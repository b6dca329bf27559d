// Package export takes an image out: as a tar archive or into a directory.
// What comes out is what a container would see; every byte is verified on the
// way. It knows indexes and sources; it knows no registry and no pool.
package export

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/content"
	"github.com/shale-image/shale/index"
)

// Tar writes the tree as a POSIX pax archive, in byte order of names, so that
// the same tree gives the same bytes.
func Tar(ctx context.Context, w io.Writer, t *index.Tree, src blob.Source) error {
	bw := bufio.NewWriterSize(w, 1<<20)
	names := map[*index.Inode]string{} // of inodes with several names, the first
	err := t.Walk(func(path string, ino *index.Inode) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		for name := range ino.Children {
			if err := checkName(name); err != nil {
				return fmt.Errorf("/%s: %w", path, err)
			}
		}
		h := header{name: "./" + path, ino: ino}
		if path == "" {
			h.name = "."
		}
		if first, ok := names[ino]; ok {
			h.link = first
			return h.write(bw)
		}
		if !ino.IsDir() {
			names[ino] = h.name
		}
		if err := h.write(bw); err != nil || !ino.IsRegular() {
			return err
		}
		if err := content.Copy(ctx, bw, t, src, ino); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		return pad(bw, ino.Size)
	})
	if err != nil {
		return err
	}
	if _, err := bw.Write(make([]byte, 1024)); err != nil {
		return err
	}
	return bw.Flush()
}

// header is one entry of an archive. archive/tar is no help here: it drops
// extended attributes with empty values.
type header struct {
	name string
	ino  *index.Inode
	link string // if set: a hard link to an earlier entry
}

func (h *header) write(w io.Writer) error {
	var (
		ino  = h.ino
		kind byte
		name = h.name
		pax  []byte
		size int64
		link = ino.Target
	)
	switch ino.Type() {
	case syscall.S_IFREG:
		kind, size = '0', ino.Size
	case syscall.S_IFLNK:
		kind = '2'
	case syscall.S_IFCHR:
		kind = '3'
	case syscall.S_IFBLK:
		kind = '4'
	case syscall.S_IFDIR:
		kind = '5'
		name += "/"
	case syscall.S_IFIFO:
		kind = '6'
	default:
		return fmt.Errorf("%s: type %#o cannot be said in tar: %w", h.name, ino.Type(), index.ErrUnsupported)
	}
	if h.link != "" {
		kind, link, size = '1', h.link, 0
	}
	pax = record(pax, "mtime", decimal(ino.Mtime))
	if len(name) > 100 {
		pax = record(pax, "path", name)
	}
	if len(link) > 100 {
		pax = record(pax, "linkpath", link)
	}
	if size >= 1<<33 {
		pax = record(pax, "size", fmt.Sprint(size))
	}
	if ino.UID >= 1<<21 {
		pax = record(pax, "uid", fmt.Sprint(ino.UID))
	}
	if ino.GID >= 1<<21 {
		pax = record(pax, "gid", fmt.Sprint(ino.GID))
	}
	if h.link == "" {
		for _, x := range ino.Xattrs {
			pax = record(pax, "SCHILY.xattr."+x.Name, x.Value)
		}
	}
	if _, err := w.Write(block("pax", 'x', "", int64(len(pax)), &index.Inode{Mode: 0o644})); err != nil {
		return err
	}
	if _, err := w.Write(pax); err != nil {
		return err
	}
	if err := pad(w, int64(len(pax))); err != nil {
		return err
	}
	_, err := w.Write(block(name, kind, link, size, ino))
	return err
}

// block is a ustar header; what does not fit has been said in pax records.
func block(name string, kind byte, link string, size int64, ino *index.Inode) []byte {
	b := make([]byte, 512)
	octal := func(off, n int, v int64) {
		if s := fmt.Sprintf("%0*o", n-1, v); len(s) < n {
			copy(b[off:], s)
		}
	}
	copy(b[:100], name)
	octal(100, 8, int64(ino.Mode&0o7777))
	octal(108, 8, int64(ino.UID))
	octal(116, 8, int64(ino.GID))
	octal(124, 12, size)
	octal(136, 12, max(0, ino.Mtime.Sec))
	copy(b[148:], "        ")
	b[156] = kind
	copy(b[157:257], link)
	copy(b[257:], "ustar\x0000")
	if kind == '3' || kind == '4' {
		octal(329, 8, int64(unix.Major(ino.Rdev)))
		octal(337, 8, int64(unix.Minor(ino.Rdev)))
	}
	var sum int64
	for _, c := range b {
		sum += int64(c)
	}
	copy(b[148:], fmt.Sprintf("%06o\x00 ", sum))
	return b
}

// record appends a pax record, whose length counts its own digits.
func record(p []byte, key, value string) []byte {
	n := len(key) + len(value) + 3
	size := n + len(fmt.Sprint(n))
	if l := n + len(fmt.Sprint(size)); l != size {
		size = l
	}
	return fmt.Appendf(p, "%d %s=%s\n", size, key, value)
}

// decimal writes a time as pax does: seconds with a fraction, and before 1970
// the fraction counts away from zero.
func decimal(t index.Time) string {
	sec, nsec, sign := t.Sec, int64(t.Nsec), ""
	if sec < 0 {
		sign, sec = "-", -sec
		if nsec > 0 {
			sec, nsec = sec-1, 1e9-nsec
		}
	}
	if nsec == 0 {
		return fmt.Sprintf("%s%d", sign, sec)
	}
	return fmt.Sprintf("%s%d.%09d", sign, sec, nsec)
}

func pad(w io.Writer, n int64) error {
	if n%512 == 0 {
		return nil
	}
	_, err := w.Write(make([]byte, 512-n%512))
	return err
}
