package export

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/content"
	"github.com/shale-image/shale/index"
)

// ErrNotEmpty says that a directory to export into has something in it.
var ErrNotEmpty = errors.New("directory is not empty")

// Dir writes the tree into a directory, which is made if it is not there and
// must be empty: with owners, modes, times, extended attributes, hard links,
// devices and holes. Nothing outside of the directory is touched, whatever the
// tree says: every name is made relative to a descriptor of its parent.
// Owners and devices need root.
func Dir(ctx context.Context, dir string, t *index.Tree, src blob.Source) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if names, err := d.Readdirnames(1); err != io.EOF {
		if err != nil {
			return err
		}
		return fmt.Errorf("%s: %w (there is %q)", dir, ErrNotEmpty, names[0])
	}
	w := &dirWriter{ctx: ctx, root: d, tree: t, source: src, first: map[*index.Inode]string{}}
	w.files, w.ctx = errgroup.WithContext(ctx)
	w.files.SetLimit(4 * runtime.GOMAXPROCS(0))
	err = w.fill(d, "", t.Root)
	if e := w.files.Wait(); e != nil && (err == nil || errors.Is(err, context.Canceled)) {
		err = e
	}
	if err != nil {
		return err
	}
	// Directories last, deepest first: what is made in one changes its mtime,
	// and may need permissions that it is not to have.
	for i := len(w.dirs) - 1; i >= 0; i-- {
		if err := w.finish(w.dirs[i].path, w.dirs[i].ino); err != nil {
			return err
		}
	}
	return nil
}

type dirWriter struct {
	ctx    context.Context
	root   *os.File
	tree   *index.Tree
	source blob.Source
	files  *errgroup.Group
	dirs   []madeDir

	first map[*index.Inode]string // the name an inode was made under
}

type madeDir struct {
	path string
	ino  *index.Inode
}

// fill makes the children of a directory.
func (w *dirWriter) fill(d *os.File, at string, ino *index.Inode) error {
	w.dirs = append(w.dirs, madeDir{at, ino})
	for _, name := range ino.Names() {
		if err := w.ctx.Err(); err != nil {
			return err
		}
		if err := checkName(name); err != nil {
			return fmt.Errorf("/%s: %w", at, err)
		}
		p := path.Join(at, name)
		if err := w.make(d, p, name, ino.Children[name]); err != nil {
			return fmt.Errorf("%s: %w", p, err)
		}
	}
	return nil
}

// checkName refuses names that lead elsewhere. Readers of indexes do so too.
func checkName(name string) error {
	if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") {
		return fmt.Errorf("%w: a file with the name %q", index.ErrCorrupt, name)
	}
	return nil
}

func (w *dirWriter) make(d *os.File, p, name string, ino *index.Inode) error {
	fd := int(d.Fd())
	if !ino.IsDir() {
		if first, ok := w.first[ino]; ok {
			return unix.Linkat(int(w.root.Fd()), first, fd, name, 0)
		}
		w.first[ino] = p
	}
	switch ino.Type() {
	case syscall.S_IFDIR:
		if err := unix.Mkdirat(fd, name, 0o700); err != nil {
			return err
		}
		sub, err := openat(fd, name, unix.O_RDONLY|unix.O_DIRECTORY)
		if err != nil {
			return err
		}
		defer sub.Close()
		return w.fill(sub, p, ino)
	case syscall.S_IFREG:
		f, err := openat(fd, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL)
		if err != nil {
			return err
		}
		w.files.Go(func() error {
			err := w.write(f, ino)
			if cerr := f.Close(); err == nil {
				err = cerr
			}
			if err != nil {
				return fmt.Errorf("%s: %w", p, err)
			}
			return nil
		})
		return nil
	case syscall.S_IFLNK:
		if err := unix.Symlinkat(ino.Target, fd, name); err != nil {
			return err
		}
	case syscall.S_IFCHR, syscall.S_IFBLK, syscall.S_IFIFO, syscall.S_IFSOCK:
		if err := unix.Mknodat(fd, name, ino.Type()|0o600, int(ino.Rdev)); err != nil {
			return err
		}
	default:
		return fmt.Errorf("type %#o: %w", ino.Type(), index.ErrUnsupported)
	}
	return metadata(fd, name, ino)
}

func openat(dir int, name string, flags int) (*os.File, error) {
	fd, err := unix.Openat(dir, name, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

func (w *dirWriter) write(f *os.File, ino *index.Inode) error {
	err := content.Pieces(w.ctx, w.tree, w.source, ino, func(p content.Piece) error {
		_, err := f.WriteAt(p.Data, p.Off)
		return err
	})
	if err != nil {
		return err
	}
	if err := f.Truncate(ino.Size); err != nil {
		return err
	}
	fd := int(f.Fd())
	if err := unix.Fchown(fd, int(ino.UID), int(ino.GID)); err != nil {
		return os.NewSyscallError("chown", err)
	}
	for _, x := range ino.Xattrs {
		if err := unix.Fsetxattr(fd, x.Name, []byte(x.Value), 0); err != nil {
			return fmt.Errorf("set extended attribute %s: %w", x.Name, err)
		}
	}
	if err := unix.Fchmod(fd, ino.Mode&0o7777); err != nil {
		return os.NewSyscallError("chmod", err)
	}
	ts := times(ino)
	return os.NewSyscallError("utimensat", unix.UtimesNanoAt(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), ts[:], 0))
}

// finish sets a directory's own metadata.
func (w *dirWriter) finish(p string, ino *index.Inode) error {
	how := &unix.OpenHow{Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS}
	if p == "" {
		p = "."
	}
	fd, err := unix.Openat2(int(w.root.Fd()), p, how)
	if err != nil {
		return fmt.Errorf("%s: %w", p, err)
	}
	defer unix.Close(fd)
	if err := metadata(fd, "", ino); err != nil {
		return fmt.Errorf("%s: %w", p, err)
	}
	return nil
}

// metadata sets owner, attributes, mode and time of a name in a directory, or,
// with an empty name, of the directory itself. Links are not followed.
func metadata(dir int, name string, ino *index.Inode) error {
	flags := unix.AT_SYMLINK_NOFOLLOW
	if name == "" {
		flags = unix.AT_EMPTY_PATH
	}
	if err := unix.Fchownat(dir, name, int(ino.UID), int(ino.GID), flags); err != nil {
		return os.NewSyscallError("chown", err)
	}
	// The kernel has no setxattrat; the magic link leads to the directory
	// itself, and the last element is not followed.
	at := fmt.Sprintf("/proc/self/fd/%d", dir)
	if name != "" {
		at += "/" + name
	}
	for _, x := range ino.Xattrs {
		set := unix.Lsetxattr
		if name == "" {
			set = unix.Setxattr
		}
		if err := set(at, x.Name, []byte(x.Value), 0); err != nil {
			return fmt.Errorf("set extended attribute %s: %w", x.Name, err)
		}
	}
	if ino.Type() != syscall.S_IFLNK {
		if err := unix.Fchmodat(unix.AT_FDCWD, at, ino.Mode&0o7777, 0); err != nil {
			return os.NewSyscallError("chmod", err)
		}
	}
	ts := times(ino)
	timeFlags := unix.AT_SYMLINK_NOFOLLOW
	if name == "" {
		timeFlags = 0
	}
	return os.NewSyscallError("utimensat", unix.UtimesNanoAt(unix.AT_FDCWD, at, ts[:], timeFlags))
}

func times(ino *index.Inode) [2]unix.Timespec {
	m := unix.Timespec{Sec: ino.Mtime.Sec, Nsec: int64(ino.Mtime.Nsec)}
	return [2]unix.Timespec{m, m}
}
