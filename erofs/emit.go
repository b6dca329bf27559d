package erofs

import (
	"encoding/binary"
	"fmt"
	"io"

	"golang.org/x/sys/unix"
)

// emitSize is how much is gathered for one Write. It holds block 0, whose
// checksum is known only when the block is complete.
const emitSize = 128 << 10

// emitter gathers an image front to back.
type emitter struct {
	w       io.Writer
	buf     []byte
	flushed int64
	sum     bool // set the checksum of block 0
}

func (e *emitter) pos() int64 { return e.flushed + int64(len(e.buf)) }

func (e *emitter) u16(v uint16) { e.buf = binary.LittleEndian.AppendUint16(e.buf, v) }
func (e *emitter) u32(v uint32) { e.buf = binary.LittleEndian.AppendUint32(e.buf, v) }
func (e *emitter) u64(v uint64) { e.buf = binary.LittleEndian.AppendUint64(e.buf, v) }

var zeroBlock [BlockSize]byte

// pad writes zeros up to a position.
func (e *emitter) pad(pos int64) {
	for n := pos - e.pos(); n > 0; n = pos - e.pos() {
		e.buf = append(e.buf, zeroBlock[:min(n, BlockSize)]...)
	}
}

// flush writes what was gathered, if that is at least n bytes.
func (e *emitter) flush(n int) error {
	if len(e.buf) < n {
		return nil
	}
	if e.flushed == 0 && e.sum {
		binary.LittleEndian.PutUint32(e.buf[superOff+sbChecksum:], checksum(e.buf))
	}
	k, err := e.w.Write(e.buf)
	e.flushed += int64(k)
	if err == nil && k < len(e.buf) {
		err = io.ErrShortWrite
	}
	e.buf = e.buf[:0]
	return err
}

func (l *Layout) emit(e *emitter) error {
	l.emitSuper(e)
	for i := range l.nodes {
		if err := l.emitNode(e, &l.nodes[i]); err != nil {
			return err
		}
		if err := e.flush(emitSize); err != nil {
			return err
		}
	}
	e.pad(l.data)
	for i := range l.nodes {
		n := &l.nodes[i]
		switch {
		case n.ino.IsDir():
			names := l.dirents[n.first:n.last]
			for left := n.size; left > 0; left -= BlockSize {
				if left < BlockSize && n.layout == layoutInline {
					break
				}
				k, _ := fillBlock(names)
				l.emitNames(e, names[:k])
				names = names[k:]
				e.pad(roundUp(e.pos(), BlockSize))
				if err := e.flush(emitSize); err != nil {
					return err
				}
			}
		case n.ino.Type() == unix.S_IFLNK && n.layout == layoutPlain:
			e.buf = append(e.buf, n.ino.Target...)
			e.pad(roundUp(e.pos(), BlockSize))
			if err := e.flush(emitSize); err != nil {
				return err
			}
		}
	}
	if e.pos() != l.end {
		return fmt.Errorf("erofs layout: %d bytes were written, %d planned: did the tree change?", e.pos(), l.end)
	}
	return e.flush(0)
}

func (l *Layout) emitSuper(e *emitter) {
	o := &l.opt
	e.pad(superOff)
	sb := make([]byte, superSize+MaxExt)
	le := binary.LittleEndian
	compat, incompat := o.Compat, uint32(0)
	if o.Checksum {
		compat |= CompatChecksum
	}
	// RAFS readers want both bits, also when there is no blob.
	if l.chunked || len(l.devices) > 0 || len(o.Ext) > 0 {
		incompat |= incompatChunkedFile
	}
	if len(l.devices) > 0 || len(o.Ext) > 0 {
		incompat |= incompatDeviceTable
	}
	le.PutUint32(sb[sbMagic:], superMagic)
	le.PutUint32(sb[sbCompat:], compat)
	sb[sbBlockBits] = BlockBits
	le.PutUint16(sb[sbRootNID:], uint16(l.nid(0)))
	le.PutUint64(sb[sbInodes:], uint64(len(l.nodes)))
	le.PutUint64(sb[sbEpoch:], uint64(o.BuildTime.Sec))
	le.PutUint32(sb[sbNsec:], o.BuildTime.Nsec)
	le.PutUint32(sb[sbBlocks:], l.Blocks())
	le.PutUint32(sb[sbMetaBlkaddr:], uint32(l.meta/BlockSize))
	copy(sb[sbUUID:], o.UUID[:])
	le.PutUint32(sb[sbIncompat:], incompat)
	le.PutUint16(sb[sbExtraDevices:], uint16(len(l.devices)))
	le.PutUint16(sb[sbDevtSlotOff:], devtSlot)
	copy(sb[superSize:], o.Ext)
	e.buf = append(e.buf, sb...)
	for _, d := range l.devices {
		end := e.pos() + slotSize
		e.buf = append(e.buf, d.Tag...)
		e.pad(end - slotSize + maxTag)
		e.u32(d.Blocks)
		e.u32(d.Mapped)
		e.pad(end)
	}
}

func (l *Layout) nid(node uint32) uint64 { return uint64(l.nodes[node].pos-l.meta) / inodeSlot }

func (l *Layout) emitNode(e *emitter, n *node) error {
	ino := n.ino
	e.pad(n.pos)
	union := uint32(0)
	switch ino.Type() {
	case unix.S_IFREG:
		union = chunkIndexes | uint32(n.chunkBits)
	case unix.S_IFDIR, unix.S_IFLNK:
		union = uint32(l.data/BlockSize + n.block)
	case unix.S_IFCHR, unix.S_IFBLK:
		major, minor := unix.Major(ino.Rdev), unix.Minor(ino.Rdev)
		union = minor&0xff | major<<8 | minor&^0xff<<12
	}
	icount := uint16(0)
	if n.xattr > 0 {
		icount = uint16((n.xattr-xattrHeader)/xattrUnit + 1)
	}
	e.u16(formatExtended | uint16(n.layout)<<1)
	e.u16(icount)
	e.u16(uint16(ino.Mode))
	e.u16(0)
	e.u64(uint64(n.size))
	e.u32(union)
	e.u32(uint32((n.pos - l.meta) / inodeSlot)) // i_ino, only to be unique
	e.u32(ino.UID)
	e.u32(ino.GID)
	e.u64(uint64(ino.Mtime.Sec))
	e.u32(ino.Mtime.Nsec)
	e.u32(n.nlink)
	e.pad(n.pos + extendedSize)
	e.buf = appendXattrs(e.buf, ino.Xattrs)
	switch {
	case ino.IsRegular():
		return l.emitIndex(e, n)
	case ino.IsDir() && n.layout == layoutInline:
		names := l.dirents[n.first:n.last]
		for left := n.size; left > BlockSize; left -= BlockSize {
			k, _ := fillBlock(names)
			names = names[k:]
		}
		l.emitNames(e, names)
	case n.layout == layoutInline:
		e.buf = append(e.buf, ino.Target...)
	}
	return nil
}

// emitNames writes one block of a directory: entries, then names.
func (l *Layout) emitNames(e *emitter, names []dirent) {
	off := direntSize * len(names)
	for _, d := range names {
		e.u64(l.nid(d.node))
		e.u16(uint16(off))
		e.u16(uint16(fileType(l.nodes[d.node].ino.Mode)))
		off += len(d.name)
	}
	for _, d := range names {
		e.buf = append(e.buf, d.name...)
	}
}

// emitIndex writes the chunk index of a regular file.
func (l *Layout) emitIndex(e *emitter, n *node) error {
	e.pad(roundUp(e.pos(), chunkEntry))
	path := func() string { return "erofs layout" } // NewLayout has accepted it
	return l.spans(path, n.ino, func(s span) error {
		for off := int64(0); off < s.n; off += 1 << n.chunkBits {
			switch {
			case s.loc.Device == 0:
				e.u64(nullBlock << 32)
			case l.opt.Flat:
				e.u32(0)
				e.u32(l.devices[s.loc.Device-1].Mapped + s.loc.Block + uint32(off))
			default:
				e.u16(uint16(s.loc.Index))
				e.u16(s.loc.Device | uint16(s.loc.Index>>16<<8))
				e.u32(s.loc.Block + uint32(off))
			}
			if err := e.flush(emitSize); err != nil {
				return err
			}
		}
		return nil
	})
}
