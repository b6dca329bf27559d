package index

import (
	"strings"
	"syscall"
)

// dir returns the directory at path, following symbolic links within the root.
// If there is none, it makes it, or, unless create is set, returns nil: also
// where a file stands in the way. Errors are about the change for the path
// forPath.
func (a *Applier) dir(forPath, path string, create bool) (*Inode, error) {
	if a.cachedDir != nil && a.cachedPath == path {
		return a.cachedDir, nil
	}
	// The directories on the way, the root first. Those to be made have no
	// inode yet: with s -> new/../old, a file s/f makes no directory new.
	stack := append(a.stack[:0], entry{dir: a.tree.Root})
	defer func() { a.stack = stack }()

	hops, size, cache := 0, 0, true
	for rest, steps := path, 0; rest != ""; steps++ {
		if steps == maxSteps {
			return nil, Errorf(ErrCorrupt, forPath, -1, "more than %d steps to resolve its parent", maxSteps)
		}
		var name string
		name, rest, _ = strings.Cut(rest, "/")
		top := stack[len(stack)-1]
		switch name {
		case "", ".":
			continue
		case "..":
			if len(stack) > 1 {
				stack = stack[:len(stack)-1]
				size -= len(top.name) + 1
				cache = cache && top.dir != nil // else a later change may put a link there
			}
			continue
		}
		var child *Inode
		if top.dir != nil {
			child = top.dir.Children[name]
		}
		switch {
		case child == nil && !create:
			return nil, nil
		case child == nil || child.IsDir():
			if size += len(name) + 1; size > maxPath {
				return nil, Errorf(ErrCorrupt, forPath, -1, "its parent resolves to a path of more than %d bytes", maxPath)
			}
			if len(name) > maxName {
				return nil, Errorf(ErrCorrupt, forPath, -1, "a link in its path has a name of %d bytes, want at most %d", len(name), maxName)
			}
			stack = append(stack, entry{child, name})
		case child.Type() == syscall.S_IFLNK:
			if hops++; hops > maxHops {
				return nil, Errorf(ErrCorrupt, forPath, -1, "more than %d symbolic links in its path", maxHops)
			}
			if strings.HasPrefix(child.Target, "/") {
				stack, size = stack[:1], 0
			}
			if rest = child.Target + "/" + rest; len(rest) > 4*maxPath {
				return nil, Errorf(ErrCorrupt, forPath, -1, "symbolic links make its path longer than %d bytes", 4*maxPath)
			}
		case !create:
			return nil, nil
		default:
			return nil, Errorf(ErrCorrupt, forPath, -1, "its parent %q is not a directory", name)
		}
	}
	dir := stack[0].dir
	for _, e := range stack[1:] {
		if e.dir == nil {
			if a.implied++; a.implied > maxImplied {
				return nil, Errorf(ErrLimit, forPath, -1, "more than %d directories without an entry in one layer", maxImplied)
			}
			e.dir = &Inode{Mode: syscall.S_IFDIR | 0o755, layer: a.layer, swept: a.layer}
			a.put(entry{dir, e.name}, e.dir)
		}
		dir = e.dir
	}
	if cache {
		a.cachedPath, a.cachedDir = path, dir
	}
	return dir, nil
}

// checkPath tells what is wrong with a path in the change for forPath.
func checkPath(forPath, path string) error {
	if path == "" {
		return nil
	}
	if len(path) > maxPath {
		return Errorf(ErrCorrupt, forPath[:min(len(forPath), 64)], -1, "a path of %d bytes, want at most %d", len(path), maxPath)
	}
	if strings.IndexByte(path, 0) >= 0 {
		return Errorf(ErrCorrupt, forPath, -1, "path %q has a NUL byte", path)
	}
	for name := range strings.SplitSeq(path, "/") {
		switch {
		case name == "" || name == "." || name == "..":
			return Errorf(ErrCorrupt, forPath, -1, "path %q has an element %q", path, name)
		case len(name) > maxName:
			return Errorf(ErrCorrupt, forPath, -1, "a name of %d bytes, want at most %d", len(name), maxName)
		}
	}
	return nil
}

// checkInode tells what is wrong with an inode that is to be added.
func checkInode(path string, ino *Inode) error {
	if ino == nil {
		return Errorf(ErrCorrupt, path, -1, "added without an inode")
	}
	switch ino.Type() {
	case syscall.S_IFREG, syscall.S_IFDIR, syscall.S_IFCHR, syscall.S_IFBLK, syscall.S_IFIFO, syscall.S_IFSOCK:
		return nil
	case syscall.S_IFLNK:
		if ino.Target == "" || len(ino.Target) >= maxPath || strings.IndexByte(ino.Target, 0) >= 0 {
			return Errorf(ErrCorrupt, path, -1, "a link target of %d bytes, want 1 to %d without NUL", len(ino.Target), maxPath-1)
		}
		return nil
	}
	return Errorf(ErrCorrupt, path, -1, "file type %#o is unknown", ino.Type())
}
