package artifact

import (
	"encoding/binary"
	"slices"
	"strings"
	"syscall"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// encoder is one Encode.
type encoder struct {
	t   *index.Tree
	sec [sections][]byte

	chunks  []index.Chunk // those used, in the order of the index
	numbers []uint32      // of t.Chunks: position in chunks, counted from 1; 0: not used
	cursors []uint32      // of the blobs: the chunk behind the last run

	inodes  map[*index.Inode]uint64
	names   uint64
	linked  uint64 // names up to the last link
	xattrs  map[string]uint64
	classes map[class]uint64
	times   map[index.Time]uint64
	last    index.Time
}

func (e *encoder) uint(id int, v ...uint64) {
	for _, v := range v {
		e.sec[id] = binary.AppendUvarint(e.sec[id], v)
	}
}

func (e *encoder) int(id int, v int64) { e.uint(id, uint64(v)<<1^uint64(v>>63)) }

func (e *encoder) text(id int, s string) {
	e.sec[id] = append(append(e.sec[id], s...), 0)
}

func (e *encoder) encode(info Info) error {
	e.inodes, e.xattrs = map[*index.Inode]uint64{}, map[string]uint64{}
	e.classes, e.times = map[class]uint64{}, map[index.Time]uint64{}
	if err := e.t.CheckSpans(); err != nil {
		return err
	}
	if err := e.collect(); err != nil {
		return err
	}
	for _, digest := range append([]string{info.Manifest}, info.DiffIDs...) {
		if err := e.digest(secImage, digest); err != nil {
			return err
		}
	}
	if err := e.blobs(); err != nil {
		return err
	}
	e.spans()
	e.places()
	return e.inode("", e.t.Root)
}

func (e *encoder) digest(id int, s string) error {
	sum, err := parseDigest(s)
	e.sec[id] = append(e.sec[id], sum[:]...)
	return err
}

// version is the first that can say what the index does.
func (e *encoder) version() uint32 {
	for i := range e.t.Blobs {
		for k := range e.t.Blobs[i].Spans {
			if e.t.Blobs[i].Spans[k].Codec == chunk.ZstdBlocks {
				return 2
			}
		}
	}
	return 1
}

// content returns what is compressed: the sections, in parts.
func (e *encoder) content() (parts [][]byte) {
	var small []byte
	for id, s := range e.sec {
		if len(s) == 0 {
			continue
		}
		p := binary.AppendUvarint(nil, uint64(id))
		p = binary.AppendUvarint(p, uint64(len(s)))
		if p = append(p, s...); len(s) < frameSize {
			small = append(small, p...)
			continue
		}
		if len(small) > 0 {
			parts = append(parts, small)
		}
		parts, small = append(parts, p), nil
	}
	if len(small) > 0 {
		parts = append(parts, small)
	}
	return parts
}

// inode adds an inode, and what is below it.
func (e *encoder) inode(path string, ino *index.Inode) error {
	e.inodes[ino] = uint64(len(e.inodes))
	e.uint(secClass, e.class(ino))
	e.uint(secTime, e.time(ino.Mtime))
	switch ino.Type() {
	case syscall.S_IFREG:
		return e.data(path, ino)
	case syscall.S_IFLNK:
		if strings.IndexByte(ino.Target, 0) >= 0 {
			return index.Errorf(index.ErrCorrupt, path, -1, "a link target with a NUL")
		}
		e.text(secTargets, ino.Target)
	case syscall.S_IFCHR, syscall.S_IFBLK:
		e.uint(secDevices, ino.Rdev)
	case syscall.S_IFDIR:
		if len(path) > maxPath && len(ino.Children) > 0 { // how deep we go
			return index.Errorf(index.ErrCorrupt, path[:64], -1, "a directory with a path of %d bytes, want at most %d", len(path), maxPath)
		}
		return e.directory(path, ino)
	}
	return nil
}

func (e *encoder) directory(path string, dir *index.Inode) error {
	e.uint(secChildren, uint64(len(dir.Children)))
	for _, name := range dir.Names() {
		if strings.IndexByte(name, 0) >= 0 {
			return index.Errorf(index.ErrCorrupt, path, -1, "name %q with a NUL", name)
		}
		ino := dir.Children[name]
		e.text(secNames, name)
		e.names++
		number, linked := e.inodes[ino]
		if !linked {
			if err := e.inode(path+"/"+name, ino); err != nil {
				return err
			}
			continue
		}
		if ino.IsDir() {
			return index.Errorf(index.ErrCorrupt, path+"/"+name, -1, "a further name of a directory")
		}
		e.uint(secLinks, e.names-1-e.linked, number)
		e.linked = e.names
	}
	return nil
}

func (e *encoder) class(ino *index.Inode) uint64 {
	c := class{mode: ino.Mode, uid: ino.UID, gid: ino.GID}
	if len(ino.Xattrs) > 0 {
		set := slices.Clone(ino.Xattrs)
		slices.SortStableFunc(set, func(a, b index.Xattr) int { return strings.Compare(a.Name, b.Name) })
		p := binary.AppendUvarint(nil, uint64(len(set)))
		for _, x := range set {
			p = append(binary.AppendUvarint(p, uint64(len(x.Name))), x.Name...)
			p = append(binary.AppendUvarint(p, uint64(len(x.Value))), x.Value...)
		}
		n, ok := e.xattrs[string(p)]
		if !ok {
			n = uint64(len(e.xattrs)) + 1
			e.xattrs[string(p)] = n
			e.sec[secXattrs] = append(e.sec[secXattrs], p...)
		}
		c.xattrs = uint32(n)
	}
	n, ok := e.classes[c]
	if !ok {
		n = uint64(len(e.classes))
		e.classes[c] = n
		e.uint(secClasses, uint64(c.mode), uint64(c.uid), uint64(c.gid), uint64(c.xattrs))
	}
	return n
}

func (e *encoder) time(t index.Time) uint64 {
	n, ok := e.times[t]
	if !ok {
		n = uint64(len(e.times))
		e.times[t] = n
		e.int(secTimes, t.Sec-e.last.Sec)
		e.uint(secTimes, uint64(t.Nsec))
		e.last = t
	}
	return n
}
