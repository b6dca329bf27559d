package inspect

import (
	"fmt"
	"path"
	"strings"
	"syscall"

	"github.com/shale-image/shale/index"
)

// The kernel's bounds for one look-up.
const (
	maxLinks = 40
	maxPath  = 4096
)

// Resolve finds a path as a process in a container of the image would: links
// on the way are followed, and the last element if it is one and follow is
// set; ".." does not leave the root. A path that ends in a slash names a
// directory. It returns the path without links too, in the form that Walk has.
//
// Errors wrap index.ErrNotExist, also where a file stands in the way,
// syscall.ELOOP for more than 40 links, and syscall.ENAMETOOLONG.
func Resolve(t *index.Tree, name string, follow bool) (at string, ino *index.Inode, err error) {
	fail := func(err error, format string, args ...any) (string, *index.Inode, error) {
		return "", nil, fmt.Errorf("%s: %w%s", name, err, fmt.Sprintf(format, args...))
	}
	names, inodes := []string{}, []*index.Inode{t.Root}
	rest, links := name, 0
	for {
		if len(rest) > maxPath*2 {
			return fail(syscall.ENAMETOOLONG, ": more than %d bytes with the links in it", maxPath*2)
		}
		dir := inodes[len(inodes)-1]
		elem, more, slash := strings.Cut(strings.TrimLeft(rest, "/"), "/")
		if elem == "" {
			return strings.Join(names, "/"), dir, nil
		}
		if !dir.IsDir() {
			return fail(index.ErrNotExist, ": /%s is not a directory", path.Join(names...))
		}
		rest = more
		switch elem {
		case ".":
			continue
		case "..":
			if len(names) > 0 {
				names, inodes = names[:len(names)-1], inodes[:len(inodes)-1]
			}
			continue
		}
		next, ok := dir.Children[elem]
		if !ok || next.Type() == syscall.S_IFLNK && next.Target == "" {
			return fail(index.ErrNotExist, "")
		}
		if next.Type() == syscall.S_IFLNK && (slash || follow) {
			if links++; links > maxLinks {
				return fail(syscall.ELOOP, ": more than %d on the way", maxLinks)
			}
			if strings.HasPrefix(next.Target, "/") {
				names, inodes = names[:0], inodes[:1]
			}
			if rest = next.Target; slash {
				rest += "/" + more
			}
			continue
		}
		if slash && !next.IsDir() {
			return fail(index.ErrNotExist, ": /%s is not a directory", path.Join(append(names, elem)...))
		}
		names, inodes = append(names, elem), append(inodes, next)
	}
}
