// Package link turns an image's index into something this node can mount: it
// looks every chunk up in the pool, gives the unknown ones a place in a new
// segment, and writes EROFS metadata in which file data are addresses.
//
// A linked image is a directory; it is local, can be rebuilt from the index
// at any time, and is all that fill and the faces need
// (docs/formats/linked-image.md):
//
//	meta    EROFS metadata; its device slots are pool segments
//	info    JSON: blobs, segments and their flat addresses
//	map     where the bytes of each address come from (map.go)
//
// The flat address space of an image is the metadata, followed by each of its
// segments at the slot's mapped_blkaddr. The same metadata mounts with one
// device per segment, or from one flat file. The package knows no registry and
// does no I/O but on these files.
package link

import (
	"cmp"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"golang.org/x/sync/errgroup"
	"lukechampine.com/blake3"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/erofs"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/pool"
)

const blocksGranule = chunk.Block / erofs.BlockSize

// Link links the tree into dir, which must not exist yet. It appears whole or
// not at all; if Link fails, the pool is as it was. Images of one pool are
// linked one after the other (pool.Exclusive).
//
// A full disk is an error that wraps pool.ErrNoSpace, a tree that makes no
// sense one that wraps index.ErrCorrupt.
func Link(ctx context.Context, t *index.Tree, p *pool.Pool, dir string) (err error) {
	defer p.Exclusive()()
	if _, err := os.Lstat(dir); !errors.Is(err, os.ErrNotExist) {
		if err == nil {
			err = os.ErrExist
		}
		return fmt.Errorf("link into %s: %w", dir, err)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	var (
		names   *erofs.Names
		listing errgroup.Group
	)
	listing.Go(func() (err error) {
		names, err = erofs.List(t)
		return err
	})
	pl, err := allocate(t, p)
	unlisted := listing.Wait()
	if err != nil {
		return err
	}
	defer func() {
		if err != nil && pl.created != nil { // nobody else has seen it: we are exclusive
			err = errors.Join(err, p.Remove(pl.created))
		}
	}()
	if unlisted != nil {
		return unlisted
	}
	layout, err := pl.layout(names)
	if err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	tmp := dir + ".new"
	if err := os.RemoveAll(tmp); err != nil {
		return err
	}
	if err := os.MkdirAll(tmp, 0o700); err != nil {
		return noSpace(err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(tmp))
		}
	}()
	if err := pl.write(t, layout, tmp); err != nil {
		return noSpace(err)
	}
	if err := syncDir(tmp); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := os.Rename(tmp, dir); err != nil {
		return err
	}
	if err := syncDir(filepath.Dir(dir)); err != nil {
		return errors.Join(err, os.RemoveAll(dir))
	}
	return nil
}

// layout plans the metadata.
func (pl *placement) layout(names *erofs.Names) (*erofs.Layout, error) {
	slots := make(map[uint32]uint16, len(pl.segments))
	var devices []erofs.Device
	for i, s := range pl.segments {
		slots[s.ID] = uint16(i + 1) // NewLayout refuses more than 2^16-1
		devices = append(devices, erofs.Device{
			Tag:    fmt.Sprintf("%08x", s.ID),
			Blocks: uint32(s.Size / erofs.BlockSize), // 2^30 at most
		})
	}
	return names.Layout(erofs.Options{
		Devices: devices,
		Locate: func(c uint32) erofs.Location {
			at := pl.places[c]
			return erofs.Location{Device: slots[at.segment], Block: uint32(at.off / erofs.BlockSize)}
		},
		Checksum:  true,
		FlatAlign: blocksGranule,
		Flat:      true,
	})
}

// write writes the three files into dir. Each is synced while the next is written.
func (pl *placement) write(t *index.Tree, layout *erofs.Layout, dir string) (err error) {
	var syncing errgroup.Group
	defer func() { err = cmp.Or(err, syncing.Wait()) }()
	writeFile := func(name string, write func(io.Writer) error) error {
		f, err := os.OpenFile(filepath.Join(dir, name), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		if err := write(f); err != nil {
			return errors.Join(err, f.Close())
		}
		syncing.Go(func() error { return errors.Join(f.Sync(), f.Close()) })
		return nil
	}
	info := Info{Version: infoVersion, MetaSize: int64(layout.Blocks()) * erofs.BlockSize, Meets: pl.meets(t), Blobs: []Blob{}, Segments: []Segment{}}
	info.FlatSize = info.MetaSize
	flat := make(map[uint32]int64, len(pl.segments))
	for i, d := range layout.Devices() {
		s := Segment{ID: pl.segments[i].ID, Flat: int64(d.Mapped) * erofs.BlockSize, Size: pl.segments[i].Size}
		info.Segments = append(info.Segments, s)
		info.FlatSize = s.Flat + s.Size
		flat[s.ID] = s.Flat
	}
	for _, b := range t.Blobs {
		info.Blobs = append(info.Blobs, Blob{Digest: b.Digest, Size: b.Size})
	}
	if slices.ContainsFunc(t.Blobs, func(b index.Blob) bool { return b.First > 0 }) {
		for _, b := range t.Blobs {
			info.First = append(info.First, b.First)
		}
	}
	sum := blake3.New(32, nil)
	err = writeFile("meta", func(f io.Writer) error {
		_, err := layout.WriteTo(io.MultiWriter(f, sum))
		return err
	})
	if err != nil {
		return err
	}
	info.MetaSum = hex.EncodeToString(sum.Sum(nil))
	js, err := json.MarshalIndent(info, "", "  ")
	if err != nil {
		return err
	}
	js = append(js, '\n')
	if len(js) > maxInfo {
		return fmt.Errorf("link: %w: %d bytes of names of blobs, more than %d", index.ErrLimit, len(js), maxInfo)
	}
	err = writeFile("info", func(f io.Writer) error {
		_, err := f.Write(js)
		return err
	})
	if err != nil {
		return err
	}
	return writeFile("map", func(f io.Writer) error {
		return pl.writeMap(f, t, flat, blake3.Sum256(js))
	})
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func noSpace(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%w: %w", pool.ErrNoSpace, err)
	}
	return err
}
