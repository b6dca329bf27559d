package link

import (
	"errors"
	"fmt"

	"github.com/shale-image/shale/pool"
)

// Collect frees what no image of the pool refers to any more; it is called
// after an image was removed. images lists the directories of all linked
// images that remain, those of images that are only still mounted included. It
// is called while nothing is being linked, so it must not call Link itself.
//
// Unknown means in use: if images fails, or if one of the directories cannot be
// read or understood, nothing is freed.
func Collect(p *pool.Pool, images func() ([]string, error)) (pool.Freed, error) {
	defer p.Exclusive()()
	dirs, err := images()
	if err != nil {
		return pool.Freed{}, fmt.Errorf("nothing is freed: %w", err)
	}
	inUse, err := References(dirs...)
	if err != nil {
		return pool.Freed{}, fmt.Errorf("nothing is freed: %w", err)
	}
	return p.Free(inUse)
}

// References adds up the addresses that linked images refer to. It takes a bit
// of memory for 16 KiB of addresses, however many images share them.
func References(dirs ...string) (*pool.References, error) {
	refs := new(pool.References)
	for _, dir := range dirs {
		if err := addReferences(refs, dir); err != nil {
			return nil, err
		}
	}
	return refs, nil
}

func addReferences(refs *pool.References, dir string) (err error) {
	im, err := Open(dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, im.Close()) }()
	if err := im.EachChunk(refs.Add); err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	return nil
}

// EachChunk calls fn for each chunk with its place in the pool and its size, in
// order of flat addresses.
func (im *Image) EachChunk(fn func(segment uint32, off, n int64) error) error {
	segments := im.Segments
	for i := range im.Chunks() {
		c := im.Chunk(i)
		for c.Flat >= segments[0].Flat+segments[0].Size { // Open has seen that there is one
			segments = segments[1:]
		}
		s := segments[0]
		if err := fn(s.ID, c.Flat-s.Flat, int64(c.Size)); err != nil {
			return err
		}
	}
	return nil
}
