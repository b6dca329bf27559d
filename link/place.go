package link

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/erofs"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/pool"
)

// place is the address a chunk has on this node.
type place struct {
	used    bool
	segment uint32
	off     int64
}

// placement is where everything that the files of a tree consist of lies.
type placement struct {
	places   []place         // by chunk of the tree
	segments []*pool.Segment // that places are in, by ID
	created  *pool.Segment   // the one among them that is new, or nil
	files    []*index.Inode  // that have more than one chunk
}

// allocate finds a place for every chunk that a file of the tree uses. New
// places are given in the order of blob and offset: what lies side by side in
// a blob lies side by side here, so that a sequential read of addresses is one
// ranged request.
func allocate(t *index.Tree, p *pool.Pool) (*placement, error) {
	pl := &placement{places: make([]place, len(t.Chunks))}
	if len(t.Blobs) > maxBlobs {
		return nil, fmt.Errorf("link: %w: %d blobs, more than %d", index.ErrLimit, len(t.Blobs), maxBlobs)
	}
	spans := 0
	for i := range t.Blobs {
		spans += len(t.Blobs[i].Spans)
	}
	if spans > index.MaxImageSpans {
		return nil, fmt.Errorf("link: %w: %d spans, more than %d", index.ErrLimit, spans, index.MaxImageSpans)
	}
	if err := t.CheckSpans(); err != nil {
		return nil, fmt.Errorf("link: %w", err)
	}
	if err := pl.findUsed("", t.Root); err != nil {
		return nil, err
	}
	var (
		used     = make([]uint32, 0, len(t.Chunks))
		wanted   = make([]pool.Entry, 0, len(t.Chunks))
		segments = map[uint32]*pool.Segment{}
		fresh    = make([]uint32, 0, len(t.Chunks))             // chunks without a place
		first    = make(map[chunk.Digest]uint32, len(t.Chunks)) // of equal chunks, the first fresh one
		equal    [][2]uint32                                    // fresh chunk, and an earlier one equal to it
	)
	for i := range t.Chunks {
		if !pl.places[i].used {
			continue
		}
		c := &t.Chunks[i]
		if err := t.CheckChunk(c); err != nil {
			return nil, fmt.Errorf("link: %w", err)
		}
		used = append(used, uint32(i))
		wanted = append(wanted, pool.Entry{Digest: c.Digest, Size: c.Size})
	}
	for k, s := range p.Lookup(wanted) {
		i := used[k]
		if s != nil {
			pl.put(i, s.ID, wanted[k].Off)
			segments[s.ID] = s
			continue
		}
		c := &t.Chunks[i]
		if j, ok := first[c.Digest]; ok {
			if t.Chunks[j].Size != c.Size {
				return nil, fmt.Errorf("link: %w: chunk %s has sizes %d and %d in one index", index.ErrCorrupt, c.Digest, t.Chunks[j].Size, c.Size)
			}
			equal = append(equal, [2]uint32{i, j})
			continue
		}
		first[c.Digest] = i
		fresh = append(fresh, i)
	}
	slices.SortFunc(fresh, func(x, y uint32) int {
		a, b := &t.Chunks[x], &t.Chunks[y]
		return cmp.Or(cmp.Compare(a.Blob, b.Blob), cmp.Compare(a.Offset, b.Offset), cmp.Compare(x, y))
	})
	if len(fresh) > 0 {
		entries := make([]pool.Entry, len(fresh))
		for i, x := range fresh {
			entries[i] = pool.Entry{Digest: t.Chunks[x].Digest, Size: t.Chunks[x].Size}
		}
		s, err := p.Create(entries)
		if err != nil {
			return nil, fmt.Errorf("link: %w", err)
		}
		pl.created = s
		segments[s.ID] = s
		for i, x := range fresh {
			pl.put(x, s.ID, entries[i].Off)
		}
	}
	for _, e := range equal {
		at := pl.places[e[1]]
		pl.put(e[0], at.segment, at.off)
	}
	for _, s := range segments {
		pl.segments = append(pl.segments, s)
	}
	slices.SortFunc(pl.segments, func(a, b *pool.Segment) int { return cmp.Compare(a.ID, b.ID) })
	return pl, nil
}

func (pl *placement) put(c uint32, segment uint32, off int64) {
	pl.places[c].segment, pl.places[c].off = segment, off
}

// findUsed marks the chunks that a file uses, or all files below a directory, and collects
// these files.
func (pl *placement) findUsed(name string, ino *index.Inode) error {
	for _, e := range ino.Extents {
		if int64(e.Chunk) >= int64(len(pl.places)) {
			return index.Errorf(index.ErrCorrupt, name, e.Off, "chunk %d of %d", e.Chunk, len(pl.places))
		}
		pl.places[e.Chunk].used = true
	}
	if len(ino.Extents) > 1 {
		pl.files = append(pl.files, ino)
	}
	for name, child := range ino.Children { // in any order
		if err := pl.findUsed(name, child); err != nil {
			return err
		}
	}
	return nil
}

// meets tells whether a file has a chunk that ends at an offset in its segment at which
// in another segment the file's next chunk begins. The kernel takes these two for one,
// and reads on in the first segment, if segments are block devices: it compares sectors
// alone (fs/iomap/buffered-io.c, seen on Linux 6.18).
func (pl *placement) meets(t *index.Tree) bool {
	for _, f := range pl.files {
		for i, e := range f.Extents[1:] {
			before := f.Extents[i].Chunk
			a, b := pl.places[before], pl.places[e.Chunk]
			end := a.off + (int64(t.Chunks[before].Size)+erofs.BlockSize-1)&^(erofs.BlockSize-1)
			if a.segment != b.segment && end == b.off {
				return true
			}
		}
	}
	return false
}
