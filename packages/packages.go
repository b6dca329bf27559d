// Package packages reads the databases of the package managers whose packages an
// image is made of: which packages are installed, and which files are theirs.
//
//	dpkg.go    Debian and its kin, and images that have only its control files
//	apk.go     Alpine
//	rpm.go     Red Hat, Fedora: the headers of packages, and
//	sqlite.go  the database they are in
//
// It knows their formats and nothing of images: it reads from a file system.
// What it reads is from outside, and bounded.
package packages

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strings"

	"github.com/shale-image/shale/index"
)

// Package is an installed package.
type Package struct {
	Name    string
	Version string
	Arch    string
	Files   []string // relative to the root, where they really lie; directories may be among them
}

// Database is what package managers know.
type Database struct {
	Kinds    []string // of those that there are: "dpkg", "apk", "rpm"
	Packages []Package
}

// Bounds on a database.
const (
	maxFile     = 256 << 20 // bytes of a file
	maxLine     = 1 << 20   // of a line
	maxPackages = 100_000
	maxFiles    = 10_000_000 // of all packages
	maxPath     = 4096       // bytes of a name
	maxNames    = 256 << 20  // of all names, of packages too
)

// Read reads what databases there are; there may be none. Errors wrap
// index.ErrCorrupt, index.ErrLimit or index.ErrUnsupported and name the file.
func Read(root fs.FS) (*Database, error) {
	d := &Database{}
	r := &reader{root: root, links: map[string]string{}}
	for _, k := range []struct {
		name string
		read func(*reader) ([]Package, error)
	}{{"dpkg", dpkg}, {"apk", apk}, {"rpm", rpm}} {
		found, err := k.read(r)
		if err != nil {
			return nil, err
		}
		if found == nil {
			continue
		}
		d.Kinds = append(d.Kinds, k.name)
		d.Packages = append(d.Packages, found...)
	}
	return d, nil
}

// Source is the file that another was made from when its package was installed,
// which has the one in its list but not the other; "" if none is known. They are
// Python's: lib/__pycache__/x.cpython-311.pyc is made of lib/x.py.
func Source(name string) string {
	dir, base := path.Split(name)
	above, cache := path.Split(path.Clean(dir))
	stem, _, ok := strings.Cut(base, ".")
	if cache != "__pycache__" || !ok || path.Ext(base) != ".pyc" {
		return ""
	}
	return above + stem + ".py"
}

// reader reads files of an image.
type reader struct {
	root     fs.FS
	links    map[string]string // where a directory really is
	packages int               // so far
	files    int               // of packages, so far
	bytes    int               // of names, so far
}

// found counts a package that is kept.
func (r *reader) found(p *Package, name string) error {
	if r.packages++; r.packages > maxPackages {
		return index.Errorf(index.ErrLimit, name, -1, "more than %d packages", maxPackages)
	}
	if !r.room(p.Name) || !r.room(p.Version) || !r.room(p.Arch) {
		return index.Errorf(index.ErrLimit, name, -1, "names of more than %d bytes", maxNames)
	}
	return nil
}

// open opens a file, which must be a regular one: a pipe could keep it for ever.
func (r *reader) open(name string) (fs.File, error) {
	st, err := fs.Stat(r.root, name)
	if err == nil && !st.Mode().IsRegular() {
		err = index.Errorf(index.ErrCorrupt, name, -1, "it is no regular file")
	}
	if err != nil {
		return nil, err
	}
	return r.root.Open(name)
}

// room takes a name off what there is room for.
func (r *reader) room(name string) bool {
	r.bytes += len(name)
	return r.bytes <= maxNames
}

// lines calls fn for the lines of a file. One that is not there is fs.ErrNotExist.
func (r *reader) lines(name string, fn func(string) error) error {
	f, err := r.open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	in := &io.LimitedReader{R: f, N: maxFile + 1}
	s := bufio.NewScanner(in)
	s.Buffer(nil, maxLine)
	for s.Scan() {
		if err := fn(s.Text()); err != nil {
			return err
		}
	}
	if errors.Is(s.Err(), bufio.ErrTooLong) || in.N == 0 {
		return index.Errorf(index.ErrLimit, name, -1, "more than %d bytes, or %d in a line", maxFile, maxLine)
	}
	if s.Err() != nil {
		return fmt.Errorf("%s: %w", name, s.Err())
	}
	return nil
}

// add adds a file to a package as the package manager has it: absolute, and with
// the directories that its package was made for.
func (r *reader) add(p *Package, name string) error {
	name = strings.TrimPrefix(path.Clean("/"+name), "/")
	if name == "" {
		return nil
	}
	if len(name) > maxPath {
		return index.Errorf(index.ErrLimit, p.Name, -1, "a name of more than %d bytes", maxPath)
	}
	if r.files++; r.files > maxFiles {
		return index.Errorf(index.ErrLimit, p.Name, -1, "more than %d files in all packages", maxFiles)
	}
	if dir, base := path.Split(name); dir != "" {
		name = path.Join(r.really(path.Clean(dir), 0), base)
	}
	if len(name) > maxPath || !r.room(name) { // links may have made it longer
		return index.Errorf(index.ErrLimit, p.Name, -1, "a name of more than %d bytes, or names of more than %d", maxPath, maxNames)
	}
	p.Files = append(p.Files, name)
	return nil
}

// really follows the symbolic links that lead to a directory: lib/x86_64-linux-gnu
// is in usr/lib today.
func (r *reader) really(dir string, depth int) string {
	if dir == "." || depth > 40 {
		return dir
	}
	if to, ok := r.links[dir]; ok {
		return to
	}
	parent, base := path.Split(dir)
	at := path.Join(r.really(path.Clean(parent), depth+1), base)
	if st, err := fs.Lstat(r.root, at); err == nil && st.Mode()&fs.ModeSymlink != 0 {
		if to, err := fs.ReadLink(r.root, at); err == nil {
			if !path.IsAbs(to) {
				to = path.Join("/", path.Dir(at), to)
			}
			if to = strings.TrimPrefix(path.Clean(to), "/"); to != "" && to != dir {
				at = r.really(to, depth+1)
			}
		}
	}
	if r.room(dir) && r.room(at) { // else add says that there is none
		r.links[dir] = at
	}
	return at
}
