package erofs

import (
	"math/bits"

	"github.com/shale-image/shale/index"
)

// maxEntries bounds the chunk index of one file: 2^24 entries are 128 MiB. It
// is passed by files of more than 64 GiB that are fragmented by the block.
const maxEntries = 1 << 24

// span is a part of a file that is a hole or lies in one device, block by
// block; all in blocks.
type span struct {
	off, n int64
	loc    Location // Device 0: a hole
}

// spans calls fn for the parts that a file consists of, in order and without
// gaps. Extents that continue each other in the device are one span, unless
// they carry chunk indexes. What is wrong with the extents is an error that
// names path(); an error of fn ends the walk and is returned.
func (l *Layout) spans(path func() string, ino *index.Inode, fn func(span) error) error {
	var cur span
	add := func(off, n int64, loc Location) error {
		if cur.n > 0 && loc.Device == cur.loc.Device && loc.Index == 0 && cur.loc.Index == 0 &&
			(loc.Device == 0 || int64(loc.Block) == int64(cur.loc.Block)+cur.n) {
			cur.n += n
			return nil
		}
		done := cur
		cur = span{off, n, loc}
		if done.n > 0 {
			return fn(done)
		}
		return nil
	}
	next := int64(0)
	for _, e := range ino.Extents {
		if int64(e.Chunk) >= int64(len(l.tree.Chunks)) {
			return index.Errorf(index.ErrCorrupt, path(), -1, "chunk %d of %d at file offset %d", e.Chunk, len(l.tree.Chunks), e.Off)
		}
		size := int64(l.tree.Chunks[e.Chunk].Size)
		switch {
		case size == 0:
			return index.Errorf(index.ErrCorrupt, path(), -1, "chunk %d at file offset %d is empty", e.Chunk, e.Off)
		case e.Off < 0 || e.Off > ino.Size-size:
			return index.Errorf(index.ErrCorrupt, path(), -1, "%d bytes at file offset %d of %d", size, e.Off, ino.Size)
		case e.Off%BlockSize != 0:
			return index.Errorf(index.ErrUnsupported, path(), -1, "data at file offset %d does not start a %d-byte block", e.Off, BlockSize)
		}
		off, n := e.Off/BlockSize, (size-1)/BlockSize+1
		if off < next {
			return index.Errorf(index.ErrCorrupt, path(), -1, "data at file offset %d overlaps what lies before", e.Off)
		}
		loc := l.opt.Locate(e.Chunk)
		if err := l.checkLocation(path, e.Chunk, loc, n); err != nil {
			return err
		}
		if l.opt.ChunkBits != 0 && loc.Index != 0 && size > 1<<l.opt.ChunkBits {
			return index.Errorf(index.ErrUnsupported, path(), -1, "chunk %d has %d bytes, more than the fixed %d", e.Chunk, size, int64(1)<<l.opt.ChunkBits)
		}
		if off > next {
			if err := add(next, off-next, Location{}); err != nil {
				return err
			}
		}
		if err := add(off, n, loc); err != nil {
			return err
		}
		next = off + n
	}
	if end := fileBlocks(ino.Size); end > next {
		if err := add(next, end-next, Location{}); err != nil {
			return err
		}
	}
	if cur.n > 0 {
		return fn(cur)
	}
	return nil
}

func fileBlocks(size int64) int64 {
	if size == 0 {
		return 0
	}
	return (size-1)/BlockSize + 1
}

func (l *Layout) checkLocation(path func() string, c uint32, loc Location, n int64) error {
	if loc.Device == 0 || int(loc.Device) > len(l.devices) {
		return index.Errorf(index.ErrCorrupt, path(), -1, "chunk %d is in device %d of %d", c, loc.Device, len(l.devices))
	}
	if end := int64(loc.Block) + n; end > int64(l.devices[loc.Device-1].Blocks) {
		return index.Errorf(index.ErrCorrupt, path(), -1, "chunk %d ends at block %d of device %d, which has %d", c, end, loc.Device, l.devices[loc.Device-1].Blocks)
	}
	if loc.Index > 0 && l.opt.Flat || loc.Index >= 1<<24 || loc.Index >= 1<<16 && l.mask > 0xff {
		return index.Errorf(index.ErrUnsupported, path(), -1, "chunk index %d has no place beside %d devices", loc.Index, len(l.devices))
	}
	return nil
}

// planFile chooses the chunk size of a regular file and returns the bytes of
// its chunk index. Every span has to start at a multiple of the chunk size, so
// the coarsest is the lowest bit that is set in any start. Example: spans at
// blocks 0, 16 and 48 make chunks of 16 blocks, 64 KiB.
func (l *Layout) planFile(n *node, path func() string) (int64, error) {
	ino := n.ino
	if ino.Size < 0 {
		return 0, index.Errorf(index.ErrCorrupt, path(), -1, "size is %d", ino.Size)
	}
	starts := uint64(0)
	err := l.spans(path, ino, func(s span) error {
		starts |= uint64(s.off)
		return nil
	})
	if err != nil {
		return 0, err
	}
	blocks := fileBlocks(ino.Size)
	fits := bits.TrailingZeros64(starts) // 64 for a single span
	switch {
	case l.opt.ChunkBits != 0:
		n.chunkBits = l.opt.ChunkBits - BlockBits
		if fits < int(n.chunkBits) {
			return 0, index.Errorf(index.ErrUnsupported, path(), -1, "addresses change inside a chunk of the fixed %d bytes", int64(1)<<l.opt.ChunkBits)
		}
	case blocks > 0:
		n.chunkBits = uint8(min(fits, bits.Len64(uint64(blocks-1)), chunkBitsMask))
	}
	if blocks == 0 {
		return 0, nil
	}
	entries := (blocks-1)>>n.chunkBits + 1
	if entries > maxEntries {
		return 0, index.Errorf(index.ErrLimit, path(), -1, "%d bytes in pieces of %d need %d chunk index entries, more than %d",
			ino.Size, int64(BlockSize)<<n.chunkBits, entries, maxEntries)
	}
	return entries * chunkEntry, nil
}
