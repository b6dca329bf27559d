package erofs

import (
	"encoding/binary"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/index"
)

// rawInode is an inode as the image has it, checked for what concerns the
// inode alone.
type rawInode struct {
	nid      uint64
	pos      int64 // of the inode, bytes
	xattrPos int64 // of its attributes
	xattrEnd int64 // of its attributes, and where what belongs to its layout follows
	size     int64
	union    uint32
	layout   uint8
	noDot    bool // a directory without "."
	mode     uint32
	uid, gid uint32
	mtime    index.Time
}

func (rd *reader) inode(nid uint64) (rawInode, error) {
	v, le := rd.v, binary.LittleEndian
	meta := int64(rd.im.super.MetaBlkaddr) * BlockSize
	if nid > uint64(v.size)/inodeSlot {
		return rawInode{}, v.errorf(index.ErrCorrupt, -1, "inode %d lies beyond the image's %d bytes", nid, v.size)
	}
	in := rawInode{nid: nid, pos: meta + int64(nid)*inodeSlot}
	b, err := v.read(in.pos, compactSize)
	if err != nil {
		return in, err
	}
	format := le.Uint16(b)
	in.layout = uint8(format >> 1 & 7)
	if format&^formatMask != 0 || in.layout > layoutMax {
		return in, v.errorf(index.ErrUnsupported, in.pos, "inode format is %#x", format)
	}
	icount := le.Uint16(b[2:])
	in.mode = uint32(le.Uint16(b[4:]))
	in.noDot = format&formatBit4 != 0 && in.mode&unix.S_IFMT == unix.S_IFDIR
	if format&formatExtended == 0 {
		in.xattrPos = in.pos + compactSize
		in.size = int64(le.Uint32(b[8:]))
		epoch := rd.im.super.BuildTime
		in.mtime = index.Time{Sec: epoch.Sec + int64(le.Uint32(b[12:])), Nsec: epoch.Nsec}
		in.union = le.Uint32(b[16:])
		in.uid, in.gid = uint32(le.Uint16(b[24:])), uint32(le.Uint16(b[26:]))
	} else {
		if b, err = v.read(in.pos, extendedSize); err != nil {
			return in, err
		}
		in.xattrPos = in.pos + extendedSize
		in.size = int64(le.Uint64(b[8:]))
		in.union = le.Uint32(b[16:])
		in.uid, in.gid = le.Uint32(b[24:]), le.Uint32(b[28:])
		in.mtime = index.Time{Sec: int64(le.Uint64(b[32:])), Nsec: le.Uint32(b[40:])}
	}
	in.xattrEnd = in.xattrPos
	if icount > 0 {
		in.xattrEnd += xattrHeader + int64(icount-1)*xattrUnit
	}
	switch {
	case fileType(in.mode) == 0:
		return in, v.errorf(index.ErrCorrupt, in.pos+4, "mode is %#o", in.mode)
	case in.size < 0:
		return in, v.errorf(index.ErrCorrupt, in.pos+8, "size is %d", in.size)
	case in.mtime.Nsec >= 1e9:
		return in, v.errorf(index.ErrCorrupt, in.pos+40, "time has %d ns", in.mtime.Nsec)
	}
	return in, nil
}

// flat returns where block i of the content of a directory or symbolic link
// lies, and how many bytes of it are there.
func (rd *reader) flat(in *rawInode, i int64) (pos int64, n int, err error) {
	left := in.size - i*BlockSize
	pos, n = (int64(in.union)+i)*BlockSize, int(min(left, BlockSize))
	switch in.layout {
	case layoutPlain:
	case layoutInline:
		if left > BlockSize {
			break
		}
		pos = in.xattrEnd
		if pos%BlockSize+left > BlockSize {
			return 0, 0, rd.v.errorf(index.ErrCorrupt, pos, "%d inline bytes cross a block", left)
		}
	default:
		return 0, 0, rd.v.errorf(index.ErrUnsupported, in.pos, "directory or symbolic link with data layout %d", in.layout)
	}
	return pos, n, nil
}

// target returns the target of a symbolic link.
func (rd *reader) target(in *rawInode) (string, error) {
	if in.size == 0 || in.size > maxTarget {
		return "", rd.v.errorf(index.ErrCorrupt, in.pos+8, "link target has %d bytes, want 1 to %d", in.size, maxTarget)
	}
	if err := rd.take(in.pos, int(in.size)); err != nil {
		return "", err
	}
	pos, n, err := rd.flat(in, 0)
	if err != nil {
		return "", err
	}
	b, err := rd.v.read(pos, n)
	if err != nil {
		return "", err
	}
	for _, c := range b {
		if c == 0 {
			return "", rd.v.errorf(index.ErrCorrupt, pos, "link target contains NUL")
		}
	}
	return string(b), nil
}

// rdev returns the device number of a device inode in unix.Mkdev form.
func (in *rawInode) rdev() uint64 {
	if !isDevice(in.mode) {
		return 0
	}
	return unix.Mkdev(in.union>>8&0xfff, in.union&0xff|in.union>>12&0xfff00)
}
