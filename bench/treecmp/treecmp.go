// Package treecmp compares two directory trees exactly: names, types, modes,
// owners, sizes, modification times to the nanosecond, extended attributes,
// device numbers, link targets, hard links and every byte of content. What
// file systems keep differently for the same tree is left out: inode numbers,
// sizes and link counts of directories, allocation, access and change times.
//
// It follows no symbolic link and crosses mount points. Memory does not grow
// with content, only with the largest directory, the number of hard-linked
// names and the differences found.
package treecmp

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"sync"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// Field is what differs.
type Field string

// The fields of a Difference, with what A and B of it then are.
const (
	Missing Field = "missing"    // "present" and "absent"
	Type    Field = "type"       // "file", "directory", ...
	Mode    Field = "mode"       // permission bits, octal
	Owner   Field = "owner"      // "uid:gid"
	Size    Field = "size"       // bytes
	Mtime   Field = "mtime"      // seconds.nanoseconds
	Xattr   Field = "xattr"      // `name="value"` or "name absent"
	Rdev    Field = "device"     // "major:minor"
	Target  Field = "target"     // of a symbolic link, quoted
	Links   Field = "link count" // of what is no directory
	Group   Field = "hard link"  // the first name in the tree of the same file
	Content Field = "content"    // the offset of the first difference, and the bytes there
)

// Difference is one thing in which the trees differ.
type Difference struct {
	Path  string // relative; "." is the root
	Field Field
	A, B  string
}

func (d Difference) String() string {
	return fmt.Sprintf("%s: %s: %s != %s", printable(d.Path), d.Field, d.A, d.B)
}

// printable quotes a name that would not show as it is.
func printable(name string) string {
	if q := strconv.Quote(name); q[1:len(q)-1] != name {
		return q
	}
	return name
}

// Options leave things out of a comparison; the zero Options compare all.
type Options struct {
	IgnoreXattrs []string               // names, such as "security.selinux"
	Skip         func(path string) bool // true leaves the path, and all below it, out of both trees
	Limit        int                    // of differences, after which Compare stops; 0 is 1000
}

// ErrLimit tells that there are more differences than Options.Limit.
var ErrLimit = errors.New("too many differences")

// Compare returns in what the trees at a and b differ, sorted by path. The
// error tells why the comparison is not complete, if it is not.
func Compare(a, b string, o Options) ([]Difference, error) {
	if o.Limit == 0 {
		o.Limit = 1000
	}
	c := &comparison{Options: o, a: tree{a, map[inode]string{}}, b: tree{b, map[inode]string{}}}
	// More workers than cores: a tree may come from a network.
	workers := max(4, 2*runtime.NumCPU())
	g, ctx := errgroup.WithContext(context.Background())
	files := make(chan string, workers)
	for range workers {
		g.Go(func() error {
			buf := new(buffers)
			for name := range files {
				if err := c.content(ctx, name, buf); err != nil {
					return err
				}
			}
			return nil
		})
	}
	g.Go(func() error {
		defer close(files)
		return c.pair(ctx, ".", files)
	})
	err := g.Wait()
	if err != nil {
		err = fmt.Errorf("comparing %s and %s: %w", a, b, err)
	}
	slices.SortStableFunc(c.found, func(x, y Difference) int {
		return cmp.Or(cmp.Compare(x.Path, y.Path), cmp.Compare(x.Field, y.Field), cmp.Compare(x.A, y.A))
	})
	return c.found, err
}

type comparison struct {
	Options
	a, b tree // used by the walk alone

	mu    sync.Mutex
	found []Difference
}

type tree struct {
	root  string
	first map[inode]string // hard-linked files: their first name in the walk
}

type inode struct{ dev, ino uint64 }

func (t tree) path(name string) string { return filepath.Join(t.root, name) }

// firstName returns the name under which the file was met first.
func (t tree) firstName(name string, st *unix.Stat_t) string {
	key := inode{st.Dev, st.Ino}
	if _, ok := t.first[key]; !ok {
		t.first[key] = name
	}
	return t.first[key]
}

func (c *comparison) add(name string, f Field, a, b string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.found) >= c.Limit {
		return ErrLimit
	}
	c.found = append(c.found, Difference{name, f, a, b})
	return nil
}

// differ notes a difference if there is one.
func (c *comparison) differ(name string, f Field, a, b string) error {
	if a == b {
		return nil
	}
	return c.add(name, f, a, b)
}

// pair compares a name that both trees have, and all below it. Content of
// files is left to who reads from files.
func (c *comparison) pair(ctx context.Context, name string, files chan<- string) error {
	var a, b unix.Stat_t
	if err := lstat(c.a.path(name), &a); err != nil {
		return err
	}
	if err := lstat(c.b.path(name), &b); err != nil {
		return err
	}
	if a.Mode&unix.S_IFMT != b.Mode&unix.S_IFMT {
		return c.add(name, Type, typeName(a.Mode), typeName(b.Mode))
	}
	if err := c.attributes(name, &a, &b); err != nil {
		return err
	}
	switch a.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return c.directory(ctx, name, files)
	case unix.S_IFREG:
		if a.Size != b.Size || a.Size == 0 {
			return nil // the size was found different
		}
		select {
		case files <- name:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

func (c *comparison) directory(ctx context.Context, name string, files chan<- string) error {
	as, err := os.ReadDir(c.a.path(name))
	if err != nil {
		return err
	}
	bs, err := os.ReadDir(c.b.path(name))
	if err != nil {
		return err
	}
	for len(as) > 0 || len(bs) > 0 { // both are sorted
		var order int
		switch {
		case len(as) == 0:
			order = 1
		case len(bs) == 0:
			order = -1
		default:
			order = cmp.Compare(as[0].Name(), bs[0].Name())
		}
		var child string
		if order <= 0 {
			child, as = as[0].Name(), as[1:]
		}
		if order >= 0 {
			child, bs = bs[0].Name(), bs[1:]
		}
		child = path.Join(name, child)
		if c.Skip != nil && c.Skip(child) {
			continue
		}
		switch {
		case order < 0:
			err = c.add(child, Missing, "present", "absent")
		case order > 0:
			err = c.add(child, Missing, "absent", "present")
		default:
			err = c.pair(ctx, child, files)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func lstat(name string, st *unix.Stat_t) error {
	if err := unix.Lstat(name, st); err != nil {
		return &os.PathError{Op: "lstat", Path: name, Err: err}
	}
	return nil
}
