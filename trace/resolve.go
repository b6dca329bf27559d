package trace

import (
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/erofs"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/link"
)

// Touch is the first read of a block (chunk.Block) of a linked image.
type Touch struct {
	Flat int64         `json:"flat"` // its flat address, a multiple of chunk.Block
	At   time.Duration `json:"at"`   // since the image was opened
	Wait time.Duration `json:"wait"` // of the reader, for the read that brought it
}

// Resolve makes the trace of one run of what a mount of a linked image has
// recorded: it finds the chunks, and the files that have them. It reads all
// metadata of the image.
func Resolve(l *link.Image, manifest string, run Run, touches []Touch) (*Trace, error) {
	im, err := erofs.Open(l.Meta(), l.MetaSize, l.Dir)
	if err != nil {
		return nil, err
	}
	w := walker{nodes: im.Nodes(), linked: l, wanted: map[int64]*owners{}, seen: map[uint64]bool{}}
	t := &Trace{Manifest: manifest, Runs: []Run{run}}
	for _, x := range touches {
		n := l.Find(x.Flat)
		if n == l.Chunks() {
			continue
		}
		c := l.Chunk(n)
		if x.Flat < c.Flat {
			continue // the padding in front of a segment
		}
		t.Blocks = append(t.Blocks, Block{
			Chunk: c.Digest, Size: c.Size, Index: int((x.Flat - c.Flat) / chunk.Block),
			At: x.At, Wait: x.Wait, Runs: 1, By: 1, Offset: x.Flat, // until the file is known
		})
		w.wanted[c.Flat] = &owners{}
	}
	if err := w.dir(w.nodes.Root(), "", 0); err != nil {
		return nil, err
	}
	read := map[string]bool{} // for nothing else has what was read of them
	for _, o := range w.wanted {
		if len(o.paths) == 1 {
			read[o.paths[0].path] = true
		}
	}
	for i := range t.Blocks {
		b := &t.Blocks[i]
		c := l.Chunk(l.Find(b.Offset))
		o := w.wanted[c.Flat]
		if len(o.paths) == 0 { // a chunk that no file has, as far as the metadata say
			return nil, index.Errorf(index.ErrCorrupt, l.Dir, -1, "chunk %s at flat address %d is in no file", c.Digest, c.Flat)
		}
		at := max(0, slices.IndexFunc(o.paths, func(p owner) bool { return read[p.path] }))
		b.Path, b.Offset, b.Others = o.paths[at].path, o.paths[at].offset+int64(b.Index)*chunk.Block, len(o.paths)-1+o.more
		for k, p := range o.paths {
			if k != at && len(b.Also) < maxAlso {
				b.Also = append(b.Also, p.path)
			}
		}
	}
	return t, nil
}

// owners are the files that have a chunk, by name.
type owners struct {
	paths []owner // the first maxOwners
	more  int
}

type owner struct {
	path   string
	offset int64 // of the chunk in the file
}

// maxOwners is how many files with the same chunk are told apart.
const maxOwners = 64

// walker looks for the files that have chunks.
type walker struct {
	nodes  *erofs.Nodes
	linked *link.Image
	wanted map[int64]*owners // by flat address of a chunk
	seen   map[uint64]bool   // files with several names
}

// maxDepth is how deep paths of 4096 bytes can go.
const maxDepth = 2048

func (w *walker) dir(nid uint64, at string, depth int) error {
	if depth > maxDepth {
		return index.Errorf(index.ErrCorrupt, w.linked.Dir, -1, "directory %.100q... is too deep", at)
	}
	var names []erofs.Name
	err := w.nodes.List(nid, 0, func(n erofs.Name) bool {
		if n.Name != "." && n.Name != ".." {
			names = append(names, n)
		}
		return true
	})
	if err != nil {
		return err
	}
	slices.SortFunc(names, func(a, b erofs.Name) int {
		if a.Name < b.Name {
			return -1
		}
		return 1
	})
	for _, n := range names {
		st, err := w.nodes.Stat(n.NID)
		if err != nil {
			return err
		}
		name := path.Join(at, n.Name)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			err = w.dir(n.NID, name, depth+1)
		case unix.S_IFREG:
			err = w.file(st, told(name))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// told is a name as a trace can have it: it need not be UTF-8, nor short.
func told(name string) string {
	name = strings.ToValidUTF8(name, "\uFFFD")
	if len(name) <= maxPath {
		return name
	}
	return "…" + strings.ToValidUTF8(name[len(name)-maxPath+len("…"):], "")
}

func (w *walker) file(st erofs.Node, name string) error {
	if st.Size == 0 || w.seen[st.NID] {
		return nil
	}
	if st.Nlink > 1 {
		w.seen[st.NID] = true
	}
	pieces, err := w.nodes.Map(st.NID, 0, st.Size)
	if err != nil {
		return err
	}
	var off int64
	for _, p := range pieces {
		if p.Flat >= 0 {
			w.claim(name, off, p.Flat, p.Flat+p.Length)
		}
		off += p.Length
	}
	return nil
}

// claim notes that a file has the flat addresses [from, to) at an offset.
func (w *walker) claim(name string, off, from, to int64) {
	for n := w.linked.Find(from); n < w.linked.Chunks(); n++ {
		c := w.linked.Chunk(n)
		if c.Flat >= to {
			return
		}
		o := w.wanted[c.Flat]
		switch {
		case o == nil:
		case len(o.paths) > 0 && o.paths[len(o.paths)-1].path == name: // again in this file
		case len(o.paths) < maxOwners:
			o.paths = append(o.paths, owner{name, off + c.Flat - from})
		default:
			o.more++ // a file that has it twice counts twice here
		}
	}
}
