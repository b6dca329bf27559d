package erofs

import (
	"encoding/binary"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/index"
)

// reader is one call of Image.Tree.
type reader struct {
	im      *Image
	v       *view
	limits  Limits // what is left of them
	extents func(path string, size int64, runs []Run) ([]index.Extent, error)
	seen    map[uint64]*index.Inode // by nid
	names   map[string]string       // of attributes
	entries []entry                 // of the directories that are being read, innermost last
	runs    []Run
}

// entry is a name in a directory.
type entry struct {
	name string
	nid  uint64
	kind uint8 // file type; 0 if not told
	dir  *index.Inode
}

// Tree reads all inodes. extents is called once for each regular file that is
// not empty, under the first of its paths, with the entries of its chunk
// index; what it returns become the file's Extents, and an error ends the
// reading and is returned. runs is only valid during the call, is in order of
// Off, and is checked for device numbers but not for blocks beyond a device's
// size. A nil extents leaves Extents empty. Names that share an inode number
// share an Inode. Chunks and Blobs of the tree are left to the caller.
//
// Errors wrap index.ErrCorrupt, index.ErrUnsupported or index.ErrLimit, or what
// the ReaderAt returned.
func (im *Image) Tree(limits Limits, extents func(path string, size int64, runs []Run) ([]index.Extent, error)) (*index.Tree, error) {
	rd := &reader{
		im: im, v: &view{r: im.r, size: im.size, name: im.name},
		limits: limits.withDefaults(), extents: extents,
		seen: map[uint64]*index.Inode{}, names: map[string]string{},
	}
	in, err := rd.inode(im.super.RootNID)
	if err != nil {
		return nil, err
	}
	if in.mode&unix.S_IFMT != unix.S_IFDIR {
		return nil, rd.v.errorf(index.ErrCorrupt, in.pos, "the root is not a directory")
	}
	root, err := rd.file(nil, &in)
	if err != nil {
		return nil, err
	}
	rd.seen[in.nid] = root
	if err := rd.dir(nil, in.nid, in.nid, root); err != nil {
		return nil, err
	}
	return &index.Tree{Root: root}, nil
}

// dir reads the names in a directory and all that is below. A directory is
// entered once, so this ends. Inodes are read in the order of names, then
// subdirectories, which is forwards in images as we write them.
func (rd *reader) dir(path []byte, nid, parent uint64, dir *index.Inode) error {
	in, err := rd.inode(nid)
	if err != nil {
		return err
	}
	first := len(rd.entries)
	if err := rd.list(path, &in, parent); err != nil {
		return err
	}
	last := len(rd.entries)
	if len(path) > 0 {
		path = append(path, '/')
	}
	dir.Children = make(map[string]*index.Inode, last-first)
	for i := first; i < last; i++ {
		e := &rd.entries[i]
		if dir.Children[e.name], err = rd.child(append(path, e.name...), e); err != nil {
			return err
		}
	}
	for i := first; i < last; i++ {
		if e := rd.entries[i]; e.dir != nil {
			if err := rd.dir(append(path, e.name...), e.nid, nid, e.dir); err != nil {
				return err
			}
		}
	}
	rd.entries = rd.entries[:first]
	return nil
}

// child returns the inode of an entry, and notes in the entry if it is a
// directory.
func (rd *reader) child(path []byte, e *entry) (*index.Inode, error) {
	ino, known := rd.seen[e.nid]
	if !known {
		in, err := rd.inode(e.nid)
		if err != nil {
			return nil, err
		}
		if ino, err = rd.file(path, &in); err != nil {
			return nil, err
		}
		rd.seen[e.nid] = ino
	}
	switch {
	case known && ino.IsDir():
		return nil, rd.v.errorf(index.ErrCorrupt, -1, "%s: directory %d has a second name", path, e.nid)
	case e.kind != 0 && e.kind != fileType(ino.Mode):
		return nil, rd.v.errorf(index.ErrCorrupt, -1, "%s: mode is %#o, but the directory says type %d", path, ino.Mode, e.kind)
	case ino.IsDir():
		e.dir = ino
	}
	return ino, nil
}

// file turns an inode into one of the model, without its Children.
func (rd *reader) file(path []byte, in *rawInode) (*index.Inode, error) {
	ino := &index.Inode{Mode: in.mode, UID: in.uid, GID: in.gid, Mtime: in.mtime, Rdev: in.rdev()}
	var err error
	if ino.Xattrs, err = rd.xattrs(in); err != nil {
		return nil, err
	}
	switch ino.Type() {
	case unix.S_IFREG:
		ino.Size = in.size
		ino.Extents, err = rd.content(path, in)
	case unix.S_IFLNK:
		ino.Target, err = rd.target(in)
	}
	return ino, err
}

// list appends the names in a directory to entries. They must be sorted, and
// "." and ".." must be what they are everywhere.
func (rd *reader) list(path []byte, in *rawInode, parent uint64) error {
	self, up, last := in.noDot, false, ""
	for i := int64(0); i*BlockSize < in.size; i++ {
		pos, n, err := rd.flat(in, i)
		if err != nil {
			return err
		}
		b, err := rd.v.read(pos, n)
		if err != nil {
			return err
		}
		for k := 0; ; k++ {
			e, more, err := rd.dirent(b, k, pos)
			if err != nil {
				return err
			}
			if e.name <= last {
				return rd.v.errorf(index.ErrCorrupt, pos, "%q follows %q in directory %q", e.name, last, path)
			}
			last = e.name
			switch e.name {
			case ".":
				self = e.nid == in.nid
			case "..":
				up = e.nid == parent
			default:
				if len(path)+1+len(e.name) > rd.limits.PathBytes {
					return rd.v.errorf(index.ErrLimit, pos, "a path exceeds the limit PathBytes, %d", rd.limits.PathBytes)
				}
				rd.entries = append(rd.entries, e)
			}
			if !more {
				break
			}
		}
	}
	if !self || !up {
		return rd.v.errorf(index.ErrCorrupt, in.pos, "directory %q lacks a right \".\" or \"..\"", path)
	}
	return nil
}

// dirent returns entry k of a block of a directory and tells whether more
// follow in the block. The last name ends at NUL or with the block.
func (rd *reader) dirent(b []byte, k int, pos int64) (e entry, more bool, err error) {
	le := binary.LittleEndian
	bad := func(what string) (entry, bool, error) {
		return entry{}, false, rd.v.errorf(index.ErrCorrupt, pos, "name %d of this directory block %s", k, what)
	}
	if len(b) < direntSize {
		return bad("is cut off")
	}
	first := int(le.Uint16(b[8:])) // where the first name starts, entries end
	if first < direntSize || first%direntSize != 0 || first > len(b) {
		return bad("starts at no possible offset")
	}
	de := b[k*direntSize:]
	off, end := int(le.Uint16(de[8:])), len(b)
	if more = (k+1)*direntSize < first; more {
		end = int(le.Uint16(de[direntSize+8:]))
	}
	if off < first || off > end || end > len(b) {
		return bad("starts or ends at no possible offset")
	}
	if !more {
		for i, c := range b[off:end] {
			if c == 0 {
				end = off + i
				break
			}
		}
	}
	if end-off > maxName {
		return bad("has more than 255 bytes")
	}
	if name := b[off:end]; string(name) != "." && string(name) != ".." {
		if rd.limits.Entries--; rd.limits.Entries < 0 {
			return entry{}, false, rd.v.errorf(index.ErrLimit, pos, "there are too many names (Entries)")
		}
		if err := rd.take(pos, len(name)); err != nil {
			return entry{}, false, err
		}
	}
	e = entry{name: string(b[off:end]), nid: le.Uint64(de), kind: de[10]}
	if e.name == "" || strings.IndexByte(e.name, '/') >= 0 || strings.IndexByte(e.name, 0) >= 0 {
		return bad("is empty or contains a slash or NUL")
	}
	return e, more, nil
}

// take counts a name, target or attribute against the limits, before it is allocated.
func (rd *reader) take(pos int64, n int) error {
	if rd.limits.MetadataBytes -= int64(n); rd.limits.MetadataBytes < 0 {
		return rd.v.errorf(index.ErrLimit, pos, "names, targets and attributes take too much (MetadataBytes)")
	}
	return nil
}
