package inspect

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/dirblob"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/rafs"
)

// OpenFile opens an image without a manifest: file is a bootstrap, or a blob
// that carries one. Its blobs are files of the directory dir, named by the ids
// that the bootstrap has for them, whatever their content; an id that is only
// a placeholder stands for file itself, as does the blob of chunk info that a
// bootstrap does not name. With an empty dir the blobs lie beside
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
	metas := &metaFiles{dir: dir, file: f, size: size, name: file}
	defer metas.close()
	if im.RAFS, err = openBootstrap(f, size, file, metas.open); err != nil {
		return fail(err)
	}
	if im.Tree, err = im.RAFS.Tree(index.Limits{}); err != nil {
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
func openBootstrap(f *os.File, size int64, name string, metas rafs.Metas) (*rafs.Image, error) {
	toc, err := rafs.ReadTOC(f, size, name)
	if errors.Is(err, index.ErrUnsupported) || size < 512 {
		im, bootErr := rafs.Open(f, size, name, metas)
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
	return rafs.Open(bytes.NewReader(p), int64(len(p)), name+": image.boot", metas)
}

// metaFiles opens the blobs that have chunk info: files like all others, or the
// one that the bootstrap lies in.
type metaFiles struct {
	dir, name string
	file      *os.File
	size      int64
	opened    []*os.File
}

func (m *metaFiles) open(_ int, b *rafs.BlobInfo) (io.ReaderAt, int64, string, error) {
	digest := b.Digest()
	if b.Features&rafs.FeatureSeparate != 0 {
		digest = b.MetaDigest()
	}
	_, hex, ok := strings.Cut(digest, ":")
	if !ok {
		return m.file, m.size, m.name, nil
	}
	name := filepath.Join(m.dir, hex)
	f, size, err := openRegular(name)
	if err != nil {
		return nil, 0, "", err
	}
	m.opened = append(m.opened, f)
	return f, size, name, nil
}

func (m *metaFiles) close() {
	for _, f := range m.opened {
		f.Close()
	}
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
