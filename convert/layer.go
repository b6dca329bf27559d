package convert

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"

	"golang.org/x/sync/errgroup"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/layer"
)

// job is one chunk on its way from the archive to the spool.
type job struct {
	raw    []byte // content, then free for reuse
	digest chunk.Digest
	codec  chunk.Codec
	stored []byte // backed by buf, or by raw if not compressed
	buf    []byte
	done   chan struct{} // receives when digest, codec and stored are set

	ino *index.Inode // gets an extent at off
	off int64
}

// newJobs makes the chunks that one layer has on the way at once: they bound
// its memory.
func (c *converter) newJobs() chan *job {
	n := 4*c.o.Workers + 4
	free := make(chan *job, n)
	for range n {
		free <- &job{raw: make([]byte, 0, c.o.ChunkSize), done: make(chan struct{}, 1)}
	}
	return free
}

// worker digests and compresses.
func (c *converter) worker(ctx context.Context) error {
	for j := range c.work {
		if ctx.Err() == nil {
			j.digest = chunk.Sum(chunk.BLAKE3, j.raw)
			var ok bool
			j.codec = c.o.Compressor
			if j.buf, ok = j.codec.Encode(j.buf[:0], j.raw); ok {
				j.stored = j.buf
			} else {
				j.codec, j.stored = chunk.None, j.raw
			}
		}
		j.done <- struct{}{}
	}
	return nil
}

// layerSpool is a layer that was read: its changes, whose extents number its
// chunks, and the stored bytes of the chunks.
type layerSpool struct {
	changes []index.Change
	chunks  []spooled
	file    *os.File
}

// spooled is a chunk in a spool file, where they lie one behind the other.
type spooled struct {
	digest chunk.Digest
	size   uint32
	length uint32
	codec  chunk.Codec
}

// readLayer reads a layer in one pass.
func (c *converter) readLayer(ctx context.Context, number int, d image.Descriptor) (_ *layerSpool, err error) {
	blob, err := c.src.Blob(ctx, d)
	if err != nil {
		return nil, err
	}
	defer blob.Close()
	counted := &countReader{r: blob, tell: func(n int64) {
		c.o.Progress(Event{Layer: number, What: "read", Done: n, Total: d.Size})
	}}
	stream, _, err := layer.Decompress(counted)
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	file, err := os.CreateTemp(c.tmp, "spool-")
	if err != nil {
		return nil, err
	}
	os.Remove(file.Name())
	sp := &layerSpool{file: file}
	defer func() {
		if err != nil {
			file.Close()
		}
	}()

	g, ctx := errgroup.WithContext(ctx)
	free, order := c.newJobs(), make(chan *job, 4*c.o.Workers+4)
	g.Go(func() error { return sp.collect(order, free) })
	g.Go(func() error {
		defer close(order)
		cut := &cutter{c: c, ctx: ctx, free: free, order: order, tar: layer.NewReader(stream, d.Digest, layer.Limits{})}
		if err := cut.run(&sp.changes); err != nil {
			return err
		}
		// The archive may end before its stream does, and the stream before
		// the blob: only the last byte proves the digest.
		if _, err := io.Copy(io.Discard, stream); err != nil {
			return err
		}
		_, err := io.Copy(io.Discard, counted)
		return err
	})
	if err := g.Wait(); err != nil {
		return nil, err
	}
	counted.tell(d.Size)
	return sp, nil
}

// collect takes chunks in order and keeps each different one once.
func (sp *layerSpool) collect(order <-chan *job, free chan<- *job) error {
	w := bufio.NewWriterSize(sp.file, 1<<20)
	seen := map[chunk.Digest]uint32{}
	var failed error
	for j := range order {
		<-j.done
		n, ok := seen[j.digest]
		if !ok && failed == nil {
			n = uint32(len(sp.chunks))
			seen[j.digest] = n
			sp.chunks = append(sp.chunks, spooled{j.digest, uint32(len(j.raw)), uint32(len(j.stored)), j.codec})
			_, failed = w.Write(j.stored)
		}
		j.ino.Extents = append(j.ino.Extents, index.Extent{Off: j.off, Chunk: n})
		free <- j
	}
	if failed == nil {
		failed = w.Flush()
	}
	return failed
}

// cutter walks an archive and cuts the data of its files.
type cutter struct {
	c     *converter
	ctx   context.Context
	tar   *layer.Reader
	free  <-chan *job
	order chan<- *job
}

func (x *cutter) run(changes *[]index.Change) error {
	for {
		e, err := x.tar.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if e.Op == index.Add && e.Inode.IsRegular() {
			if err := x.file(e); err != nil {
				return fmt.Errorf("%s: %w", e.Path, err)
			}
		}
		*changes = append(*changes, e.Change)
	}
}

// file cuts a file at multiples of the chunk size. A chunk that no fragment of
// a sparse file touches is a hole and is left out.
func (x *cutter) file(e *layer.Entry) error {
	step, size := int64(x.c.o.ChunkSize), e.Inode.Size
	fragments := e.Fragments
	for len(fragments) > 0 {
		off := fragments[0].Off / step * step
		end := min(off+step, size)
		j, err := x.get()
		if err != nil {
			return err
		}
		j.raw = j.raw[:end-off]
		pos := off // raw is filled up to here
		for len(fragments) > 0 && fragments[0].Off < end {
			f := &fragments[0]
			clear(j.raw[pos-off : f.Off-off])
			n := min(f.Length, end-f.Off)
			if _, err := io.ReadFull(x.tar, j.raw[f.Off-off:f.Off-off+n]); err != nil {
				return err
			}
			pos = f.Off + n
			if f.Length == n {
				fragments = fragments[1:]
			} else {
				f.Off, f.Length = f.Off+n, f.Length-n
			}
		}
		clear(j.raw[pos-off:])
		j.ino, j.off = e.Inode, off
		x.put(j)
	}
	return nil
}

func (x *cutter) get() (*job, error) {
	select {
	case j := <-x.free:
		return j, nil
	case <-x.ctx.Done():
		return nil, x.ctx.Err()
	}
}

// put hands a job to the workers and, in its turn, to the collector. A job the
// collector knows of must become done: the workers outlive all layers.
func (x *cutter) put(j *job) {
	x.order <- j // has room for all jobs of the layer
	x.c.work <- j
}

// countReader tells of progress, not more often than each MiB.
type countReader struct {
	r    io.Reader
	tell func(int64)
	n    int64
	told int64
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
