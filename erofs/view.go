package erofs

import (
	"fmt"
	"io"

	"github.com/shale-image/shale/index"
)

// view reads an image through a small cache: metadata is read a few bytes at a
// time, mostly forwards.
type view struct {
	r    io.ReaderAt
	size int64
	name string

	windows [8]window // by window number modulo 8
	across  []byte    // what crosses windows is put together here
}

type window struct {
	at  int64 // offset in the image
	buf []byte
}

const windowSize = 64 << 10

// read returns n bytes, which are valid until the next read. n must have a
// bound that does not come from the image.
func (v *view) read(off int64, n int) ([]byte, error) {
	if err := v.check(off, int64(n)); err != nil {
		return nil, err
	}
	at := off &^ (windowSize - 1)
	if off+int64(n) > at+windowSize {
		v.across = v.across[:0]
		for n > 0 {
			k := int(min(int64(n), (off&^(windowSize-1))+windowSize-off))
			b, err := v.read(off, k)
			if err != nil {
				return nil, err
			}
			v.across = append(v.across, b...)
			off, n = off+int64(k), n-k
		}
		return v.across, nil
	}
	w := &v.windows[at/windowSize%int64(len(v.windows))]
	if w.at != at || len(w.buf) == 0 {
		k := min(windowSize, v.size-at)
		if int64(cap(w.buf)) < k {
			w.buf = make([]byte, k)
		}
		w.at, w.buf = at, w.buf[:k]
		if err := readFull(v.r, w.buf, at); err != nil {
			w.buf = w.buf[:0]
			return nil, fmt.Errorf("%s: read %d bytes at offset %d: %w", v.name, k, at, err)
		}
	}
	return w.buf[off-at:][:n], nil
}

// check tells whether n bytes at an offset lie in the image.
func (v *view) check(off, n int64) error {
	if off < 0 || n < 0 || off > v.size || n > v.size-off {
		return v.errorf(index.ErrCorrupt, off, "%d bytes are wanted here, the image has %d", n, v.size)
	}
	return nil
}

func (v *view) errorf(kind error, off int64, format string, args ...any) error {
	return index.Errorf(kind, v.name, off, format, args...)
}

// readFull is io.ReadFull for a ReaderAt.
func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	switch {
	case n == len(p):
		return nil
	case err == nil || err == io.EOF:
		return io.ErrUnexpectedEOF
	}
	return err
}
