// Package link turns an image's index into something this node can mount: it
// looks every chunk up in the pool, gives the unknown ones a place in a new
// segment, and writes EROFS metadata in which file data are addresses.
//
// A linked image is a directory; it is local, can be rebuilt from the index
// at any time, and is all that fill and the faces need:
//
//	meta    EROFS metadata; its device slots are pool segments
//	map     where the bytes of each address come from (map.go)
//	info    JSON: blobs, segments and their flat addresses
//
// The flat address space of an image is the metadata, followed by each of its
// segments at the slot's mapped_blkaddr. The same metadata mounts with one
// device per segment, or from one flat file. The package knows no registry and
// does no I/O but on these files.
package link

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/erofs"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/pool"
)

const (
	infoVersion   = 1
	maxBlobs      = 1 << 16 // a map record has 16 bits for the blob
	blocksGranule = chunk.Block / erofs.BlockSize
)

// Info is the small part of a linked image.
type Info struct {
	Version  int       `json:"version"`
	Blobs    []Blob    `json:"blobs"`
	MetaSize int64     `json:"meta_size"` // bytes of the file meta, a multiple of 4 KiB
	FlatSize int64     `json:"flat_size"` // bytes of the flat address space
	Segments []Segment `json:"segments"`  // in order of their device slots
}

// Blob is an object that chunks of the image come from.
type Blob struct {
	Digest string `json:"digest"`
	Size   int64  `json:"size"`
}

// Segment is a pool segment and where it stands in the flat address space.
type Segment struct {
	ID   uint32 `json:"id"`
	Flat int64  `json:"flat"` // byte address, a multiple of chunk.Block
	Size int64  `json:"size"`
}

// Link links the tree into dir, which must not exist yet. It appears whole or
// not at all.
func Link(ctx context.Context, t *index.Tree, p *pool.Pool, dir string) (err error) {
	places, segments, err := allocate(t, p)
	if err != nil {
		return err
	}
	slots := make(map[uint32]uint16, len(segments))
	var devices []erofs.Device
	for i, s := range segments {
		slots[s.ID] = uint16(i + 1)
		devices = append(devices, erofs.Device{
			Tag:    fmt.Sprintf("%08x", s.ID),
			Blocks: uint32(s.Size / erofs.BlockSize),
		})
	}
	layout, err := erofs.NewLayout(t, erofs.Options{
		Devices: devices,
		Locate: func(c uint32) erofs.Location {
			pl := places[c]
			return erofs.Location{Device: slots[pl.segment], Block: uint32(pl.off / erofs.BlockSize)}
		},
		Checksum:  true,
		FlatAlign: blocksGranule,
	})
	if err != nil {
		return err
	}
	info := Info{Version: infoVersion, MetaSize: int64(layout.Blocks()) * erofs.BlockSize}
	info.FlatSize = info.MetaSize
	flat := make(map[uint32]int64, len(segments))
	for i, d := range layout.Devices() {
		s := Segment{ID: segments[i].ID, Flat: int64(d.Mapped) * erofs.BlockSize, Size: segments[i].Size}
		info.Segments = append(info.Segments, s)
		info.FlatSize = s.Flat + s.Size
		flat[s.ID] = s.Flat
	}
	for _, b := range t.Blobs {
		info.Blobs = append(info.Blobs, Blob(b))
	}

	if err := ctx.Err(); err != nil {
		return err
	}
	tmp := dir + ".new"
	if err := os.RemoveAll(tmp); err != nil {
		return err
	}
	if err := os.MkdirAll(tmp, 0o700); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.RemoveAll(tmp)
		}
	}()
	js, err := json.MarshalIndent(info, "", "  ")
	if err != nil {
		return err
	}
	if err := writeFile(filepath.Join(tmp, "meta"), func(f *os.File) error {
		_, err := layout.WriteTo(f)
		return err
	}); err != nil {
		return err
	}
	if err := writeFile(filepath.Join(tmp, "map"), func(f *os.File) error {
		_, err := f.Write(encodeMap(t, places, flat))
		return err
	}); err != nil {
		return err
	}
	if err := writeFile(filepath.Join(tmp, "info"), func(f *os.File) error {
		_, err := f.Write(append(js, '\n'))
		return err
	}); err != nil {
		return err
	}
	if err := os.Rename(tmp, dir); err != nil {
		return err
	}
	return syncDir(filepath.Dir(dir))
}

// place is the address a chunk has on this node.
type place struct {
	used    bool
	next    bool // the piece of a file that follows the one before in the file, and here
	segment uint32
	off     int64
}

// allocate finds a place for every chunk that a file of the tree uses. New
// places are given in the order of blob and offset: what lies side by side in
// a blob lies side by side here, so that a sequential read of addresses is one
// ranged request.
func allocate(t *index.Tree, p *pool.Pool) ([]place, []*pool.Segment, error) {
	places := make([]place, len(t.Chunks))
	err := t.Walk(func(path string, ino *index.Inode) error {
		for i, e := range ino.Extents {
			if int64(e.Chunk) >= int64(len(t.Chunks)) {
				return index.Errorf(index.ErrCorrupt, path, e.Off, "chunk %d of %d", e.Chunk, len(t.Chunks))
			}
			places[e.Chunk].used = true
			if i > 0 {
				places[e.Chunk].next = true
			}
		}
		return nil
	})
	if err != nil {
		return nil, nil, err
	}

	var (
		segments = map[uint32]*pool.Segment{}
		fresh    []uint32                    // chunks without a place
		first    = map[chunk.Digest]uint32{} // of equal chunks, the first fresh one
		equal    [][2]uint32                 // fresh chunk, and an earlier one equal to it
	)
	for i := range t.Chunks {
		if !places[i].used {
			continue
		}
		c := &t.Chunks[i]
		if int64(c.Blob) >= int64(len(t.Blobs)) || len(t.Blobs) > maxBlobs {
			return nil, nil, fmt.Errorf("%w: chunk %d lies in blob %d of %d (at most %d)", index.ErrCorrupt, i, c.Blob, len(t.Blobs), maxBlobs)
		}
		if s, off, ok := p.Lookup(c.Digest, c.Size); ok {
			places[i].segment, places[i].off = s.ID, off
			segments[s.ID] = s
			continue
		}
		if j, ok := first[c.Digest]; ok {
			if t.Chunks[j].Size != c.Size {
				return nil, nil, fmt.Errorf("%w: chunk %s has sizes %d and %d in one index", index.ErrCorrupt, c.Digest, t.Chunks[j].Size, c.Size)
			}
			equal = append(equal, [2]uint32{uint32(i), j})
			continue
		}
		first[c.Digest] = uint32(i)
		fresh = append(fresh, uint32(i))
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
			return nil, nil, err
		}
		segments[s.ID] = s
		for i, x := range fresh {
			places[x].segment, places[x].off = s.ID, entries[i].Off
		}
	}
	for _, e := range equal {
		places[e[0]].segment, places[e[0]].off = places[e[1]].segment, places[e[1]].off
	}
	list := make([]*pool.Segment, 0, len(segments))
	for _, s := range segments {
		list = append(list, s)
	}
	slices.SortFunc(list, func(a, b *pool.Segment) int { return cmp.Compare(a.ID, b.ID) })
	return places, list, nil
}

func writeFile(path string, write func(*os.File) error) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	err = write(f)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
