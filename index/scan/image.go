package scan

import (
	"cmp"
	"crypto/sha256"
	"fmt"
	"io"
	"slices"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// Image makes the tree of an image of its layers, lowest first; blobs are what
// they are in the registry. The image's side is written to w; it is the last
// blob of the tree, unless it is empty. The same layers give the same bytes.
//
// A Layer may also come from elsewhere, such as a table of contents: one that was
// not scanned has nothing in the side. If two say that one content has different
// sizes, that is index.ErrCorrupt.
func Image(layers []*Layer, blobs []index.Blob, w io.Writer) (*index.Tree, error) {
	t := index.NewTree()
	sum := sha256.New()
	out := &counted{w: io.MultiWriter(w, sum)}
	known := map[chunk.Digest]uint32{}
	beside := index.Blob{}
	number := uint32(len(layers)) // of the side
	for i, l := range layers {
		own := l.side
		if own == nil {
			own = &side{}
		}
		b := index.Blob{Digest: blobs[i].Digest, Size: blobs[i].Size, Spans: l.Spans}
		windows, err := own.windows.copy(out)
		if err != nil {
			return nil, err
		}
		for k := range b.Spans {
			if s := &b.Spans[k]; s.Window.Length > 0 {
				s.Window.Blob, s.Window.Offset = number, s.Window.Offset+windows
			}
		}
		odd, err := own.odd.copy(out)
		if err != nil {
			return nil, err
		}
		base := beside.StreamSize()
		for _, s := range own.spans {
			s.Offset += odd
			beside.Append(s)
		}
		t.Blobs = append(t.Blobs, b)
		numbers := make([]uint32, len(l.Chunks))
		for k, c := range l.Chunks {
			n, ok := known[c.Digest]
			switch {
			case !ok:
				n = uint32(len(t.Chunks))
				known[c.Digest] = n
				if c.Blob == 0 {
					c.Blob = uint32(i)
				} else {
					c.Blob, c.Offset = number, c.Offset+base
				}
				t.Chunks = append(t.Chunks, c)
			case t.Chunks[n].Size != c.Size && c.Digest != (chunk.Digest{}): // zeros have none
				return nil, index.Errorf(index.ErrCorrupt, "layer "+b.Digest, -1, "content %s has %d bytes, elsewhere %d", c.Digest, c.Size, t.Chunks[n].Size)
			}
			numbers[k] = n
		}
		for _, ch := range l.Changes {
			if ch.Inode == nil {
				continue
			}
			for k := range ch.Inode.Extents {
				e := &ch.Inode.Extents[k]
				e.Chunk = numbers[e.Chunk]
			}
		}
		if err := t.Apply(l.Changes); err != nil {
			return nil, fmt.Errorf("layer %s: %w", b.Digest, err)
		}
		l.Changes, l.Chunks = nil, nil
	}
	if out.n > 0 {
		beside.Digest, beside.Size = fmt.Sprintf("sha256:%x", sum.Sum(nil)), out.n
		t.Blobs = append(t.Blobs, beside)
	}
	drop(t)
	return t, nil
}

// counted counts what is written.
type counted struct {
	w io.Writer
	n int64
}

func (c *counted) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

// copy copies a part, if there is one, and returns where it begins.
func (s *part) copy(w *counted) (at int64, err error) {
	at = w.n
	if s == nil {
		return at, nil
	}
	_, err = io.Copy(w, io.NewSectionReader(s.file, 0, s.size))
	return at, err
}

// drop takes chunks away that no file has, and numbers the others by place.
func drop(t *index.Tree) {
	used := make([]bool, len(t.Chunks))
	files := map[*index.Inode]bool{}
	t.Walk(func(_ string, ino *index.Inode) error {
		if len(ino.Extents) > 0 && !files[ino] {
			files[ino] = true
			for _, e := range ino.Extents {
				used[e.Chunk] = true
			}
		}
		return nil
	})
	var order []uint32
	for n, ok := range used {
		if ok {
			order = append(order, uint32(n))
		}
	}
	slices.SortFunc(order, func(x, y uint32) int {
		a, b := &t.Chunks[x], &t.Chunks[y]
		return cmp.Or(cmp.Compare(a.Blob, b.Blob), cmp.Compare(a.Offset, b.Offset))
	})
	numbers := make([]uint32, len(t.Chunks))
	chunks := make([]index.Chunk, len(order))
	for i, n := range order {
		chunks[i], numbers[n] = t.Chunks[n], uint32(i)
	}
	t.Chunks = chunks
	for ino := range files {
		for k := range ino.Extents {
			ino.Extents[k].Chunk = numbers[ino.Extents[k].Chunk]
		}
	}
}
