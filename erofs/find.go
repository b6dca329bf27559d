package erofs

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/index"
)

// What Find goes through at most: names, and symbolic links, as Linux does.
const (
	maxSteps = 1 << 10
	maxLinks = 40
)

// Find returns the node that a path leads to from the root directory, through symbolic links,
// or an error that wraps index.ErrNotExist. ".." of the root is the root.
func (n *Nodes) Find(path string) (Node, error) {
	dirs := []uint64{n.Root()} // on the way
	rest, links := path, 0
	for steps := 0; ; steps++ {
		at := dirs[len(dirs)-1]
		rest = strings.TrimLeft(rest, "/")
		if rest == "" {
			return n.Stat(at)
		}
		if steps == maxSteps || len(rest) > 1<<16 {
			return Node{}, fmt.Errorf("%q: too many names and symbolic links: %w", path, index.ErrNotExist)
		}
		var name string
		var more bool // as of "name/", which is a directory
		switch name, rest, more = strings.Cut(rest, "/"); name {
		case ".":
			continue
		case "..":
			dirs = dirs[:max(1, len(dirs)-1)]
			continue
		}
		child, err := n.Lookup(at, name)
		if err != nil {
			return Node{}, err
		}
		in, err := n.Stat(child)
		if err != nil {
			return Node{}, err
		}
		switch in.Mode & unix.S_IFMT {
		case unix.S_IFLNK:
			if links++; links > maxLinks {
				return Node{}, fmt.Errorf("%q: more than %d symbolic links: %w", path, maxLinks, index.ErrNotExist)
			}
		case unix.S_IFDIR:
			dirs = append(dirs, child)
			continue
		default:
			if more {
				return Node{}, fmt.Errorf("%q: not a directory: %w", path, index.ErrNotExist)
			}
			return in, nil
		}
		target, err := n.Readlink(child)
		if err != nil {
			return Node{}, err
		}
		if strings.HasPrefix(target, "/") {
			dirs = dirs[:1]
		}
		if more {
			target += "/" + rest
		}
		rest = target
	}
}
