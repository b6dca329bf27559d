package link

import (
	"github.com/shale-image/shale/erofs"
	"github.com/shale-image/shale/index"
)

// Tree reads the metadata back: the image's files, with the records of the map as Chunks,
// in that order. Where the index had several copies of a chunk it has one.
func (im *Image) Tree() (*index.Tree, error) {
	fs, err := erofs.Open(im.meta, im.MetaSize, im.meta.Name())
	if err != nil {
		return nil, err
	}
	t, err := fs.Tree(erofs.Limits{}, im.extents)
	if err != nil {
		return nil, err
	}
	layout := im.Layout()
	t.Chunks, t.Blobs = layout.Chunks, layout.Blobs
	for i, first := range im.First {
		t.Blobs[i].First = first
	}
	return t, nil
}

// extents finds the chunks of a file. Pieces that follow each other in the file and in
// the flat address space belong together: one chunk may take several.
func (im *Image) extents(path string, size int64, runs []erofs.Run) (out []index.Extent, err error) {
	flat := func(r erofs.Run) int64 { return im.Segments[r.Device-1].Flat + int64(r.Block)*erofs.BlockSize }
	for len(runs) > 0 {
		off, at, end, n := runs[0].Off, flat(runs[0]), flat(runs[0])+runs[0].Length, 1
		for n < len(runs) && runs[n].Off-off == end-at && flat(runs[n]) == end {
			end += runs[n].Length
			n++
		}
		runs = runs[n:]
		for i := im.Find(at); at < end; i++ {
			if i == im.Chunks() {
				return nil, index.Errorf(index.ErrCorrupt, im.meta.Name(), -1, "%s: no chunk at flat address %d", path, at)
			}
			c := im.Chunk(i)
			if c.Flat != at {
				return nil, index.Errorf(index.ErrCorrupt, im.meta.Name(), -1, "%s: chunk at flat address %d, want %d", path, c.Flat, at)
			}
			out = append(out, index.Extent{Off: off, Chunk: uint32(i)})
			step := (int64(c.Size) + erofs.BlockSize - 1) &^ (erofs.BlockSize - 1)
			if next := i + 1; at+step < end && next < im.Chunks() { // what is between belongs to nobody
				step = im.Chunk(next).Flat - at
			}
			at, off = at+step, off+step
		}
	}
	return out, nil
}
