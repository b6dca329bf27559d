package rafs

import (
	"maps"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// filler makes a copy of a tree in which no file has holes. The kernel takes
// holes in a RAFS image, but Nydus looks every chunk up in its tables and
// finds none there; so every hole refers to one shared chunk of zeros.
type filler struct {
	b     *bootstrap
	zeros uint32           // the chunk of zeros
	tails map[int64]uint32 // by size: a part of zeros that ends a file
	done  map[*index.Inode]*index.Inode
	slots int64 // chunks of all files that were filled
}

// maxSlots bounds what holes become: 2^26 chunks have an index of 512 MiB.
const maxSlots = 1 << 26

func newFiller(b *bootstrap, path string) (*filler, error) {
	want := zeroDigest(b.o.Digester, b.o.ChunkSize)
	for i := range b.tree.Chunks {
		if c := &b.tree.Chunks[i]; c.Size == b.o.ChunkSize && c.Digest == want {
			return &filler{b: b, zeros: uint32(i), tails: map[int64]uint32{}, done: map[*index.Inode]*index.Inode{}}, nil
		}
	}
	return nil, index.Errorf(index.ErrUnsupported, path, -1, "the file has a hole and the image no chunk of %d zeros to stand for it", b.o.ChunkSize)
}

func zeroDigest(a chunk.Algorithm, size uint32) chunk.Digest { return chunk.Sum(a, make([]byte, size)) }

// fill replaces the tree by its copy.
func (f *filler) fill() (err error) {
	t := *f.b.tree
	t.Chunks = t.Chunks[:len(t.Chunks):len(t.Chunks)] // tail appends to a copy
	f.b.tree = &t
	t.Root, err = f.inode("", t.Root)
	return err
}

// inode returns the copy of ino, the same for each of its names.
func (f *filler) inode(path string, ino *index.Inode) (*index.Inode, error) {
	if c, ok := f.done[ino]; ok {
		return c, nil
	}
	c := new(index.Inode)
	*c = *ino
	f.done[ino] = c
	switch {
	case ino.IsDir():
		c.Children = maps.Clone(ino.Children)
		for _, name := range ino.Names() { // in order: tails are numbered
			child, err := f.inode(path+"/"+name, ino.Children[name])
			if err != nil {
				return nil, err
			}
			c.Children[name] = child
		}
	case ino.IsRegular():
		step := int64(f.b.o.ChunkSize)
		slots := ino.Size/step + min(ino.Size%step, 1)
		if f.slots += slots; f.slots > maxSlots || slots > maxSlots {
			return nil, index.Errorf(index.ErrLimit, path, -1, "files with holes have more than %d chunks of %d bytes", maxSlots, step)
		}
		c.Extents = f.extents(ino, slots)
	}
	return c, nil
}

// extents returns those of ino with zeros between them. checkFile has seen
// that they lie at multiples of the chunk size.
func (f *filler) extents(ino *index.Inode, slots int64) []index.Extent {
	step := int64(f.b.o.ChunkSize)
	out := make([]index.Extent, 0, slots)
	next := int64(0)
	zeros := func(end int64) {
		for ; next < end; next += step {
			out = append(out, index.Extent{Off: next, Chunk: f.tail(min(step, ino.Size-next))})
		}
	}
	for _, e := range ino.Extents {
		zeros(e.Off)
		out = append(out, e)
		next = e.Off + step
	}
	zeros(ino.Size)
	return out
}

// tail returns a chunk of size zeros: the chunk of zeros, or one that has its
// place but ends early, so that it fits the end of a file.
func (f *filler) tail(size int64) uint32 {
	if size == int64(f.b.o.ChunkSize) {
		return f.zeros
	}
	n, ok := f.tails[size]
	if !ok {
		t := f.b.tree
		n = uint32(len(t.Chunks))
		c := t.Chunks[f.zeros]
		c.Size = uint32(size)
		t.Chunks = append(t.Chunks, c)
		f.b.refs = append(f.b.refs, f.b.refs[f.zeros])
		f.tails[size] = n
	}
	return n
}
