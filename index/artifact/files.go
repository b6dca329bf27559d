package artifact

import (
	"slices"
	"strings"
	"syscall"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// link is a further name of an inode.
type link struct {
	name  int // counted from 0
	inode uint64
}

// inodes makes them one after the other.
type inodes struct {
	d                     *decoder
	all                   []index.Inode
	made                  int
	class, time, children *column
	shapes, starts, runs  *column
	devices               *column
	targets               texts
}

// open directory, in which the next names are.
type directory struct {
	ino  *index.Inode
	left uint64 // names still to come
	last string // name
	path int    // bytes, a slash for each name
}

// files reads the tree: names in the order of index.Tree.Walk.
func (d *decoder) files() {
	names := d.countNames()
	links := d.links(names)
	count := 1 + names - len(links)
	if n := min(len(d.sec[secClass].p), len(d.sec[secTime].p)); count < 1 || count > n {
		d.sec[secNames].fail(index.ErrCorrupt, "%d inodes, classes and times of %d", count, n)
	}
	if !d.sec[secNames].take(int64(count)*inodeBytes) || !d.sec[secNames].take(int64(len(d.sec[secNames].p)+len(d.sec[secTargets].p))) {
		return
	}
	in := &inodes{
		d: d, all: make([]index.Inode, count),
		class: &d.sec[secClass], time: &d.sec[secTime], children: &d.sec[secChildren],
		shapes: &d.sec[secFiles], starts: &d.sec[secStarts], runs: &d.sec[secRuns],
		devices: &d.sec[secDevices], targets: d.sec[secTargets].texts(),
	}
	text := d.sec[secNames].texts()
	left := uint64(names) // in no directory yet
	var stack []directory
	enter := func(ino *index.Inode, path int) {
		n := in.children.upTo(left, "names")
		if n == 0 {
			return
		}
		if path > maxPath {
			text.fail(index.ErrCorrupt, "a directory with a path of %d bytes, want at most %d", path, maxPath)
		}
		if left -= n; !in.children.take(mapBytes + int64(n)*nameBytes) {
			return
		}
		ino.Children = make(map[string]*index.Inode, n)
		stack = append(stack, directory{ino: ino, left: n, path: path})
	}
	d.tree.Root = in.next()
	if d.err == nil && !d.tree.Root.IsDir() {
		in.class.fail(index.ErrCorrupt, "the root is no directory")
	}
	enter(d.tree.Root, 0)
	for n := 0; n < names && d.err == nil; n++ {
		for len(stack) > 0 && stack[len(stack)-1].left == 0 {
			stack = stack[:len(stack)-1]
		}
		if len(stack) == 0 {
			text.fail(index.ErrCorrupt, "%d names are in no directory", names-n)
			return
		}
		dir := &stack[len(stack)-1]
		name := text.next()
		checkName(&text.column, name, dir.last)
		dir.last = name
		dir.left--
		if len(links) > 0 && links[0].name == n {
			ino := &in.all[min(links[0].inode, uint64(count-1))]
			if links[0].inode >= uint64(in.made) || ino.IsDir() {
				text.fail(index.ErrCorrupt, "%q links to inode %d, no file before it", name, links[0].inode)
			}
			dir.ino.Children[name] = ino
			links = links[1:]
			continue
		}
		ino := in.next()
		dir.ino.Children[name] = ino
		if ino.IsDir() {
			enter(ino, dir.path+len(name)+1)
		}
	}
	if left > 0 {
		in.children.fail(index.ErrCorrupt, "%d names too few", left)
	}
	text.end()
	in.targets.end()
	for _, c := range []*column{in.class, in.time, in.children, in.shapes, in.starts, in.runs, in.devices} {
		c.end()
	}
}

// checkName refuses what no directory can have behind the name last.
func checkName(c *column, name, last string) {
	switch {
	case name == "" || name == "." || name == ".." || len(name) > maxName || strings.IndexByte(name, '/') >= 0:
		c.fail(index.ErrCorrupt, "name %q of %d bytes, want 1 to %d without a slash", name[:min(len(name), maxName)], len(name), maxName)
	case name <= last:
		c.fail(index.ErrCorrupt, "name %q behind %q", name, last)
	}
}

func (d *decoder) links(names int) (links []link) {
	c := &d.sec[secLinks]
	for next := uint64(0); c.left() > 0 && d.err == nil; next++ {
		next += c.upTo(uint64(names), "names before a link")
		if next >= uint64(names) {
			c.fail(index.ErrCorrupt, "name %d is a link, there are %d", next, names)
		}
		if c.take(linkBytes) {
			links = append(links, link{int(next), c.uint()})
		}
	}
	return links
}

// next makes an inode, without children.
func (in *inodes) next() *index.Inode {
	d := in.d
	if in.made == len(in.all) {
		in.class.fail(index.ErrCorrupt, "more than %d inodes", len(in.all))
		return &index.Inode{}
	}
	ino := &in.all[in.made]
	in.made++
	k, t := in.class.uint(), in.time.uint()
	if k >= uint64(len(d.classes)) || t >= uint64(len(d.times)) {
		in.class.fail(index.ErrCorrupt, "class %d of %d, time %d of %d", k, len(d.classes), t, len(d.times))
		return ino
	}
	c := &d.classes[k]
	ino.Mode, ino.UID, ino.GID, ino.Mtime = c.mode, c.uid, c.gid, d.times[t]
	if c.xattrs > 0 {
		ino.Xattrs = d.xattrs[c.xattrs-1]
	}
	switch ino.Type() {
	case syscall.S_IFREG:
		in.data(ino)
	case syscall.S_IFLNK:
		if ino.Target = in.targets.next(); ino.Target == "" || len(ino.Target) > maxTarget {
			in.targets.fail(index.ErrCorrupt, "a link target of %d bytes, want 1 to %d", len(ino.Target), maxTarget)
		}
	case syscall.S_IFCHR, syscall.S_IFBLK:
		ino.Rdev = in.devices.uint()
	}
	return ino
}

// data reads size and extents of a regular file: nothing, chunks in a row that
// are the whole file, or a size and runs of chunks.
func (in *inodes) data(ino *index.Inode) {
	d := in.d
	switch v := in.shapes.uint(); v {
	case 0:
	case 1:
		size := in.runs.uint()
		if size > uint64(d.lim.FileSize) {
			in.runs.fail(index.ErrLimit, "a file of %d bytes, want at most %d (FileSize)", size, d.lim.FileSize)
		}
		count := in.runs.upTo(uint64(in.starts.left()), "runs")
		ino.Size = int64(size)
		end := int64(0)
		for ; count > 0 && d.err == nil; count-- {
			hole := in.runs.upTo(uint64(ino.Size-end), "hole")
			end = in.run(ino, end+int64(hole), in.runs.uint())
			if end > ino.Size {
				in.runs.fail(index.ErrCorrupt, "content up to %d in a file of %d bytes", end, ino.Size)
			}
		}
	default:
		ino.Size = in.run(ino, 0, v-1)
	}
}

// run adds n chunks in a row at an offset of a file, and returns where they end.
func (in *inodes) run(ino *index.Inode, off int64, n uint64) (end int64) {
	d := in.d
	blob := in.starts.uint()
	if blob >= uint64(len(d.cursors)) {
		in.starts.fail(index.ErrCorrupt, "blob %d of %d", blob, len(d.cursors))
		return 0
	}
	first := int64(d.cursors[blob]) + in.starts.int()
	chunks := d.tree.Chunks
	if n == 0 || first < 0 || first > int64(len(chunks)) || n > uint64(len(chunks))-uint64(first) {
		in.starts.fail(index.ErrCorrupt, "%d chunks from %d on, there are %d", n, first, len(chunks))
		return 0
	}
	if !in.starts.take(int64(n) * extentBytes) {
		return 0
	}
	d.cursors[blob] = uint32(first) + uint32(n)
	list := in.room(ino.Extents, int(n))
	for i := first; i < first+int64(n); i++ {
		if off%alignment != 0 {
			in.starts.fail(index.ErrCorrupt, "content at %d of a file, want a multiple of %d", off, alignment)
		}
		list = append(list, index.Extent{Off: off, Chunk: uint32(i)})
		if off += int64(chunks[i].Size); off > d.lim.FileSize {
			in.starts.fail(index.ErrLimit, "a file of %d bytes, want at most %d (FileSize)", off, d.lim.FileSize)
			return 0
		}
	}
	ino.Extents = list
	return off
}

// room returns what a file has so far with room for n more extents.
func (in *inodes) room(have []index.Extent, n int) []index.Extent {
	if len(have) > 0 { // few files have several runs
		return slices.Grow(have, n)
	}
	d := in.d
	if n > cap(d.arena)-len(d.arena) {
		d.arena = make([]index.Extent, 0, max(n, int(chunk.Block/extentBytes)))
	}
	at := len(d.arena)
	d.arena = d.arena[:at+n]
	return d.arena[at : at : at+n]
}
