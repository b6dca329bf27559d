package index

import (
	"strings"
	"syscall"
)

// Bounds on what a layer may make of a tree. They are the kernel's own, or far
// beyond what any image does.
const (
	maxName    = 255     // bytes of one name
	maxPath    = 4096    // bytes of a path, as written and as resolved
	maxHops    = 255     // symbolic links followed for one path
	maxSteps   = 8192    // path elements looked at for one path, links included
	maxImplied = 1 << 18 // directories one layer names only in the paths of others
)

// NewTree returns a tree that is one directory, 0755 and root's.
func NewTree() *Tree {
	return &Tree{Root: &Inode{Mode: syscall.S_IFDIR | 0o755}}
}

// Apply changes the tree by one layer: it is Begin and an Applier.Apply for
// each change. After an error the tree is half changed and to be thrown away.
func (t *Tree) Apply(layer []Change) error {
	a := t.Begin()
	for _, c := range layer {
		if err := a.Apply(c); err != nil {
			return err
		}
	}
	return nil
}

// Begin starts the next layer. What earlier Appliers wrote is from now on a
// lower layer, and they must not be used any more. Nothing has to be called
// when the layer is complete.
func (t *Tree) Begin() *Applier {
	t.layers++
	return &Applier{tree: t, layer: t.layers, links: map[entry]struct{}{}}
}

// Applier applies the changes of one layer to a tree. It is not safe for
// concurrent use, and nothing else may change the tree meanwhile.
//
// What a change does is what unpacking it to a disk with containerd would do:
//
//   - Missing parents are made, 0755 and root's with time 0; a later change
//     that names such a directory sets its metadata.
//   - Symbolic links in the parents of a path are followed within the root: an
//     absolute target starts at the root again, ".." stops there. The last
//     element is not followed. With lib -> usr/lib in a lower layer, lib/x is
//     usr/lib/x; a change for lib itself replaces the link.
//   - A parent that is a file is an error.
//   - Of several changes for a path the last one wins. A directory over a
//     directory keeps the children, anything else replaces what was there,
//     with all that is below it.
//   - Another name of a replaced or removed hard link is not affected.
//
// In two points it keeps to the OCI image specification where containerd does
// not. Whiteout and Opaque hide what came from lower layers and never what the
// same layer adds, whichever stands first; they make no directories, and where
// there is nothing to hide they do nothing. The root's metadata, which
// containerd drops, is kept.
//
// The time taken is linear in the changes and in what they remove.
type Applier struct {
	tree    *Tree
	layer   uint32
	links   map[entry]struct{} // names this layer gave to inodes of lower ones
	implied int
	stack   []entry // scratch of dir

	// Siblings tend to stand together in a layer, so the last parent is kept.
	// Removing a name may make it stale, adding one cannot.
	cachedPath string
	cachedDir  *Inode
}

// entry is a name in a directory.
type entry struct {
	dir  *Inode
	name string
}

// Apply makes one change. The tree takes over c.Inode, which then is the file
// at c.Path (so that its Extents may still be filled in), except where a
// directory gets new metadata: that is copied. An Inode is added only once;
// further names are made with Link.
//
// Malformed changes give an error that wraps ErrCorrupt and names the path.
func (a *Applier) Apply(c Change) error {
	if err := checkPath(c.Path, c.Path); err != nil {
		return err
	}
	switch c.Op {
	case Add:
		return a.add(c)
	case Link:
		return a.link(c)
	case Whiteout:
		return a.whiteout(c)
	case Opaque:
		dir, err := a.dir(c.Path, c.Path, false)
		if dir != nil {
			a.sweep(dir)
		}
		return err
	}
	return Errorf(ErrCorrupt, c.Path, -1, "operation %d is unknown", c.Op)
}

func (a *Applier) add(c Change) error {
	ino := c.Inode
	if err := checkInode(c.Path, ino); err != nil {
		return err
	}
	if c.Path == "" {
		if !ino.IsDir() {
			return Errorf(ErrCorrupt, "/", -1, "the root is no directory but of type %#o", ino.Type())
		}
		a.describe(a.tree.Root, ino)
		return nil
	}
	at, err := a.place(c.Path)
	if err != nil {
		return err
	}
	if old := at.dir.Children[at.name]; old != nil && old.IsDir() && ino.IsDir() {
		a.describe(old, ino)
		return nil
	}
	ino.Children = nil
	ino.layer, ino.swept = a.layer, a.layer
	a.put(at, ino)
	return nil
}

// describe gives a directory the metadata of another and keeps its children.
func (a *Applier) describe(dir, meta *Inode) {
	children, swept := dir.Children, dir.swept
	*dir = *meta
	dir.Children, dir.swept, dir.layer = children, swept, a.layer
}

func (a *Applier) link(c Change) error {
	if c.Path == "" || c.Target == "" {
		return Errorf(ErrCorrupt, c.Path, -1, "hard link to %q: the root has no other name", c.Target)
	}
	if err := checkPath(c.Path, c.Target); err != nil {
		return err
	}
	parent, name := split(c.Target)
	dir, err := a.dir(c.Path, parent, false)
	if err != nil {
		return err
	}
	var ino *Inode
	if dir != nil {
		ino = dir.Children[name]
	}
	if ino == nil {
		return Errorf(ErrCorrupt, c.Path, -1, "hard link to %q, which does not exist", c.Target)
	}
	if ino.IsDir() {
		return Errorf(ErrCorrupt, c.Path, -1, "hard link to %q, which is a directory", c.Target)
	}
	at, err := a.place(c.Path)
	if err != nil {
		return err
	}
	if at == (entry{dir, name}) {
		return nil
	}
	if ino.layer != a.layer {
		a.links[at] = struct{}{}
	}
	a.put(at, ino)
	return nil
}

func (a *Applier) whiteout(c Change) error {
	if c.Path == "" {
		return Errorf(ErrCorrupt, "/", -1, "whiteout of the root")
	}
	parent, name := split(c.Path)
	dir, err := a.dir(c.Path, parent, false)
	if err != nil || dir == nil {
		return err
	}
	a.hide(entry{dir, name})
	return nil
}

// hide removes what lower layers have put under a name.
func (a *Applier) hide(at entry) {
	ino := at.dir.Children[at.name]
	if ino == nil {
		return
	}
	if ino.IsDir() {
		a.sweep(ino)
	}
	if a.own(at, ino) {
		return
	}
	if len(ino.Children) > 0 {
		// The directory is hidden, but this layer has put files into it: it is
		// what it would be had the whiteout stood before them.
		a.describe(ino, &Inode{Mode: syscall.S_IFDIR | 0o755})
		return
	}
	delete(at.dir.Children, at.name)
	a.cachedDir = nil
}

// sweep removes what lower layers have put into a directory. Nothing of theirs
// can appear in it afterwards, so that one sweep of a directory a layer is
// enough, however many whiteouts ask for it.
func (a *Applier) sweep(dir *Inode) {
	if dir.swept == a.layer {
		return
	}
	dir.swept = a.layer
	for name := range dir.Children {
		a.hide(entry{dir, name})
	}
}

// own tells whether this layer has a change for the name. A directory of a
// lower layer in which this one only changes files is not its own.
func (a *Applier) own(at entry, ino *Inode) bool {
	if ino.layer == a.layer {
		return true
	}
	_, ok := a.links[at]
	return ok
}

// put makes ino what a name stands for.
func (a *Applier) put(at entry, ino *Inode) {
	if at.dir.Children == nil {
		at.dir.Children = map[string]*Inode{}
	}
	if _, ok := at.dir.Children[at.name]; ok {
		a.cachedDir = nil
	}
	at.dir.Children[at.name] = ino
}

// place finds where path is, or is to be, and makes missing parents.
func (a *Applier) place(path string) (entry, error) {
	parent, name := split(path)
	dir, err := a.dir(path, parent, true)
	return entry{dir, name}, err
}

func split(path string) (parent, name string) {
	if i := strings.LastIndexByte(path, '/'); i >= 0 {
		return path[:i], path[i+1:]
	}
	return "", path
}
