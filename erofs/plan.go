package erofs

import (
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/index"
)

// node is an inode and where it goes.
type node struct {
	ino         *index.Inode
	pos         int64  // of the inode, bytes
	size        int64  // i_size
	block       int64  // directories and symbolic links: first whole block, counted from Layout.data
	first, last uint32 // directories: their part of Layout.dirents
	parent      uint32 // the directory that it was found in first
	nlink       uint32
	xattr       uint32 // bytes of attributes
	layout      uint8
	chunkBits   uint8 // log2 of blocks a chunk
}

// dirent is a name and the position of its node in Layout.nodes.
type dirent struct {
	name string
	node uint32
}

// collect fills nodes and dirents. The inodes of one directory lie together,
// followed by those of its first subdirectory and so on: a directory that is
// listed, and a tree that is walked depth first, are read forwards.
func (l *list) collect() error {
	if l.tree.Root == nil || !l.tree.Root.IsDir() {
		return index.Errorf(index.ErrCorrupt, "/", -1, "the root is not a directory")
	}
	seen := map[*index.Inode]uint32{l.tree.Root: 0}
	l.nodes = append(l.nodes, node{ino: l.tree.Root, nlink: 2})
	for stack := []uint32{0}; len(stack) > 0; {
		d := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		if err := l.directory(d); err != nil {
			return err
		}
		below := len(stack)
		children := l.nodes[d].ino.Children
		for i := l.nodes[d].first; i < l.nodes[d].last; i++ {
			e := &l.dirents[i]
			ino := children[e.name]
			if ino == nil { // "." or ".."
				continue
			}
			at, known := seen[ino]
			switch {
			case !known:
				at = uint32(len(l.nodes))
				seen[ino] = at
				l.nodes = append(l.nodes, node{ino: ino, parent: d, nlink: 1})
				if ino.IsDir() {
					l.nodes[at].nlink = 2
					l.nodes[d].nlink++
					stack = append(stack, at)
				}
			case ino.IsDir():
				return index.Errorf(index.ErrCorrupt, join(l.path(d), e.name), -1, "the directory has a second name")
			default:
				l.nodes[at].nlink++
			}
			e.node = at
		}
		slices.Reverse(stack[below:])
	}
	return nil
}

// directory appends the names of directory d to dirents, in byte order. "." and ".."
// are names like others: "!" and "-" sort before them.
func (l *list) directory(d uint32) error {
	n := &l.nodes[d]
	first := len(l.dirents)
	l.dirents = append(l.dirents, dirent{".", d}, dirent{"..", n.parent})
	for name, ino := range n.ino.Children {
		if err := checkName(name); err != "" {
			return index.Errorf(index.ErrUnsupported, join(l.path(d), name), -1, "the name %s", err)
		}
		if ino == nil {
			return index.Errorf(index.ErrCorrupt, join(l.path(d), name), -1, "a name without an inode")
		}
		l.dirents = append(l.dirents, dirent{name: name})
	}
	names := l.dirents[first:]
	slices.SortFunc(names, func(a, b dirent) int { return strings.Compare(a.name, b.name) })
	n.first, n.last = uint32(first), uint32(len(l.dirents))
	for len(names) > 0 {
		k, used := fillBlock(names)
		names = names[k:]
		n.size += int64(used)
		if len(names) > 0 {
			n.size = roundUp(n.size, BlockSize)
		}
	}
	return nil
}

// checkName returns what is wrong with a name in a directory, or "".
func checkName(name string) string {
	switch {
	case name == "":
		return "is empty"
	case name == "." || name == "..":
		return "is reserved"
	case len(name) > maxName:
		return "has more than 255 bytes"
	case strings.IndexByte(name, '/') >= 0 || strings.IndexByte(name, 0) >= 0:
		return "contains a slash or NUL"
	}
	return ""
}

// fillBlock returns how many of the names fit the next block of a directory
// and the bytes that they take there.
func fillBlock(names []dirent) (k, used int) {
	for k < len(names) && used+direntSize+len(names[k].name) <= BlockSize {
		used += direntSize + len(names[k].name)
		k++
	}
	return k, used
}

// path returns the first path that leads to a node, for errors.
func (l *list) path(at uint32) string {
	if at == 0 {
		return "/"
	}
	var names []string
	for ; at != 0; at = l.nodes[at].parent {
		p := &l.nodes[l.nodes[at].parent]
		for _, e := range l.dirents[p.first:p.last] {
			if e.name != "." && e.name != ".." && p.ino.Children[e.name] == l.nodes[at].ino {
				names = append(names, e.name)
				break
			}
		}
	}
	slices.Reverse(names)
	return strings.Join(names, "/")
}

func join(dir, name string) string {
	if dir == "/" {
		return name
	}
	return dir + "/" + name
}

// together is how much of an inode with its attributes and chunk index is kept
// in one block, so that one read has it all; it costs less than that at the end
// of a block.
const together = 256

// place decides layouts and addresses.
func (l *Layout) place() error {
	start := int64(devtSlot+len(l.devices)) * slotSize
	l.meta = start &^ (BlockSize - 1)
	if start == l.meta {
		start += inodeSlot // nid 0 would show as inode number 0, which readdir(3) may hide
	}
	pos, blocks := start, int64(0)
	for i := range l.nodes {
		n := &l.nodes[i]
		path := func() string { return l.path(uint32(i)) }
		if err := checkInode(path, n.ino); err != nil {
			return err
		}
		xattr, err := xattrSize(path, n.ino.Xattrs)
		if err != nil {
			return err
		}
		n.xattr = xattr
		body := extendedSize + int64(xattr) // what lies at pos
		whole := int64(extendedSize)        // how much of that must not cross a block
		switch {
		case n.ino.IsRegular():
			table, err := l.planFile(n, path)
			if err != nil {
				return err
			}
			n.layout, n.size = layoutChunked, n.ino.Size
			l.chunked = l.chunked || table > 0
			body = roundUp(body, chunkEntry) + table
			if body <= together {
				whole = body
			}
		case n.ino.IsDir() || n.ino.Type() == unix.S_IFLNK:
			if !n.ino.IsDir() {
				n.size = int64(len(n.ino.Target))
			}
			tail := n.size % BlockSize
			n.layout, n.block = layoutPlain, blocks
			if tail > 0 && body+tail <= BlockSize {
				n.layout = layoutInline
				body += tail
				whole = body
				blocks += n.size / BlockSize
			} else {
				blocks += fileBlocks(n.size)
			}
		case body <= together:
			whole = body
		}
		if pos%BlockSize+whole > BlockSize {
			pos = roundUp(pos, BlockSize)
		}
		n.pos = pos
		pos = roundUp(pos+body, inodeSlot)
	}
	l.data = roundUp(pos, BlockSize)
	l.end = l.data + blocks*BlockSize
	return nil
}

func checkInode(path func() string, ino *index.Inode) error {
	switch {
	case fileType(ino.Mode) == 0 || ino.Mode > 0xffff:
		return index.Errorf(index.ErrUnsupported, path(), -1, "mode is %#o", ino.Mode)
	case ino.Mtime.Nsec >= 1e9:
		return index.Errorf(index.ErrCorrupt, path(), -1, "time has %d ns", ino.Mtime.Nsec)
	case ino.Type() == unix.S_IFLNK && (ino.Target == "" || len(ino.Target) > maxTarget || strings.IndexByte(ino.Target, 0) >= 0):
		return index.Errorf(index.ErrUnsupported, path(), -1, "link target has %d bytes; want 1 to %d and no NUL", len(ino.Target), maxTarget)
	case isDevice(ino.Mode) && (unix.Major(ino.Rdev) > 0xfff || unix.Minor(ino.Rdev) > 0xfffff || unix.Mkdev(unix.Major(ino.Rdev), unix.Minor(ino.Rdev)) != ino.Rdev):
		return index.Errorf(index.ErrUnsupported, path(), -1, "device number %d:%d; Linux has 12 and 20 bits", unix.Major(ino.Rdev), unix.Minor(ino.Rdev))
	}
	return nil
}

func isDevice(mode uint32) bool {
	return mode&unix.S_IFMT == unix.S_IFCHR || mode&unix.S_IFMT == unix.S_IFBLK
}
