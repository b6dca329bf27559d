// Package inspect looks into images: what they consist of, whether every byte
// of them is what it should be, and how two of them differ. It reads from the
// image's own repository, or from files, and changes nothing.
//
// It knows images, indexes and the tables of RAFS; it knows no pool, no mount
// and no service, and prints nothing.
package inspect

import (
	"cmp"
	"context"
	"errors"
	"fmt"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/retry"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/rafs"
	"github.com/shale-image/shale/reader"
)

// Image is an image opened for a look inside. Its fields must not be changed.
type Image struct {
	Name     string       // the reference or file it was opened by
	Manifest *image.Image // nil for a bare bootstrap
	Kind     reader.Kind  // of the index; "" if there is none
	Trust    reader.Trust // what it takes to believe it
	Metadata int64        // stored bytes that are fetched before anything is read
	RAFS     *rafs.Image  // nil if the index has no such tables, or Damage is set
	Tree     *index.Tree  // nil if Damage is set
	Refuted  error        // what is wrong with an index that was passed over for that of Tree, if one was
	Damage   error        // why there is no Tree; wraps reader.ErrNoIndex, or what is wrong with the index
	Source   blob.Source  // of the blobs of Tree and Manifest; not verified
	Release  func() error // called by Close; may be nil

	repo *image.Repository // nil of a bare bootstrap
}

// Open opens an image of a repository, which is closed with it. o says which
// index of it counts. An image that is not converted, or whose index
// is damaged, is opened nevertheless: Damage says what is the matter. Errors
// are only about getting at it.
func Open(ctx context.Context, repo *image.Repository, m *image.Image, o reader.Options) (*Image, error) {
	im := &Image{Name: repo.Ref().String(), Manifest: m, Source: retry.New(repo.Blobs(), retry.Policy{}), Release: repo.Close, repo: repo}
	raw, err := reader.Use(ctx, repo, m, o, func(raw *reader.Raw) (err error) {
		im.RAFS, im.Tree, err = raw.Open()
		im.Refuted = cmp.Or(im.Refuted, err)
		return err
	})
	if err == nil {
		im.Kind, im.Trust, im.Metadata = raw.Kind, raw.Trust, raw.Stored
		return im, raw.Close()
	}
	im.Damage = fmt.Errorf("%s: %w", im.Name, err)
	if !isDefect(im.Damage) && !errors.Is(im.Damage, reader.ErrNoIndex) {
		return nil, im.Damage
	}
	return im, nil
}

// HasRanges tells whether parts of its layers can be had: one is asked for.
func (im *Image) HasRanges(ctx context.Context) bool {
	return im.repo == nil || reader.HasRanges(ctx, im.repo, im.Manifest)
}

// Spare tells whether the image starts in spite of its Damage: by its layers, all of
// which are read then. A Nydus image has none.
func (im *Image) Spare() bool {
	if im.Manifest == nil {
		return false
	}
	_, converted := reader.Bootstrap(im.Manifest)
	return !converted
}

// Close releases what the image was opened from. Readers become invalid.
func (im *Image) Close() error {
	if im.Release == nil {
		return nil
	}
	return im.Release()
}
