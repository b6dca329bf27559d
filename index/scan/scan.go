// Package scan makes the index of a layer that stays as it is, in one pass over
// its bytes: the changes it makes, the chunks of its files and where in the
// layer's stream they lie, and the spans by which the stream can be entered.
// Whoever wants the content gets it on the way, chunk by chunk.
//
//	layer.go   decompress, cut, and hash, each on a core of its own
//	image.go   layers become the tree of an image
//
// What a layer has not in one piece, which happens in sparse files only, goes
// with the windows into the image's side: a blob of its own, beside the layers.
// It knows no registry and no pool.
package scan

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/layer"
)

// Every is the least distance of two spans of a gzip layer, in bytes of its
// stream: nearly each block of deflate, some 60 KB, is a span. A span is what is
// fetched at least, and costs a window of some 2 KB in the side.
const Every = 32 << 10

// Blocks is the least distance of two spans inside of a zstd frame: each block of most
// encoders is a span.
const Blocks = 128 << 10

// Options say how to scan. Zero values mean the defaults.
type Options struct {
	Limits  index.Limits
	Cut     uint32 // the size of chunks; default chunk.Size
	Every   int64  // distance of spans of a gzip or zstd layer; default Every, inside of zstd frames Blocks
	Workers int    // that hash and keep chunks; default: one for each processor
	TempDir string // for the side; default os.TempDir

	// Keep is given each chunk of content but those of zeros, some of them
	// several times, from several goroutines. The bytes are valid during the
	// call only.
	Keep func(d chunk.Digest, p []byte) error
}

// Layer is what one layer holds.
type Layer struct {
	DiffID      string // sha256 of the stream
	Compression layer.Compression
	Size        int64          // of the stream
	Changes     []index.Change // extents number Chunks
	Chunks      []index.Chunk  // Blob 0 is the layer, 1 the side
	Spans       []index.Span   // of the layer

	side *side
}

// Close gives up what the layer has beside it.
func (l *Layer) Close() error { return l.side.close() }

// part is a piece of the side, on its way: a file without a name.
type part struct {
	file *os.File
	size int64
	buf  []byte
}

func newPart(dir string) (*part, error) {
	if dir == "" {
		dir = os.TempDir()
	}
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err == nil {
		return &part{file: os.NewFile(uintptr(fd), filepath.Join(dir, "(unnamed)"))}, nil
	}
	f, err := os.CreateTemp(dir, ".side-") // a file system that cannot
	if err != nil {
		return nil, err
	}
	os.Remove(f.Name())
	return &part{file: f}, nil
}

// encoder compresses windows and odd chunks. Its results depend on its input
// alone.
var encoder = func() *zstd.Encoder {
	e, err := zstd.NewWriter(nil, zstd.WithEncoderCRC(false), zstd.WithSingleSegment(true), zstd.WithWindowSize(1<<20))
	if err != nil {
		panic(err) // the options are constants
	}
	return e
}()

// add appends p, compressed, and returns where.
func (s *part) add(p []byte) (off, length int64, err error) {
	s.buf = encoder.EncodeAll(p, s.buf[:0])
	off = s.size
	if _, err := s.file.WriteAt(s.buf, off); err != nil {
		return 0, 0, err
	}
	s.size += int64(len(s.buf))
	return off, int64(len(s.buf)), nil
}

// side is what of the image's side belongs to one layer. Offsets count from the
// beginning of each part.
type side struct {
	windows *part // written by the goroutine that inflates
	odd     *part // chunks that the layer has not in one piece
	spans   []index.Span
}

func newSide(dir string) (*side, error) {
	w, err := newPart(dir)
	if err != nil {
		return nil, err
	}
	odd, err := newPart(dir)
	if err != nil {
		return nil, errors.Join(err, w.file.Close())
	}
	return &side{windows: w, odd: odd}, nil
}

func (s *side) close() error { return errors.Join(s.windows.file.Close(), s.odd.file.Close()) }

func (s *side) window(p []byte) (index.Window, error) {
	off, n, err := s.windows.add(p)
	return index.Window{Offset: off, Length: uint32(n)}, err
}

// chunk appends a chunk and returns where in the stream of spans it lies.
func (s *side) chunk(p []byte) (int64, error) {
	off, n, err := s.odd.add(p)
	if err != nil {
		return 0, err
	}
	b := index.Blob{Spans: s.spans}
	at := b.Append(index.Span{Size: int64(len(p)), Offset: off, Length: n, Codec: chunk.Zstd})
	s.spans = b.Spans
	return at, nil
}

// Scan reads a layer, compressed or not, to its end. name is for errors, which
// wrap index.ErrCorrupt, index.ErrUnsupported or index.ErrLimit if they are the
// layer's, and are those of r or Keep otherwise. To end it early, end r.
func Scan(ctx context.Context, r io.Reader, name string, o Options) (_ *Layer, err error) {
	side, err := newSide(o.TempDir)
	if err != nil {
		return nil, err
	}
	marks := &layer.Marks{Every: cmp.Or(o.Every, Every), Blocks: cmp.Or(o.Every, Blocks), Window: side.window}
	in, kind, err := layer.DecompressMarked(r, o.Limits, marks)
	if err != nil {
		return nil, errors.Join(err, side.close())
	}
	sum := &summed{r: in, h: sha256.New()}
	x := &scanner{ctx: ctx, in: layer.NewReader(sum, name, o.Limits), l: &Layer{Compression: kind, side: side}}
	x.start(o)
	err = errors.Join(x.run(), x.stop())
	in.Close() // its goroutine has marks
	if err != nil {
		return nil, errors.Join(err, side.close())
	}
	x.l.DiffID, x.l.Size = fmt.Sprintf("sha256:%x", sum.h.Sum(nil)), sum.n
	x.l.Spans = marks.Spans
	if !slices.ContainsFunc(x.l.Spans, func(s index.Span) bool { return s.Window.Length > 0 }) {
		side.windows.size = 0 // of frames that could not be cut to their end
	}
	x.finish()
	return x.l, nil
}

// summed hashes what is read.
type summed struct {
	r io.Reader
	h hash.Hash
	n int64
}

func (s *summed) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	s.h.Write(p[:n])
	s.n += int64(n)
	return n, err
}

// workers is how many hash, by default.
func workers(o Options) int {
	if o.Workers > 0 {
		return o.Workers
	}
	return runtime.GOMAXPROCS(0)
}
