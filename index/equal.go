package index

import (
	"fmt"
	"slices"
	"syscall"
)

// Equal compares two trees by what a container would see: names, metadata,
// hard-link groups, and the digests of the data at each offset. Where the
// bytes lie does not matter, and neither whether zeros are a hole or chunks of
// zeros. The error names the first difference and wraps ErrCorrupt.
func Equal(want, got *Tree) error {
	c := comparer{want: want, got: got, names: map[*Inode]*Inode{}}
	return c.inode("", want.Root, got.Root)
}

type comparer struct {
	want, got *Tree
	names     map[*Inode]*Inode // inodes with several names: want -> got
}

func (c *comparer) inode(path string, a, b *Inode) error {
	differ := func(what string, x, y any) error {
		return fmt.Errorf("%w: %q: %s is %v, want %v", ErrCorrupt, "/"+path, what, y, x)
	}
	if seen, ok := c.names[a]; ok {
		if seen != b {
			return differ("hard link", "one inode", "several")
		}
		return nil
	}
	c.names[a] = b
	ax, bx := sortedXattrs(a), sortedXattrs(b)
	device := a.Type() == syscall.S_IFCHR || a.Type() == syscall.S_IFBLK
	switch {
	case a.Mode != b.Mode:
		return differ("mode", fmt.Sprintf("%#o", a.Mode), fmt.Sprintf("%#o", b.Mode))
	case a.UID != b.UID || a.GID != b.GID:
		return differ("owner", [2]uint32{a.UID, a.GID}, [2]uint32{b.UID, b.GID})
	case a.Mtime != b.Mtime:
		return differ("mtime", a.Mtime, b.Mtime)
	case device && a.Rdev != b.Rdev:
		return differ("device number", a.Rdev, b.Rdev)
	case a.IsRegular() && a.Size != b.Size:
		return differ("size", a.Size, b.Size)
	case a.Target != b.Target:
		return differ("link target", a.Target, b.Target)
	case !slices.Equal(ax, bx):
		return differ("extended attributes", ax, bx)
	}
	if a.IsRegular() {
		if err := c.data(path, a, b); err != nil {
			return err
		}
	}
	an, bn := a.Names(), b.Names()
	if !slices.Equal(an, bn) {
		return differ("list of names", an, bn)
	}
	for _, name := range an {
		child := name
		if path != "" {
			child = path + "/" + name
		}
		if err := c.inode(child, a.Children[name], b.Children[name]); err != nil {
			return err
		}
	}
	return nil
}

// data compares the extents of two files.
func (c *comparer) data(path string, a, b *Inode) error {
	x, y := a.Extents, b.Extents
	for len(x) > 0 || len(y) > 0 {
		switch {
		case len(x) > 0 && len(y) > 0 && x[0].Off == y[0].Off:
			p, q := &c.want.Chunks[x[0].Chunk], &c.got.Chunks[y[0].Chunk]
			if p.Digest != q.Digest || p.Size != q.Size {
				return fmt.Errorf("%w: %q: at offset %d: content is %s, want %s", ErrCorrupt, "/"+path, x[0].Off, q.Digest, p.Digest)
			}
			x, y = x[1:], y[1:]
		case len(y) == 0 || len(x) > 0 && x[0].Off < y[0].Off:
			if p := &c.want.Chunks[x[0].Chunk]; !p.zeros() {
				return fmt.Errorf("%w: %q: at offset %d: content is a hole, want %s", ErrCorrupt, "/"+path, x[0].Off, p.Digest)
			}
			x = x[1:]
		default:
			if q := &c.got.Chunks[y[0].Chunk]; !q.zeros() {
				return fmt.Errorf("%w: %q: at offset %d: content is %s, want a hole", ErrCorrupt, "/"+path, y[0].Off, q.Digest)
			}
			y = y[1:]
		}
	}
	return nil
}

func sortedXattrs(i *Inode) []Xattr {
	x := slices.Clone(i.Xattrs)
	slices.SortFunc(x, func(a, b Xattr) int {
		if a.Name < b.Name {
			return -1
		}
		return 1
	})
	return x
}
