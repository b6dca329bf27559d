// Package inspect looks into images: what they consist of, whether every byte
// of them is what it should be, and how two of them differ. It reads from the
// image's own repository, or from files, and changes nothing.
//
// It knows images, indexes and the tables of RAFS; it knows no pool, no mount
// and no service, and prints nothing.
package inspect

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/dirblob"
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
	raw, err := reader.Fetch(ctx, repo, m, o)
	if err == nil {
		defer raw.Close()
		im.Kind, im.Trust, im.Metadata = raw.Kind, raw.Trust, raw.Stored
		im.RAFS, im.Tree, err = raw.Open()
	}
	if err == nil {
		return im, nil
	}
	im.Damage = fmt.Errorf("%s: %w", im.Name, err)
	if !isDefect(im.Damage) && !errors.Is(im.Damage, reader.ErrNoIndex) {
		return nil, im.Damage
	}
	return im, nil
}

// Close releases what the image was opened from. Readers become invalid.
func (im *Image) Close() error {
	if im.Release == nil {
		return nil
	}
	return im.Release()
}

// OpenFile opens an image without a manifest: file is a bootstrap, or a blob
// that carries one. Its blobs are files of the directory dir, named by the ids
// that the bootstrap has for them, whatever their content; an id that is only
// a placeholder stands for file itself. With an empty dir the blobs lie beside
// the file.
//
// A blob without a bootstrap is image.ErrNotImage, and a file that is neither
// index.ErrCorrupt.
func OpenFile(file, dir string) (*Image, error) {
	if dir == "" {
		dir = filepath.Dir(file)
	}
	f, size, err := openRegular(file)
	if err != nil {
		return nil, err
	}
	src := &files{name: file, file: f, size: size}
	fail := func(err error) (*Image, error) {
		src.Close()
		return nil, err
	}
	if src.dir, err = dirblob.Open(dir); err != nil {
		return fail(err)
	}
	im := &Image{Name: file, Source: src, Release: src.Close}
	if im.RAFS, err = openBootstrap(f, size, file); err != nil {
		return fail(err)
	}
	if im.Tree, err = im.RAFS.Tree(); err != nil {
		return fail(err)
	}
	for i := range im.Tree.Blobs {
		if b := &im.Tree.Blobs[i]; b.Digest == "" {
			b.Digest, b.Size = file, size
		}
	}
	return im, nil
}

// openRegular does not wait for the writer of a FIFO.
func openRegular(name string) (*os.File, int64, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0, err
	}
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = fmt.Errorf("%s: %w: not a regular file", name, image.ErrNotImage)
	}
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, fi.Size(), nil
}

// openBootstrap opens the bootstrap that a file is or carries. A blob is known
// by its end, because its start is content, which may be anything.
func openBootstrap(f *os.File, size int64, name string) (*rafs.Image, error) {
	toc, err := rafs.ReadTOC(f, size, name)
	if errors.Is(err, index.ErrUnsupported) || size < 512 {
		im, bootErr := rafs.Open(f, size, name)
		if errors.Is(bootErr, index.ErrCorrupt) {
			return nil, fmt.Errorf("%w (and it is no blob that carries a bootstrap: %v)", bootErr, err)
		}
		return im, bootErr
	}
	if err != nil {
		return nil, err
	}
	p, err := toc.Extract("image.boot")
	if errors.Is(err, index.ErrNotExist) {
		return nil, fmt.Errorf("%s: %w: a blob that carries no bootstrap", name, image.ErrNotImage)
	}
	if err != nil {
		return nil, err
	}
	return rafs.Open(bytes.NewReader(p), int64(len(p)), name+": image.boot")
}

// files is the blob.Source of a bare bootstrap: a directory, and the file that
// the bootstrap lies in.
type files struct {
	dir  *dirblob.Source
	name string
	file *os.File
	size int64
}

// Range implements blob.Source.
func (s *files) Range(ctx context.Context, ref blob.Ref, off, n int64) (io.ReadCloser, error) {
	if ref.Digest != s.name {
		return s.dir.Range(ctx, ref, off, n)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if off < 0 || n <= 0 || off > s.size-n {
		return nil, fmt.Errorf("blob %s: %d bytes at offset %d: %w: it has %d bytes", s.name, n, off, blob.ErrRange, s.size)
	}
	return &section{r: io.NewSectionReader(s.file, off, n), name: s.name, left: n}, nil
}

// section reads a range of the file, which may shrink meanwhile.
type section struct {
	r    io.Reader
	name string
	left int64
}

func (s *section) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if s.left -= int64(n); err == io.EOF && s.left > 0 {
		err = fmt.Errorf("blob %s: %d bytes missing: %w", s.name, s.left, io.ErrUnexpectedEOF)
	}
	return n, err
}

func (s *section) Close() error { return nil }

func (s *files) Close() error {
	err := s.file.Close()
	if s.dir != nil {
		err = errors.Join(err, s.dir.Close())
	}
	return err
}
