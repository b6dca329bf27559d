package estargz

import (
	"slices"
	"strings"
	"syscall"
	"unicode/utf8"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/layer"
)

// Names of files that tell how much to fetch ahead; they are no files of the
// image.
const (
	prefetchLandmark   = ".prefetch.landmark"
	noPrefetchLandmark = ".no.prefetch.landmark"
)

// builder makes a Layer.
type builder struct {
	name     string
	lim      index.Limits
	stored   Stored
	out      *Layer
	entries  int
	landmark bool  // was there
	file     *file // the last entry, if it is a regular file
	files    []file
	pieces   []piece
	known    map[chunk.Digest]uint32 // positions in out.Chunks
}

func (b *builder) errorf(kind error, format string, args ...any) error {
	return index.Errorf(kind, b.name, -1, format, args...)
}

// add takes in an entry.
func (b *builder) add(e *entry) error {
	if e.Type == "chunk" {
		return b.chunk(e)
	}
	if err := b.closeFile(); err != nil {
		return err
	}
	for _, s := range []string{e.Name, e.LinkName} {
		// JSON has no other way to tell, and its writers put the character
		// in for what is not UTF-8.
		if strings.ContainsRune(s, utf8.RuneError) {
			return b.errorf(index.ErrUnsupported, "%q: the table of contents has not kept a name that is not UTF-8", cut(s))
		}
	}
	path, problem := layer.CleanPath(e.Name)
	if problem != "" {
		return b.errorf(index.ErrCorrupt, "%s in %q", problem, cut(e.Name))
	}
	typ, ok := types[e.Type]
	if !ok {
		return b.errorf(index.ErrUnsupported, "%q is of type %q, which is unknown", cut(path), cut(e.Type))
	}
	c, err := b.change(path, typ, e)
	if err != nil {
		return err
	}
	if typ == syscall.S_IFREG {
		var ino *index.Inode // none: nobody reads the content of a landmark or whiteout
		if c != nil {
			ino = c.Inode
		}
		if err := b.regular(path, ino, e); err != nil {
			return err
		}
	}
	if c != nil {
		b.out.Changes = append(b.out.Changes, *c)
	}
	return nil
}

// types are the types of entries but chunks; 0 makes no inode.
var types = map[string]uint32{
	"dir": syscall.S_IFDIR, "reg": syscall.S_IFREG, "symlink": syscall.S_IFLNK, "hardlink": 0,
	"char": syscall.S_IFCHR, "block": syscall.S_IFBLK, "fifo": syscall.S_IFIFO,
}

// change makes the change an entry stands for, or nil if it is for nobody's
// tree.
func (b *builder) change(path string, typ uint32, e *entry) (*index.Change, error) {
	if typ == syscall.S_IFREG {
		switch path {
		case prefetchLandmark:
			b.prefetch()
			return nil, nil
		case noPrefetchLandmark, tableName:
			return nil, nil
		}
	}
	c, none, problem := layer.Whiteout(path)
	if problem != "" {
		return nil, b.errorf(index.ErrCorrupt, "%q is %s", cut(path), problem)
	}
	if none {
		return nil, nil
	}
	if c.Op != index.Add {
		return &c, nil
	}
	if typ == 0 {
		c.Op = index.Link
		if c.Target, problem = layer.CleanPath(e.LinkName); problem != "" || c.Target == "" {
			return nil, b.errorf(index.ErrCorrupt, "hard link %q to %q", cut(path), cut(e.LinkName))
		}
		return &c, nil
	}
	var err error
	c.Inode, err = b.inode(path, typ, e)
	return &c, err
}

// prefetch notes what stands before the landmark.
func (b *builder) prefetch() {
	if b.landmark {
		return
	}
	b.landmark = true
	for _, c := range b.out.Changes {
		if c.Op == index.Add && c.Inode.IsRegular() && c.Inode.Size > 0 {
			b.out.Prefetch = append(b.out.Prefetch, c.Path)
		}
	}
	b.out.Prefetch = slices.Clip(b.out.Prefetch)
}

// cut makes a string short enough for an error.
func cut(s string) string {
	if len(s) > 128 {
		return s[:128] + "..."
	}
	return s
}
