package inspect

import (
	"context"
	"maps"
	"path"
	"slices"
	"strings"
	"syscall"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// Change is a name that two images do not have alike.
type Change struct {
	Path string   `json:"path"`           // absolute
	Kind string   `json:"kind"`           // "added", "removed" or "changed"
	What []string `json:"what,omitempty"` // of changed: see Diff
}

// Difference is how a second image differs from a first one.
type Difference struct {
	From    string   `json:"from"`
	To      string   `json:"to"`
	Changes []Change `json:"changes"` // in byte order of paths
	Stat    Stat     `json:"stat"`
}

// Stat counts changes, and what the images share. Sizes are bytes.
type Stat struct {
	Added   int `json:"added"`
	Removed int `json:"removed"`
	Changed int `json:"changed"`

	FromBytes    int64 `json:"from_bytes"`    // of different chunks that files have, decoded
	ToBytes      int64 `json:"to_bytes"`      // likewise
	SharedBytes  int64 `json:"shared_bytes"`  // of these, in chunks that both have
	ToStored     int64 `json:"to_stored"`     // of ToBytes, as stored
	SharedStored int64 `json:"shared_stored"` // of SharedBytes, as the second image stores them
}

// Diff compares two images by what a container would see. A changed name may
// have changed in "type", or else in "content", "target" (of a link), "device",
// "mode", "owner", "mtime", "xattrs", "links" (to which other names it is a
// hard link), in this order.
//
// Contents are compared by the digests of chunks; data is read only of files
// that are cut or digested differently in the two images.
func Diff(ctx context.Context, from, to *Image) (*Difference, error) {
	d := &differ{ctx: ctx, from: from, to: to, out: &Difference{From: from.Name, To: to.Name, Changes: []Change{}},
		firstFrom: firstNames(from.Tree), firstTo: firstNames(to.Tree), same: map[[2]*index.Inode]bool{}}
	if err := d.inode("", from.Tree.Root, to.Tree.Root); err != nil {
		return nil, err
	}
	slices.SortFunc(d.out.Changes, func(a, b Change) int { return strings.Compare(a.Path, b.Path) })
	s := &d.out.Stat
	for _, c := range d.out.Changes {
		switch c.Kind {
		case "added":
			s.Added++
		case "removed":
			s.Removed++
		default:
			s.Changed++
		}
	}
	s.share(from.Tree, to.Tree)
	return d.out, nil
}

type differ struct {
	ctx                context.Context
	from, to           *Image
	out                *Difference
	firstFrom, firstTo map[*index.Inode]string  // of files with several names
	same               map[[2]*index.Inode]bool // contents compared already
}

// firstNames returns the first name of each file that has several.
func firstNames(t *index.Tree) map[*index.Inode]string {
	first, several := map[*index.Inode]string{}, map[*index.Inode]string{}
	t.Walk(func(path string, ino *index.Inode) error {
		if ino.IsDir() {
			return nil
		}
		if name, ok := first[ino]; ok {
			several[ino] = name
		} else {
			first[ino] = path
		}
		return nil
	})
	return several
}

func (d *differ) add(at, kind string, what ...string) {
	d.out.Changes = append(d.out.Changes, Change{"/" + at, kind, what})
}

// all reports a name and everything below it.
func (d *differ) all(at, kind string, ino *index.Inode) {
	(&index.Tree{Root: ino}).Walk(func(p string, _ *index.Inode) error {
		d.add(path.Join(at, p), kind)
		return nil
	})
}

func (d *differ) inode(at string, a, b *index.Inode) error {
	if err := d.ctx.Err(); err != nil {
		return err
	}
	what, err := d.what(at, a, b)
	if err != nil {
		return err
	}
	if len(what) > 0 {
		d.add(at, "changed", what...)
	}
	names := slices.Sorted(maps.Keys(a.Children))
	for name := range b.Children {
		if a.Children[name] == nil {
			names = append(names, name)
		}
	}
	for _, name := range names {
		x, y, p := a.Children[name], b.Children[name], path.Join(at, name)
		switch {
		case y == nil:
			d.all(p, "removed", x)
		case x == nil:
			d.all(p, "added", y)
		default:
			if err := d.inode(p, x, y); err != nil {
				return err
			}
		}
	}
	return nil
}

// what tells in which ways two files under one name differ.
func (d *differ) what(at string, a, b *index.Inode) (what []string, err error) {
	if a.Type() != b.Type() {
		return []string{"type"}, nil
	}
	note := func(differs bool, name string) {
		if differs {
			what = append(what, name)
		}
	}
	if a.IsRegular() {
		key := [2]*index.Inode{a, b}
		same, ok := d.same[key]
		if !ok {
			if same, err = d.sameContent(at, a, b); err != nil {
				return nil, err
			}
			d.same[key] = same
		}
		note(!same, "content")
	}
	device := a.Type() == syscall.S_IFCHR || a.Type() == syscall.S_IFBLK
	note(a.Target != b.Target, "target")
	note(device && a.Rdev != b.Rdev, "device")
	note(a.Mode != b.Mode, "mode")
	note(a.UID != b.UID || a.GID != b.GID, "owner")
	note(a.Mtime != b.Mtime, "mtime")
	note(!slices.Equal(sortedXattrs(a), sortedXattrs(b)), "xattrs")
	note(d.link(d.firstFrom, a, at) != d.link(d.firstTo, b, at), "links")
	return what, nil
}

// link returns the first name of a file that is called at.
func (d *differ) link(first map[*index.Inode]string, ino *index.Inode, at string) string {
	if name, ok := first[ino]; ok {
		return name
	}
	return at
}

func sortedXattrs(ino *index.Inode) []index.Xattr {
	x := slices.Clone(ino.Xattrs)
	slices.SortFunc(x, func(a, b index.Xattr) int { return strings.Compare(a.Name, b.Name) })
	return x
}

// share adds up the chunks that files have in one image and in both.
func (s *Stat) share(from, to *index.Tree) {
	have := distinct(from)
	for _, c := range have {
		s.FromBytes += int64(c.Size)
	}
	for digest, c := range distinct(to) {
		s.ToBytes += int64(c.Size)
		stored := to.StoredShare(c)
		s.ToStored += stored
		if _, ok := have[digest]; ok {
			s.SharedBytes += int64(c.Size)
			s.SharedStored += stored
		}
	}
}

// distinct returns the chunks that files have, each once.
func distinct(t *index.Tree) map[chunk.Digest]*index.Chunk {
	m := map[chunk.Digest]*index.Chunk{}
	t.Walk(func(_ string, ino *index.Inode) error {
		for _, e := range ino.Extents {
			c := &t.Chunks[e.Chunk]
			m[c.Digest] = c
		}
		return nil
	})
	return m
}
