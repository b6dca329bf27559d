package erofs

import (
	"encoding/binary"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/index"
)

// Nodes reads an image file by file, each by its inode number (nid), as a file
// system does; nothing of the image is kept but the last few windows that were
// read. It is safe for concurrent use if the ReaderAt is. What is wrong with
// the image is an error as in Image.Tree; limits hold for each call.
type Nodes struct {
	im      *Image
	readers sync.Pool // of *reader
}

// Node is an inode without what it contains.
type Node struct {
	NID      uint64
	Mode     uint32 // st_mode
	Nlink    uint32
	UID, GID uint32
	Size     int64 // bytes; of a directory or symbolic link too
	Mtime    index.Time
	Rdev     uint64 // devices: as in unix.Mkdev
}

// Name is a name in a directory.
type Name struct {
	Name string // "." and ".." are names like others
	NID  uint64
	Type uint32 // the S_IFMT bits; 0 if the directory does not tell
	Next int64  // where to go on behind it, for List
}

// Piece is a part of a regular file.
type Piece struct {
	Length int64 // bytes, at least 1
	Flat   int64 // byte address in the flat address space; -1: a hole, which reads as zeros
}

// Nodes returns a reader of the image's files.
func (im *Image) Nodes() *Nodes {
	n := &Nodes{im: im}
	n.readers.New = func() any {
		return &reader{im: im, v: &view{r: im.r, size: im.size, name: im.name}, names: map[string]string{}}
	}
	return n
}

// Root returns the nid of the root directory.
func (n *Nodes) Root() uint64 { return n.im.super.RootNID }

// open returns a reader of the caller's own, and the inode.
func (n *Nodes) open(nid uint64) (rd *reader, in rawInode, done func(), err error) {
	rd = n.readers.Get().(*reader)
	rd.limits = Limits{}.withDefaults()
	in, err = rd.inode(nid)
	return rd, in, func() { n.readers.Put(rd) }, err
}

// Stat reads an inode.
func (n *Nodes) Stat(nid uint64) (Node, error) {
	rd, in, done, err := n.open(nid)
	defer done()
	if err != nil {
		return Node{}, err
	}
	nlink, err := rd.nlink(&in)
	return Node{
		NID: nid, Mode: in.mode, Nlink: nlink, UID: in.uid, GID: in.gid,
		Size: in.size, Mtime: in.mtime, Rdev: in.rdev(),
	}, err
}

func (rd *reader) nlink(in *rawInode) (uint32, error) {
	b, err := rd.v.read(in.pos, compactSize)
	if err != nil {
		return 0, err
	}
	le := binary.LittleEndian
	format := le.Uint16(b)
	switch {
	case format&formatExtended != 0:
		if b, err = rd.v.read(in.pos, extendedSize); err != nil {
			return 0, err
		}
		return le.Uint32(b[44:]), nil
	case format&formatBit4 != 0 && !in.noDot:
		return 1, nil
	}
	return uint32(le.Uint16(b[6:])), nil
}

// Readlink returns the target of a symbolic link.
func (n *Nodes) Readlink(nid uint64) (string, error) {
	rd, in, done, err := n.open(nid)
	defer done()
	if err != nil {
		return "", err
	}
	if in.mode&unix.S_IFMT != unix.S_IFLNK {
		return "", rd.v.errorf(index.ErrCorrupt, in.pos, "mode is %#o, want a symbolic link", in.mode)
	}
	return rd.target(&in)
}

// Xattrs returns the extended attributes in order of their names.
func (n *Nodes) Xattrs(nid uint64) ([]index.Xattr, error) {
	rd, in, done, err := n.open(nid)
	defer done()
	if err != nil {
		return nil, err
	}
	return rd.xattrs(&in)
}

// directory is open for a directory.
func (n *Nodes) directory(nid uint64) (*reader, rawInode, func(), error) {
	rd, in, done, err := n.open(nid)
	if err == nil && in.mode&unix.S_IFMT != unix.S_IFDIR {
		err = rd.v.errorf(index.ErrCorrupt, in.pos, "mode is %#o, want a directory", in.mode)
	}
	return rd, in, done, err
}

// block reads block i of a directory and tells how many names are in it. The
// bytes are valid until the next read.
func (rd *reader) block(in *rawInode, i int64) (b []byte, pos int64, names int, err error) {
	pos, size, err := rd.flat(in, i)
	if err != nil {
		return nil, 0, 0, err
	}
	if b, err = rd.v.read(pos, size); err != nil {
		return nil, 0, 0, err
	}
	if _, _, err = rd.dirent(b, 0, pos); err != nil {
		return nil, 0, 0, err
	}
	return b, pos, int(binary.LittleEndian.Uint16(b[8:])) / direntSize, nil
}

// Lookup returns the nid that a name has in a directory, or an error that wraps
// index.ErrNotExist.
func (n *Nodes) Lookup(dir uint64, name string) (uint64, error) {
	rd, in, done, err := n.directory(dir)
	defer done()
	if err != nil {
		return 0, err
	}
	// Names are in order: the last block whose first name is not behind name
	// has it, or none.
	lo, hi := int64(0), fileBlocks(in.size)
	for hi-lo > 1 {
		mid := lo + (hi-lo)/2
		b, pos, _, err := rd.block(&in, mid)
		if err != nil {
			return 0, err
		}
		if e, _, err := rd.dirent(b, 0, pos); err != nil {
			return 0, err
		} else if e.name <= name {
			lo = mid
		} else {
			hi = mid
		}
	}
	if hi > lo {
		b, pos, count, err := rd.block(&in, lo)
		if err != nil {
			return 0, err
		}
		for first := 0; first < count; {
			mid := first + (count-first)/2
			e, _, err := rd.dirent(b, mid, pos)
			switch {
			case err != nil:
				return 0, err
			case e.name == name:
				return e.nid, nil
			case e.name < name:
				first = mid + 1
			default:
				count = mid
			}
		}
	}
	return 0, fmt.Errorf("%q: %w", name, index.ErrNotExist)
}

// List calls fn for the names in a directory from a place on, 0 or a Name.Next,
// until it returns false. fn may call other methods.
func (n *Nodes) List(dir uint64, from int64, fn func(Name) bool) error {
	rd, in, done, err := n.directory(dir)
	defer done()
	if err != nil {
		return err
	}
	if from < 0 {
		return rd.v.errorf(index.ErrCorrupt, in.pos, "there is no place %d in a directory", from)
	}
	for i := from / BlockSize; i < fileBlocks(in.size); i++ {
		b, pos, count, err := rd.block(&in, i)
		if err != nil {
			return err
		}
		for k := int(from % BlockSize / direntSize); k < count; k++ {
			e, _, err := rd.dirent(b, k, pos)
			if err != nil {
				return err
			}
			next := i*BlockSize + int64(k+1)*direntSize
			if k+1 == count {
				next = (i + 1) * BlockSize
			}
			if !fn(Name{Name: e.name, NID: e.nid, Type: typeMode(e.kind), Next: next}) {
				return nil
			}
		}
		from = 0
	}
	return nil
}

// typeMode is the inverse of fileType.
func typeMode(kind uint8) uint32 {
	if kind > 7 {
		return 0
	}
	return [8]uint32{0, unix.S_IFREG, unix.S_IFDIR, unix.S_IFCHR, unix.S_IFBLK, unix.S_IFIFO, unix.S_IFSOCK, unix.S_IFLNK}[kind]
}

// Map tells where n bytes of a regular file at off are. The pieces are in order
// and end where the file ends at the latest.
func (n *Nodes) Map(nid uint64, off, length int64) ([]Piece, error) {
	rd, in, done, err := n.open(nid)
	defer done()
	if err != nil {
		return nil, err
	}
	v := rd.v
	if in.mode&unix.S_IFMT != unix.S_IFREG {
		return nil, v.errorf(index.ErrCorrupt, in.pos, "mode is %#o, want a regular file", in.mode)
	}
	if off < 0 || length <= 0 || off >= in.size {
		return nil, nil
	}
	end := off + min(length, in.size-off)
	switch {
	case in.layout == layoutPlain && in.union == nullBlock:
		return []Piece{{end - off, -1}}, nil
	case in.layout != layoutChunked:
		return nil, v.errorf(index.ErrUnsupported, in.pos, "file with data layout %d, want %d (chunk index)", in.layout, layoutChunked)
	}
	format := in.union & 0xffff
	if format&chunkIndexes == 0 || format&^chunkFormatMask != 0 {
		return nil, v.errorf(index.ErrUnsupported, in.pos+16, "chunk format %#x", format)
	}
	bits := BlockBits + format&chunkBitsMask
	table := roundUp(in.xattrEnd, chunkEntry)
	le, mask := binary.LittleEndian, deviceMask(len(n.im.devices))
	var pieces []Piece
	for off < end {
		i := off >> bits
		next := (i + 1) << bits
		if next < 0 || next > end { // next is 2^63 at most, which wraps
			next = end
		}
		p := Piece{Length: next - off, Flat: -1}
		at := table + i*chunkEntry
		b, err := v.read(at, chunkEntry)
		if err != nil {
			return nil, err
		}
		if block := le.Uint32(b[4:]); block != nullBlock {
			dev, block := n.im.locate(le.Uint16(b[2:])&mask, block)
			if dev == 0 || int(dev) > len(n.im.devices) {
				return nil, v.errorf(index.ErrCorrupt, at, "data at file offset %d lies in device %d of %d", off, dev, len(n.im.devices))
			}
			d := n.im.devices[dev-1]
			in := int64(block)<<BlockBits + off&(1<<bits-1)
			if in+p.Length > int64(d.Blocks)<<BlockBits {
				return nil, v.errorf(index.ErrCorrupt, at, "data at file offset %d ends behind device %d", off, dev)
			}
			p.Flat = int64(d.Mapped)<<BlockBits + in
		}
		off += p.Length
		if k := len(pieces) - 1; k >= 0 && pieces[k].follows(p) {
			pieces[k].Length += p.Length
			continue
		}
		pieces = append(pieces, p)
	}
	return pieces, nil
}

// follows tells whether q continues p.
func (p Piece) follows(q Piece) bool {
	if p.Flat < 0 || q.Flat < 0 {
		return p.Flat == q.Flat
	}
	return p.Flat+p.Length == q.Flat
}
