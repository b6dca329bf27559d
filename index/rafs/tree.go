package rafs

import (
	"crypto/sha256"
	"fmt"
	"slices"
	"sort"

	"github.com/shale-image/shale/erofs"
	"github.com/shale-image/shale/index"
)

// Tree reads the inodes and returns the whole index. Chunks are those of the
// chunk table, in its order, and Blobs those of the blob table; a blob that
// the image knows only by a placeholder has no Digest (BlobInfo.Digest). Behind them
// is one of windows, with its Data, if chunks lie in gzip layers.
//
// Where a file has a whole chunk of zeros, by its digest, the tree has a hole.
// Each call makes a new tree. What does not fit lim is refused while it is read as far
// as memory is concerned; the rest is for index.Tree.CheckLimits.
func (im *Image) Tree(lim index.Limits) (*index.Tree, error) {
	lim = lim.WithDefaults()
	x := extents{im: im}
	if len(im.chunks) > 0 {
		x.zeros = zeroDigest(im.digester, im.ext.chunkSize).Sum
	}
	t, err := im.fs.Tree(erofs.Limits{Entries: lim.Entries, MetadataBytes: lim.MetadataBytes}, x.file)
	if err != nil {
		return nil, err
	}
	t.Chunks = append([]index.Chunk(nil), im.chunks...)
	t.Blobs = make([]index.Blob, len(im.blobs))
	for i := range im.blobs {
		t.Blobs[i].Digest = im.blobs[i].Digest()
		t.Blobs[i].Spans = im.spans[i]
		if t.Blobs[i].Digest != "" {
			t.Blobs[i].Size = im.blobs[i].Size
		}
	}
	im.addWindows(t)
	return t, nil
}

// addWindows makes one blob of the windows of all gzip layers.
func (im *Image) addWindows(t *index.Tree) {
	var all []byte
	for i := range im.blobs {
		if len(im.blobs[i].windows) == 0 {
			continue
		}
		b := &t.Blobs[i]
		b.Spans = slices.Clone(b.Spans)
		for k := range b.Spans {
			b.Spans[k].Window.Offset += int64(len(all))
			b.Spans[k].Window.Blob = uint32(len(im.blobs))
		}
		all = append(all, im.blobs[i].windows...)
	}
	if len(all) > 0 {
		t.Blobs = append(t.Blobs, index.Blob{Digest: fmt.Sprintf("sha256:%x", sha256.Sum256(all)), Size: int64(len(all)), Data: all})
	}
}

// extents turns runs of addresses into chunks.
type extents struct {
	im    *Image
	zeros [32]byte
	next  int            // in places: behind the last one found
	arena []index.Extent // many files' extents in one allocation
}

// find returns the chunk at a block of a blob. Files mostly have chunks that
// follow each other.
func (x *extents) find(blob, block uint32) (place, bool) {
	places, key := x.im.places, placeKey(blob, block)
	if x.next >= len(places) || places[x.next].key != key {
		x.next = sort.Search(len(places), func(i int) bool { return places[i].key >= key })
		if x.next == len(places) || places[x.next].key != key {
			return place{}, false
		}
	}
	x.next++
	return places[x.next-1], true
}

// file returns the extents of one file. A run is a chunk, or, as nydus-image
// has it where a file's chunks follow each other in the address space, all of
// them: then only the index of the first is told.
func (x *extents) file(path string, size int64, runs []erofs.Run) ([]index.Extent, error) {
	if len(runs) == 0 {
		return nil, nil
	}
	step := int64(x.im.ext.chunkSize)
	corrupt := func(off int64, format string, args ...any) error {
		return index.Errorf(index.ErrCorrupt, x.im.name+": "+path, off, format, args...)
	}
	first := len(x.arena)
	for i := range runs {
		r := &runs[i]
		if r.Off%step != 0 || r.Device == 0 || int(r.Device) > len(x.im.blobs) {
			return nil, corrupt(r.Off, "run at device %d, want a multiple of %d bytes and one of %d devices", r.Device, step, len(x.im.blobs))
		}
		end := min(r.Off+r.Length, size)
		for off := r.Off; off < end; off += step {
			block := int64(r.Block) + (off-r.Off)/blockSize
			at, ok := x.find(uint32(r.Device-1), uint32(block))
			if !ok || block > 0xffffffff {
				return nil, corrupt(off, "no chunk at block %d of blob %d", block, r.Device-1)
			}
			if off == r.Off && at.index != r.Index {
				return nil, corrupt(off, "chunk %d at block %d of blob %d, want chunk %d", at.index, block, r.Device-1, r.Index)
			}
			c := &x.im.chunks[at.chunk]
			if int64(c.Size) == step && c.Digest.Sum == x.zeros {
				continue // a hole, also where it is longer than the file
			}
			if int64(c.Size) != min(step, size-off) {
				return nil, corrupt(off, "chunk of %d bytes, want %d", c.Size, min(step, size-off))
			}
			x.add(index.Extent{Off: off, Chunk: at.chunk}, &first)
		}
	}
	if first == len(x.arena) {
		return nil, nil
	}
	return x.arena[first:len(x.arena):len(x.arena)], nil
}

// add appends to the arena; a full one is left to the files that are in it, and
// what the current file has so far, from first on, moves to another.
func (x *extents) add(e index.Extent, first *int) {
	if len(x.arena) == cap(x.arena) {
		done := x.arena[*first:]
		x.arena = append(make([]index.Extent, 0, max(4096, 2*len(done))), done...)
		*first = 0
	}
	x.arena = append(x.arena, e)
}
