package erofs

import (
	"fmt"
	"io"
	"math"
	"slices"
	"strings"

	"github.com/shale-image/shale/index"
)

// Layout is a planned image: it says where everything lies, and WriteTo writes
// it. It refers to the tree, which must not change meanwhile. Its methods must
// not be called concurrently.
type Layout struct {
	list
	opt     Options
	devices []Device
	mask    uint16 // of device numbers, as the kernel applies it
	meta    int64  // where nids count from, bytes
	data    int64  // where whole blocks of directories start, bytes
	end     int64  // of the image, bytes
	chunked bool   // there is a chunk index

	nids map[*index.Inode]uint32 // positions in nodes; made by NID
}

// NewLayout plans the image of a tree. What EROFS cannot say is an error that
// wraps index.ErrUnsupported or index.ErrLimit, and what is wrong with the tree
// or with addresses one that wraps index.ErrCorrupt; both name the path. The
// image depends on the tree and the options alone.
func NewLayout(t *index.Tree, o Options) (*Layout, error) {
	n, err := List(t)
	if err != nil {
		return nil, err
	}
	return n.Layout(o)
}

// Names are the names and inodes of a tree in the order in which an image has them.
type Names struct{ list }

type list struct {
	tree    *index.Tree
	nodes   []node // in the order of their inodes in the image, the root first
	dirents []dirent
}

// List is the part of NewLayout that needs no addresses, half of its work.
func List(t *index.Tree) (*Names, error) {
	n := &Names{list{tree: t}}
	return n, n.collect()
}

// Layout is the rest of it. It is called once.
func (n *Names) Layout(o Options) (*Layout, error) {
	l := &Layout{list: n.list, opt: o, devices: slices.Clone(o.Devices)}
	if err := l.checkOptions(); err != nil {
		return nil, fmt.Errorf("erofs layout: %w", err)
	}
	l.mask = deviceMask(len(l.devices))
	if err := l.place(); err != nil {
		return nil, err
	}
	if l.end/BlockSize >= nullBlock {
		return nil, fmt.Errorf("erofs layout: %w: metadata takes %d blocks", index.ErrLimit, l.end/BlockSize)
	}
	if err := l.mapDevices(); err != nil {
		return nil, fmt.Errorf("erofs layout: %w", err)
	}
	return l, nil
}

func (l *Layout) checkOptions() error {
	o := &l.opt
	if len(o.Devices) > maxDevices {
		return fmt.Errorf("%w: %d devices, more than %d", index.ErrLimit, len(o.Devices), maxDevices)
	}
	for i, d := range o.Devices {
		if len(d.Tag) > maxTag || strings.IndexByte(d.Tag, 0) >= 0 {
			return fmt.Errorf("%w: tag %q of device %d: want up to %d bytes and no NUL", index.ErrUnsupported, d.Tag, i+1, maxTag)
		}
	}
	if o.ChunkBits != 0 && (o.ChunkBits < BlockBits || o.ChunkBits > maxChunkBits) {
		return fmt.Errorf("%w: chunk bits are %d, want %d to %d", index.ErrUnsupported, o.ChunkBits, BlockBits, maxChunkBits)
	}
	if o.BuildTime.Nsec >= 1e9 {
		return fmt.Errorf("%w: build time has %d ns", index.ErrCorrupt, o.BuildTime.Nsec)
	}
	return checkExt(o.Ext)
}

func checkExt(ext []byte) error {
	if len(ext) > MaxExt {
		return fmt.Errorf("%w: extension has %d bytes, more than %d", index.ErrUnsupported, len(ext), MaxExt)
	}
	return nil
}

// mapDevices gives each device its place in the flat address space.
func (l *Layout) mapDevices() error {
	if l.opt.KeepMapped {
		return nil
	}
	align, next := uint64(max(l.opt.FlatAlign, 1)), uint64(l.Blocks())
	if l.opt.Flat {
		for _, d := range l.devices {
			next = max(next, uint64(d.Blocks)+1)
		}
	}
	for i := range l.devices {
		next = roundUp(next, align)
		if next+uint64(l.devices[i].Blocks) > math.MaxUint32 {
			return fmt.Errorf("%w: device %d ends at flat block %d, beyond 2^32-1", index.ErrLimit, i+1, next+uint64(l.devices[i].Blocks))
		}
		l.devices[i].Mapped = uint32(next)
		next += uint64(l.devices[i].Blocks)
	}
	return nil
}

// Blocks returns the size of the metadata in blocks, which is what WriteTo
// writes.
func (l *Layout) Blocks() uint32 { return uint32(l.end / BlockSize) }

// NID returns the number under which the image has an inode of the tree, or
// false if it has not.
func (l *Layout) NID(ino *index.Inode) (uint64, bool) {
	if l.nids == nil {
		l.nids = make(map[*index.Inode]uint32, len(l.nodes))
		for i := range l.nodes {
			l.nids[l.nodes[i].ino] = uint32(i)
		}
	}
	i, ok := l.nids[ino]
	if !ok {
		return 0, false
	}
	return l.nid(i), true
}

// Devices returns the device table with Mapped set. The caller may keep it.
func (l *Layout) Devices() []Device { return slices.Clone(l.devices) }

// SetExt replaces Options.Ext; ext is kept. More than MaxExt bytes make WriteTo
// fail.
func (l *Layout) SetExt(ext []byte) { l.opt.Ext = ext }

// WriteTo writes the image from its first byte to its last and returns how
// many bytes were written. Its memory does not depend on the size of the
// tree. It may be called again, and writes the same again.
func (l *Layout) WriteTo(w io.Writer) (int64, error) {
	if err := checkExt(l.opt.Ext); err != nil {
		return 0, fmt.Errorf("erofs layout: %w", err)
	}
	e := &emitter{w: w, buf: make([]byte, 0, emitSize+16<<10), sum: l.opt.Checksum}
	err := l.emit(e)
	return e.flushed, err
}
