package source

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/layer"
)

// Dir returns the image of a root file system in a directory, with all that a
// tree can have: owners, modes, times, extended attributes, hard links, devices
// and holes. Sockets and what only means something to an overlay file system
// (character devices 0:0, *.overlay.* attributes) are refused by name. Mount
// points below are crossed. A zero platform means this machine's.
//
// Entries come in an order that depends on names alone, parents first.
// Links are never followed, also if something replaces a directory meanwhile;
// a file that changes while it is read is an error.
func Dir(dir string, platform image.Platform) (*Image, error) {
	if fi, err := os.Stat(dir); err != nil {
		return nil, err
	} else if !fi.IsDir() {
		return nil, fmt.Errorf("%s is not a directory", dir)
	}
	return bare("dir:"+dir, platform, Layer{Name: dir, Open: func(ctx context.Context, progress func(int64)) (Reader, error) {
		root, err := os.Open(dir)
		if err != nil {
			return nil, err
		}
		w := &walker{ctx: ctx, progress: progress, first: map[inode]string{}, stack: []*level{{dir: root, names: []string{""}}}}
		return w, nil
	}}), nil
}

type inode struct{ dev, ino uint64 }

// walker reads a directory tree as a layer.
type walker struct {
	ctx      context.Context
	progress func(int64)
	first    map[inode]string // of files with several names, the first
	stack    []*level

	path   string // of the current entry
	file   *os.File
	before unix.Stat_t
	rest   []layer.Fragment
	n      int64 // bytes read of all files
	told   int64
}

// level is a directory on the way to the current entry.
type level struct {
	dir   *os.File
	path  string
	names []string // still to come
}

func (w *walker) Close() error {
	w.closeFile()
	for _, l := range w.stack {
		l.dir.Close()
	}
	w.stack = nil
	return nil
}

func (w *walker) closeFile() {
	if w.file != nil {
		w.file.Close()
		w.file = nil
	}
}

func (w *walker) Next() (*layer.Entry, error) {
	w.closeFile()
	for len(w.stack) > 0 {
		if err := w.ctx.Err(); err != nil {
			return nil, err
		}
		l := w.stack[len(w.stack)-1]
		if len(l.names) == 0 {
			l.dir.Close()
			w.stack = w.stack[:len(w.stack)-1]
			continue
		}
		name := l.names[0]
		l.names = l.names[1:]
		w.path = path.Join(l.path, name)
		e, err := w.entry(l, name)
		if err != nil {
			return nil, fmt.Errorf("/%s: %w", w.path, err)
		}
		return e, nil
	}
	w.progress(w.n)
	return nil, io.EOF
}

// entry makes the entry of a name in a directory, or of the root itself.
func (w *walker) entry(l *level, name string) (*layer.Entry, error) {
	fd, at := int(l.dir.Fd()), fmt.Sprintf("/proc/self/fd/%d/%s", l.dir.Fd(), name)
	var st unix.Stat_t
	flags := unix.AT_SYMLINK_NOFOLLOW
	if name == "" {
		flags = unix.AT_EMPTY_PATH
	}
	if err := unix.Fstatat(fd, name, &st, flags); err != nil {
		return nil, os.NewSyscallError("stat", err)
	}
	e := &layer.Entry{Change: index.Change{Op: index.Add, Path: w.path}}
	if st.Nlink > 1 && st.Mode&unix.S_IFMT != unix.S_IFDIR {
		key := inode{st.Dev, st.Ino}
		if first, ok := w.first[key]; ok {
			e.Op, e.Target = index.Link, first
			return e, nil
		}
		w.first[key] = w.path
	}
	ino := &index.Inode{Mode: st.Mode, UID: st.Uid, GID: st.Gid, Mtime: index.Time{Sec: st.Mtim.Sec, Nsec: uint32(st.Mtim.Nsec)}}
	e.Inode = ino
	var err error
	switch ino.Type() {
	case unix.S_IFDIR:
		err = w.enter(l, name, &st)
	case unix.S_IFREG:
		ino.Size = st.Size
		w.before = st
		err = w.open(fd, name, e)
	case unix.S_IFLNK:
		ino.Target, err = readlink(fd, name)
	case unix.S_IFCHR, unix.S_IFBLK:
		if ino.Rdev = st.Rdev; st.Rdev == 0 && ino.Type() == unix.S_IFCHR {
			return nil, fmt.Errorf("%w: a character device 0:0, which is an overlay file system's whiteout", index.ErrUnsupported)
		}
	case unix.S_IFIFO:
	case unix.S_IFSOCK:
		return nil, fmt.Errorf("%w: a socket; images have none", index.ErrUnsupported)
	default:
		return nil, fmt.Errorf("%w: file type %#o", index.ErrUnsupported, ino.Type())
	}
	if err != nil {
		return nil, err
	}
	ino.Xattrs, err = xattrs(at)
	return e, err
}

// enter pushes a directory, its names in byte order.
func (w *walker) enter(l *level, name string, st *unix.Stat_t) error {
	if name == "" {
		name = "."
	}
	fd, err := unix.Openat(int(l.dir.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("open", err)
	}
	dir := os.NewFile(uintptr(fd), w.path)
	var now unix.Stat_t
	if err := unix.Fstat(fd, &now); err != nil || now.Ino != st.Ino || now.Dev != st.Dev {
		dir.Close()
		return errChanged
	}
	names, err := dir.Readdirnames(-1)
	if err != nil {
		dir.Close()
		return err
	}
	slices.Sort(names)
	w.stack = append(w.stack, &level{dir: dir, path: w.path, names: names})
	return nil
}

var errChanged = errors.New("changed while it was read")

// open opens a regular file and finds its data.
func (w *walker) open(dir int, name string, e *layer.Entry) error {
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("open", err)
	}
	w.file = os.NewFile(uintptr(fd), w.path)
	if err := w.unchanged(); err != nil {
		return err
	}
	for off := int64(0); off < e.Inode.Size; {
		data, err := unix.Seek(fd, off, unix.SEEK_DATA)
		if err == unix.ENXIO {
			break
		}
		end := e.Inode.Size
		if err != nil { // a file system that cannot tell
			data = off
		} else if end, err = unix.Seek(fd, data, unix.SEEK_HOLE); err != nil {
			return os.NewSyscallError("lseek", err)
		}
		if data >= e.Inode.Size {
			break
		}
		end = min(end, e.Inode.Size)
		e.Fragments = append(e.Fragments, layer.Fragment{Off: data, Length: end - data})
		off = end
	}
	w.rest = slices.Clone(e.Fragments)
	return nil
}

// unchanged tells whether the current file is as it was when its entry was made.
func (w *walker) unchanged() error {
	var st unix.Stat_t
	if err := unix.Fstat(int(w.file.Fd()), &st); err != nil {
		return os.NewSyscallError("stat", err)
	}
	b := &w.before
	if st.Ino != b.Ino || st.Dev != b.Dev || st.Size != b.Size || st.Mtim != b.Mtim || st.Ctim != b.Ctim {
		return errChanged
	}
	return nil
}

func (w *walker) Read(p []byte) (int, error) {
	for len(w.rest) > 0 && w.rest[0].Length == 0 {
		w.rest = w.rest[1:]
	}
	if len(w.rest) == 0 || w.file == nil {
		return 0, io.EOF
	}
	f := &w.rest[0]
	n, err := w.file.ReadAt(p[:min(int64(len(p)), f.Length)], f.Off)
	f.Off, f.Length, w.n = f.Off+int64(n), f.Length-int64(n), w.n+int64(n)
	if w.n-w.told >= 1<<20 {
		w.told = w.n
		w.progress(w.n)
	}
	if err == io.EOF || err == nil && f.Length == 0 && len(w.rest) == 1 {
		if changed := w.unchanged(); changed != nil {
			return n, changed
		}
		if err == io.EOF && f.Length > 0 {
			return n, errChanged
		}
		err = nil
	}
	return n, err
}

func readlink(dir int, name string) (string, error) {
	p := make([]byte, 4097)
	n, err := unix.Readlinkat(dir, name, p)
	if err != nil {
		return "", os.NewSyscallError("readlink", err)
	}
	return string(p[:n]), nil
}

// xattrs reads the extended attributes of what a path leads to, links not
// followed, in order of their names.
func xattrs(at string) ([]index.Xattr, error) {
	list, err := retryRange(func(p []byte) (int, error) { return unix.Llistxattr(at, p) })
	if err == unix.ENOTSUP {
		return nil, nil
	}
	if err != nil {
		return nil, os.NewSyscallError("listxattr", err)
	}
	var out []index.Xattr
	for name := range strings.SplitSeq(strings.TrimRight(string(list), "\x00"), "\x00") {
		if name == "" {
			continue
		}
		if strings.HasPrefix(name, "trusted.overlay.") || strings.HasPrefix(name, "user.overlay.") {
			return nil, fmt.Errorf("%w: extended attribute %s, which is an overlay file system's", index.ErrUnsupported, name)
		}
		value, err := retryRange(func(p []byte) (int, error) { return unix.Lgetxattr(at, name, p) })
		if err != nil {
			return nil, fmt.Errorf("extended attribute %s: %w", name, err)
		}
		out = append(out, index.Xattr{Name: name, Value: string(value)})
	}
	slices.SortFunc(out, func(a, b index.Xattr) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}

// retryRange calls get with a buffer that is large enough.
func retryRange(get func([]byte) (int, error)) ([]byte, error) {
	for size := 1 << 10; ; size *= 8 {
		p := make([]byte, size)
		n, err := get(p)
		if err == unix.ERANGE && size < 1<<20 {
			continue
		}
		return p[:max(n, 0)], err
	}
}
