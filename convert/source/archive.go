package source

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"

	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/layer"
)

// Tar returns the image of a root file system in a tar archive, compressed or
// not; "-" is standard input. A zero platform means this machine's.
func Tar(file string, platform image.Platform) (*Image, error) {
	var size int64
	path := file
	if file == "-" {
		path = "/dev/stdin" // opened anew, a pipe can be closed while it is read
	} else if fi, err := os.Stat(file); err != nil {
		return nil, err
	} else if fi.IsDir() {
		return nil, fmt.Errorf("%s is a directory: use dir:%s", file, file)
	} else {
		size = fi.Size()
	}
	return bare("tar:"+file, platform, archiveLayer(file, size, "", func(ctx context.Context) (io.ReadCloser, error) {
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		return &closing{f, context.AfterFunc(ctx, func() { f.Close() })}, nil
	})), nil
}

// closing is a file that is closed when a context ends: it may be a pipe that
// nothing comes through.
type closing struct {
	*os.File
	stop func() bool
}

func (f *closing) Close() error {
	if f.stop() {
		return f.File.Close()
	}
	return nil
}

// archiveLayer is a layer that is a tar archive, compressed or not.
func archiveLayer(name string, size int64, diffID string, open func(context.Context) (io.ReadCloser, error)) Layer {
	return Layer{Name: name, Size: size, Open: func(ctx context.Context, progress func(int64)) (Reader, error) {
		blob, err := open(ctx)
		if err != nil {
			return nil, err
		}
		a := &archive{blob: blob, raw: &countReader{r: blob, tell: progress}, diffID: diffID}
		if a.stream, _, err = layer.Decompress(a.raw, index.Limits{}); err != nil {
			blob.Close()
			return nil, err
		}
		from := io.Reader(a.stream)
		if diffID != "" {
			a.sum = newSum(a.stream)
			from = a.sum
		}
		a.Reader = layer.NewReader(from, "archive", index.Limits{})
		return a, nil
	}}
}

// archive reads a layer that is a tar archive.
type archive struct {
	*layer.Reader
	blob   io.Closer
	raw    *countReader
	stream io.ReadCloser
	sum    *sum // nil: nothing says what the digest must be
	diffID string
	ended  bool
}

func (a *archive) Next() (*layer.Entry, error) {
	e, err := a.Reader.Next()
	if err != io.EOF || a.ended {
		return e, err
	}
	// The archive is at its end, and so is the stream; but the stream may end
	// before the blob does, and only the blob's last byte proves its digest.
	if _, err := io.Copy(io.Discard, a.raw); err != nil {
		return nil, err
	}
	if a.sum != nil {
		if got := a.sum.digest(); got != a.diffID {
			return nil, fmt.Errorf("%w: uncompressed it has digest %s, the image's configuration says %s", index.ErrCorrupt, got, a.diffID)
		}
	}
	a.ended = true
	a.raw.tell(a.raw.n)
	return nil, io.EOF
}

func (a *archive) Close() error {
	if a.sum != nil {
		a.sum.close()
	}
	a.stream.Close()
	return a.blob.Close()
}

// countReader tells of progress, not more often than each MiB.
type countReader struct {
	r       io.Reader
	tell    func(int64)
	n, told int64
}

func (c *countReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	if c.n-c.told >= 1<<20 {
		c.told = c.n
		c.tell(c.n)
	}
	return n, err
}

// sum passes a stream on and takes its SHA-256 in a goroutine of its own, since
// all else about a layer waits for who reads its archive.
type sum struct {
	r      io.Reader
	buf    []byte
	full   chan []byte
	free   chan []byte
	result chan [32]byte
	closed bool
}

const sumSize = 256 << 10 // bytes handed over at once

func newSum(r io.Reader) *sum {
	s := &sum{r: r, full: make(chan []byte, 2), free: make(chan []byte, 3), result: make(chan [32]byte, 1)}
	for range cap(s.free) {
		s.free <- make([]byte, 0, sumSize)
	}
	s.buf = <-s.free
	go func() {
		h := sha256.New()
		for p := range s.full {
			h.Write(p)
			s.free <- p[:0]
		}
		s.result <- [32]byte(h.Sum(nil))
	}()
	return s
}

func (s *sum) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	for q := p[:n]; len(q) > 0; {
		k := min(len(q), sumSize-len(s.buf))
		s.buf, q = append(s.buf, q[:k]...), q[k:]
		if len(s.buf) == sumSize {
			s.full <- s.buf
			s.buf = <-s.free
		}
	}
	return n, err
}

// digest returns the digest of all that was read. Nothing may be read after.
func (s *sum) digest() string {
	s.full <- s.buf
	s.closed = true
	close(s.full)
	return fmt.Sprintf("sha256:%x", <-s.result)
}

// close ends the goroutine.
func (s *sum) close() {
	if !s.closed {
		s.closed = true
		close(s.full)
		<-s.result
	}
}
