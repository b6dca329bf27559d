package layer

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/zstd"

	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/zframe"
	"github.com/shale-image/shale/index/zran"
)

// Compression is how a layer is compressed as a whole.
type Compression uint8

// The compressions of OCI layers.
const (
	None Compression = iota
	Gzip
	Zstd
)

// String returns "none", "gzip" or "zstd".
func (c Compression) String() string {
	switch c {
	case None:
		return "none"
	case Gzip:
		return "gzip"
	case Zstd:
		return "zstd"
	}
	return fmt.Sprintf("compression(%d)", uint8(c))
}

// Read-ahead: the inflater may be this far ahead of the reader. 256 KiB is
// what a core inflates in about a millisecond, so that switching between the
// two costs nothing.
const (
	aheadSize  = 256 << 10
	aheadCount = 8
)

// Decompress tells from the first bytes of r how it is compressed and returns
// its uncompressed form. All members of a gzip file and all frames of a zstd
// file are read; skippable zstd frames are skipped. What is not known as
// compressed is returned as it is, an empty stream too.
//
// Inflating runs in a goroutine of its own, some MiB ahead of the reader.
// Close ends it and waits until it no longer reads r; it does not close r. If
// a Read of r may block for ever, unblock it first.
//
// Malformed data is an error that wraps index.ErrCorrupt, a passed limit one
// that wraps index.ErrLimit; errors of r are returned as they are.
func Decompress(r io.Reader, lim index.Limits) (io.ReadCloser, Compression, error) {
	return decompress(r, lim, nil)
}

func decompress(r io.Reader, lim index.Limits, m *Marks) (io.ReadCloser, Compression, error) {
	lim = lim.WithDefaults()
	src := &source{r: r}
	br := bufio.NewReaderSize(src, 64<<10)
	magic, err := br.Peek(4)
	if err != nil && err != io.EOF {
		return nil, None, err
	}
	in := &inflater{src: src, lim: lim, marks: m}
	switch {
	case len(magic) >= 2 && magic[0] == 0x1f && magic[1] == 0x8b:
		in.kind = Gzip
		var o zran.Options
		if m != nil {
			o = zran.Options{Span: m.Every, Checkpoint: m.checkpoint}
		}
		z := zran.NewReader(br, o)
		in.r, in.close = z, func() { z.Close() }
	case len(magic) == 4 && (string(magic) == "\x28\xb5\x2f\xfd" || magic[0]&0xf0 == 0x50 && string(magic[1:]) == "\x2a\x4d\x18"):
		in.kind = Zstd
		// One goroutine, ours, does the decoding: the decoder's own read ahead
		// by a number of blocks that depends on the machine.
		z, err := zstd.NewReader(br, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
			zstd.WithDecoderMaxWindow(uint64(lim.Window)), zstd.WithDecoderMaxMemory(1<<62))
		if err != nil {
			return nil, Zstd, in.explain(err)
		}
		in.r, in.close = z, z.Close
		if m != nil {
			m.frames = zframe.New(br, z, m.frame)
			m.frames.Cut(zframe.NewCutter(m.Every, cmp.Or(m.Blocks, m.Every), m.block))
			in.r = m.frames
		}
	default:
		if m == nil {
			return io.NopCloser(br), None, nil
		}
		in.kind, in.r, in.close = None, br, func() {}
	}
	return readAhead(in), in.kind, nil
}

// source counts what is read and keeps the first error of the source itself,
// to tell it from what the decompressor says about the bytes.
type source struct {
	r   io.Reader
	n   int64
	err error // not io.EOF
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	s.n += int64(n)
	if err != nil && err != io.EOF && s.err == nil {
		s.err = err
	}
	return n, err
}

// inflater is a decompressor with its limits and errors made ours.
type inflater struct {
	src   *source
	r     io.Reader
	close func()
	kind  Compression
	lim   index.Limits
	marks *Marks // to be kept, if any
	n     int64  // bytes produced
}

func (i *inflater) Read(p []byte) (int, error) {
	n, err := i.r.Read(p)
	i.n += int64(n)
	if i.n > i.lim.StreamBytes {
		return 0, index.Errorf(index.ErrLimit, i.kind.String(), i.src.n, "more than %d bytes uncompressed (StreamBytes)", i.lim.StreamBytes)
	}
	if i.n > index.ExpansionFrom && (i.n-index.ExpansionFrom)/i.lim.Expansion > i.src.n {
		return 0, index.Errorf(index.ErrLimit, i.kind.String(), i.src.n, "%d bytes uncompressed, more than %d for each compressed one (Expansion)", i.n, i.lim.Expansion)
	}
	if err == io.EOF && i.marks != nil {
		if err := i.marks.end(i.kind, i.n, i.src.n); err != nil {
			return n, err
		}
	}
	if err != nil && err != io.EOF {
		err = i.explain(err)
	}
	return n, err
}

func (i *inflater) explain(err error) error {
	switch {
	case i.src.err != nil:
		return i.src.err
	case errors.Is(err, zstd.ErrWindowSizeExceeded), errors.Is(err, zstd.ErrDecoderSizeExceeded): // or the frame is one segment
		return index.Errorf(index.ErrLimit, i.kind.String(), i.src.n, "needs a window of more than %d bytes (Window)", i.lim.Window)
	case errors.Is(err, io.ErrUnexpectedEOF) || err == io.EOF:
		return index.Errorf(index.ErrCorrupt, i.kind.String(), i.src.n, "the stream is cut off")
	}
	return index.Errorf(index.ErrCorrupt, i.kind.String(), i.src.n, "%v", err)
}

// ahead reads from an inflater in a goroutine.
type ahead struct {
	full   chan piece  // filled; closed after the piece with the error
	free   chan []byte // to fill
	stop   chan struct{}
	done   chan struct{}
	once   sync.Once
	cur    piece
	unread []byte
}

type piece struct {
	buf []byte
	err error // what comes after buf
}

func readAhead(in *inflater) *ahead {
	a := &ahead{
		full: make(chan piece, aheadCount),
		free: make(chan []byte, aheadCount),
		stop: make(chan struct{}),
		done: make(chan struct{}),
	}
	go a.fill(in)
	return a
}

func (a *ahead) fill(in *inflater) {
	defer close(a.done)
	defer in.close()
	defer close(a.full)
	for made := 0; ; {
		var buf []byte
		select {
		case buf = <-a.free:
		default:
			if made < aheadCount { // small layers never need them all
				made++
				buf = make([]byte, aheadSize)
				break
			}
			select {
			case buf = <-a.free:
			case <-a.stop:
				return
			}
		}
		var p piece
		n := 0
		for n < len(buf) && p.err == nil {
			select {
			case <-a.stop:
				return
			default:
			}
			var m int
			m, p.err = in.Read(buf[n:])
			n += m
		}
		p.buf = buf[:n]
		select {
		case a.full <- p:
		case <-a.stop:
			return
		}
		if p.err != nil {
			return
		}
	}
}

func (a *ahead) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for len(a.unread) == 0 {
		if a.cur.err != nil {
			return 0, a.cur.err
		}
		if a.cur.buf != nil {
			a.free <- a.cur.buf[:cap(a.cur.buf)] // has room for all buffers there are
			a.cur.buf = nil
		}
		next, ok := <-a.full
		if !ok {
			next.err = io.ErrClosedPipe // stopped by Close
		}
		a.cur, a.unread = next, next.buf
	}
	n := copy(p, a.unread)
	a.unread = a.unread[n:]
	return n, nil
}

func (a *ahead) Close() error {
	a.once.Do(func() { close(a.stop) })
	<-a.done
	return nil
}
