package index

import (
	"maps"
	"slices"
)

// Walk calls fn for every name in the tree, parents before children and
// siblings in byte order of their names, so that the order depends on the
// tree alone. The root's path is "", all others are relative without a leading
// slash. A hard-linked inode is visited once for each of its names. The first
// error ends the walk and is returned.
func (t *Tree) Walk(fn func(path string, ino *Inode) error) error {
	return walk("", t.Root, fn)
}

func walk(path string, ino *Inode, fn func(string, *Inode) error) error {
	if err := fn(path, ino); err != nil {
		return err
	}
	for _, name := range ino.Names() {
		child := name
		if path != "" {
			child = path + "/" + name
		}
		if err := walk(child, ino.Children[name], fn); err != nil {
			return err
		}
	}
	return nil
}

// Names returns the names in a directory in byte order.
func (i *Inode) Names() []string {
	return slices.Sorted(maps.Keys(i.Children))
}
