package treecmp

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// attributes compares all but content and children.
func (c *comparison) attributes(name string, a, b *unix.Stat_t) error {
	errs := []error{
		c.differ(name, Mode, octal(a.Mode), octal(b.Mode)),
		c.differ(name, Owner, owner(a), owner(b)),
		c.differ(name, Mtime, seconds(a.Mtim), seconds(b.Mtim)),
		c.xattrs(name),
	}
	kind := a.Mode & unix.S_IFMT
	if kind != unix.S_IFDIR {
		errs = append(errs, c.differ(name, Links, decimal(a.Nlink), decimal(b.Nlink)))
		if a.Nlink > 1 || b.Nlink > 1 {
			errs = append(errs, c.differ(name, Group, printable(c.a.firstName(name, a)), printable(c.b.firstName(name, b))))
		}
	}
	switch kind {
	case unix.S_IFREG:
		errs = append(errs, c.differ(name, Size, decimal(a.Size), decimal(b.Size)))
	case unix.S_IFLNK:
		errs = append(errs, c.target(name))
	case unix.S_IFCHR, unix.S_IFBLK:
		errs = append(errs, c.differ(name, Rdev, device(a), device(b)))
	}
	for _, err := range errs { // the first will do: most of them are ErrLimit
		if err != nil {
			return err
		}
	}
	return nil
}

func (c *comparison) target(name string) error {
	a, err := os.Readlink(c.a.path(name))
	if err != nil {
		return err
	}
	b, err := os.Readlink(c.b.path(name))
	if err != nil {
		return err
	}
	return c.differ(name, Target, strconv.Quote(a), strconv.Quote(b))
}

func (c *comparison) xattrs(name string) error {
	a, err := readXattrs(c.a.path(name), c.IgnoreXattrs)
	if err != nil {
		return err
	}
	b, err := readXattrs(c.b.path(name), c.IgnoreXattrs)
	if err != nil {
		return err
	}
	keys := slices.AppendSeq(slices.Collect(maps.Keys(a)), maps.Keys(b))
	slices.Sort(keys)
	for _, key := range slices.Compact(keys) {
		if err := c.differ(name, Xattr, showXattr(a, key), showXattr(b, key)); err != nil {
			return err
		}
	}
	return nil
}

func showXattr(m map[string]string, key string) string {
	v, ok := m[key]
	if !ok {
		return printable(key) + " absent"
	}
	return printable(key) + "=" + strconv.Quote(v)
}

// readXattrs returns the extended attributes of what name itself is. A file
// system that has none has an empty set.
func readXattrs(name string, ignore []string) (map[string]string, error) {
	list, err := growing(func(p []byte) (int, error) { return unix.Llistxattr(name, p) })
	if errors.Is(err, unix.ENOTSUP) || len(list) == 0 && err == nil {
		return nil, nil
	} else if err != nil {
		return nil, &os.PathError{Op: "llistxattr", Path: name, Err: err}
	}
	m := map[string]string{}
	for key := range strings.SplitSeq(strings.TrimSuffix(string(list), "\x00"), "\x00") {
		if slices.Contains(ignore, key) {
			continue
		}
		v, err := growing(func(p []byte) (int, error) { return unix.Lgetxattr(name, key, p) })
		if err != nil {
			return nil, &os.PathError{Op: "lgetxattr " + key, Path: name, Err: err}
		}
		m[key] = string(v)
	}
	return m, nil
}

// growing calls a function that fills a buffer or fails with ERANGE, with ever
// larger ones, up to what Linux allows an attribute or a list of them.
func growing(fill func([]byte) (int, error)) ([]byte, error) {
	for size := 256; ; size *= 4 {
		p := make([]byte, size)
		n, err := fill(p)
		if err == nil {
			return p[:n], nil
		}
		if !errors.Is(err, unix.ERANGE) || size > 64<<10 {
			return nil, err
		}
	}
}

// buffers are what one worker reads into: a piece of each tree's file.
type buffers [2][128 << 10]byte

// content compares two files of the same size.
func (c *comparison) content(ctx context.Context, name string, buf *buffers) error {
	a, err := open(c.a.path(name))
	if err != nil {
		return err
	}
	defer a.Close()
	b, err := open(c.b.path(name))
	if err != nil {
		return err
	}
	defer b.Close()
	for off := int64(0); ; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, errA := io.ReadFull(a, buf[0][:])
		m, errB := io.ReadFull(b, buf[1][:])
		p, q := buf[0][:n], buf[1][:m]
		if !bytes.Equal(p, q) {
			i := 0
			for i < min(n, m) && p[i] == q[i] {
				i++
			}
			return c.add(name, Content, showBytes(off+int64(i), p[i:]), showBytes(off+int64(i), q[i:]))
		}
		off += int64(n)
		for _, err := range []error{errA, errB} {
			if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
				return fmt.Errorf("at offset %d: %w", off, err)
			}
		}
		if errA != nil || errB != nil {
			return nil
		}
	}
}

// open opens a file of a tree that nothing else is expected to change.
func open(name string) (*os.File, error) {
	return os.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
}

func showBytes(off int64, p []byte) string {
	if len(p) == 0 {
		return fmt.Sprintf("at %d: end", off)
	}
	return fmt.Sprintf("at %d: % x", off, p[:min(len(p), 8)])
}

func typeName(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return "file"
	case unix.S_IFDIR:
		return "directory"
	case unix.S_IFLNK:
		return "symbolic link"
	case unix.S_IFCHR:
		return "character device"
	case unix.S_IFBLK:
		return "block device"
	case unix.S_IFIFO:
		return "fifo"
	case unix.S_IFSOCK:
		return "socket"
	}
	return octal(mode)
}

func octal(mode uint32) string { return fmt.Sprintf("%04o", mode&0o7777) }

func owner(st *unix.Stat_t) string { return fmt.Sprintf("%d:%d", st.Uid, st.Gid) }

func seconds(t unix.Timespec) string { return fmt.Sprintf("%d.%09d", t.Sec, t.Nsec) }

func device(st *unix.Stat_t) string {
	return fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
}

// decimal is for fields whose C type differs between architectures.
func decimal[T ~int32 | ~int64 | ~uint32 | ~uint64](n T) string { return fmt.Sprint(n) }
