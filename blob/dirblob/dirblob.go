// Package dirblob is a blob.Source over a directory: an OCI image layout
// (blobs/sha256/<hex>) or a flat directory of <hex>. It never leaves the
// directory, follows no symbolic link to a blob, and opens nothing but regular
// files.
package dirblob

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/internal/bounds"
)

// Source reads the blobs of one directory. It is safe for concurrent use.
type Source struct {
	root *os.Root
}

// Open opens the directory. The caller closes the source; readers that are
// open then stay usable.
func Open(dir string) (*Source, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	return &Source{root}, nil
}

// Close releases the directory.
func (s *Source) Close() error { return s.root.Close() }

// Range implements blob.Source.
func (s *Source) Range(ctx context.Context, ref blob.Ref, off, n int64) (io.ReadCloser, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := bounds.Check(ref, 0, off, n); err != nil {
		return nil, err
	}
	f, size, err := s.open(ref)
	if err != nil {
		return nil, err
	}
	if off+n > size {
		f.Close()
		return nil, fmt.Errorf("blob %s: %d bytes at offset %d: %w: the file has %d bytes", ref.Digest, n, off, blob.ErrRange, size)
	}
	return &reader{ctx: ctx, file: f, ref: ref, off: off, left: n}, nil
}

func (s *Source) open(ref blob.Ref) (*os.File, int64, error) {
	hex, ok := bounds.Hex(ref.Digest)
	if !ok {
		return nil, 0, fmt.Errorf("blob %q: %w: not a sha256 digest", ref.Digest, blob.ErrNotFound)
	}
	// O_NONBLOCK: opening a FIFO must not wait for a writer.
	name := "blobs/sha256/" + hex
	f, err := s.root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		name = hex
		f, err = s.root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, 0, fmt.Errorf("blob %s: %w in %s", ref.Digest, blob.ErrNotFound, s.root.Name())
	case errors.Is(err, fs.ErrPermission):
		return nil, 0, fmt.Errorf("blob %s: %w: %w", ref.Digest, blob.ErrUnauthorized, err)
	case err != nil:
		return nil, 0, fmt.Errorf("blob %s: %w", ref.Digest, err)
	}
	// The root follows links that stay inside it; a link is no blob.
	fi, err := f.Stat()
	li, lerr := s.root.Lstat(name)
	if err != nil || lerr != nil || !fi.Mode().IsRegular() || !os.SameFile(fi, li) {
		f.Close()
		return nil, 0, fmt.Errorf("blob %s: %w: %s is not a regular file", ref.Digest, blob.ErrNotFound, name)
	}
	return f, fi.Size(), nil
}

// reader gives left bytes of file from off on, with pread.
type reader struct {
	ctx       context.Context
	file      *os.File
	ref       blob.Ref
	off, left int64
}

func (r *reader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	if r.left == 0 {
		return 0, io.EOF
	}
	n, err := r.file.ReadAt(p[:min(int64(len(p)), r.left)], r.off)
	r.off, r.left = r.off+int64(n), r.left-int64(n)
	if err == io.EOF { // the file shrank since it was opened
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		err = fmt.Errorf("blob %s: at offset %d, %d bytes missing: %w", r.ref.Digest, r.off, r.left, err)
	}
	return n, err
}

func (r *reader) Close() error { return r.file.Close() }
