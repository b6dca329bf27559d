package layer

import (
	"bufio"
	"io"

	"github.com/shale-image/shale/index"
)

const blockSize = 512

// Reader reads the entries of an uncompressed archive, in the manner of
// archive/tar: Next moves on to an entry, Read gives its data. It is not safe
// for concurrent use.
//
// Errors wrap index.ErrCorrupt, index.ErrUnsupported or index.ErrLimit and
// tell layer and offset; those of the underlying reader are returned as they
// are. After an error the Reader stays at it.
type Reader struct {
	src  *source
	br   *bufio.Reader
	name string
	lim  index.Limits
	err  error

	pos  int64 // bytes of the stream consumed
	data int64 // stored bytes of the current entry still to come
	pad  int64 // bytes after them up to the next header

	entries  int
	metadata int64
	globals  map[string]string // the records of pax global headers
	block    [blockSize]byte
	head     header // of the current entry
}

// NewReader reads an archive from r. The name is that of the layer in errors.
// r is read in order and to its very end, so that a hash of what is read of it
// is complete once Next has returned io.EOF.
func NewReader(r io.Reader, name string, lim index.Limits) *Reader {
	src := &source{r: r}
	return &Reader{src: src, br: bufio.NewReaderSize(src, 128<<10), name: name, lim: lim.WithDefaults()}
}

// Next skips what is left of the current entry and returns the next one, or
// io.EOF at the end of the archive.
func (r *Reader) Next() (*Entry, error) {
	if r.err != nil {
		return nil, r.err
	}
	e, err := r.next()
	if err != nil {
		r.err = err
		r.data, r.pad = 0, 0
		return nil, err
	}
	return e, nil
}

func (r *Reader) next() (*Entry, error) {
	var ext extension
	for {
		if err := r.skip(r.data + r.pad); err != nil {
			return nil, err
		}
		r.data, r.pad = 0, 0
		at := r.pos
		h, err := r.header()
		if err != nil {
			if err == io.EOF && ext.used() {
				return nil, r.errorf(index.ErrCorrupt, at, "extended header without an entry")
			}
			return nil, err
		}
		if r.entries++; r.entries > r.lim.Entries {
			return nil, r.errorf(index.ErrLimit, at, "more than %d headers (Entries)", r.lim.Entries)
		}
		switch h.typeflag {
		case 'x', 'g', 'L', 'K':
			if err := r.extend(&ext, h); err != nil {
				return nil, err
			}
			continue
		}
		e, err := r.entry(h, &ext)
		if err != nil {
			return nil, err
		}
		if e != nil {
			if len(e.Fragments) == 0 { // data that belongs to no file
				r.data, r.pad = 0, r.data+r.pad
			}
			return e, nil
		}
		ext = extension{}
	}
}

// Read reads the stored data of the current entry, its Fragments one after the
// other, and returns io.EOF at its end.
func (r *Reader) Read(p []byte) (int, error) {
	if r.data == 0 {
		if r.err != nil && r.err != io.EOF {
			return 0, r.err
		}
		return 0, io.EOF
	}
	if int64(len(p)) > r.data {
		p = p[:r.data]
	}
	if len(p) == 0 {
		return 0, nil
	}
	n, err := r.br.Read(p)
	r.pos += int64(n)
	r.data -= int64(n)
	if r.data == 0 {
		return n, nil // an error will come again
	}
	if err != nil {
		r.err = r.short(err)
		r.data, r.pad = 0, 0
		return n, r.err
	}
	return n, r.inLimit()
}

// errorf makes an error about the stream at an offset.
func (r *Reader) errorf(kind error, off int64, format string, args ...any) error {
	return index.Errorf(kind, r.name, off, format, args...)
}

// short explains an error of the stream where more was expected.
func (r *Reader) short(err error) error {
	if r.src.err != nil {
		return r.src.err
	}
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return r.errorf(index.ErrCorrupt, r.pos, "the archive is cut off")
	}
	return err
}

func (r *Reader) inLimit() error {
	if r.pos > r.lim.StreamBytes {
		r.err = r.errorf(index.ErrLimit, r.pos, "an archive of more than %d bytes (StreamBytes)", r.lim.StreamBytes)
		return r.err
	}
	return nil
}

// skip consumes n bytes.
func (r *Reader) skip(n int64) error {
	for n > 0 {
		// In steps, so that an int has room and the limit is looked at.
		m, err := r.br.Discard(int(min(n, 1<<24)))
		r.pos += int64(m)
		n -= int64(m)
		if err != nil {
			return r.short(err)
		}
		if err := r.inLimit(); err != nil {
			return err
		}
	}
	return nil
}

// full reads exactly len(p) bytes.
func (r *Reader) full(p []byte) error {
	n, err := io.ReadFull(r.br, p)
	r.pos += int64(n)
	if err != nil {
		return r.short(err)
	}
	return r.inLimit()
}

// bytes reads n bytes and the padding to the next block. Memory is taken as
// the bytes arrive: a header that only claims to be long costs nothing.
func (r *Reader) bytes(n int64) ([]byte, error) {
	p := make([]byte, 0, min(n, 4<<10))
	for int64(len(p)) < n {
		have := len(p)
		p = append(p, make([]byte, min(n-int64(have), max(int64(have), 4<<10)))...)
		if err := r.full(p[have:]); err != nil {
			return nil, err
		}
	}
	return p, r.skip(padding(n))
}

// padding returns what is missing from n to a multiple of the block size.
func padding(n int64) int64 { return -n & (blockSize - 1) }

// end reads what follows the end of the archive and returns io.EOF.
func (r *Reader) end() error {
	for {
		n, err := r.br.Discard(1 << 20)
		r.pos += int64(n)
		if err := r.inLimit(); err != nil {
			return err
		}
		if err != nil {
			return err
		}
	}
}
