package convert

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"

	"golang.org/x/sync/errgroup"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/convert/source"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/layer"
	"github.com/shale-image/shale/index/rafs"
)

// maxLayers is how many layers are read at once: each has a decompressor, and a
// zstd layer may want up to 128 MiB for its own.
const maxLayers = 8

// spool is a layer that was read: its changes, whose extents number its chunks,
// and the batches of those that nothing was known to have before, one behind the
// other in a file.
type spool struct {
	name    string
	changes []index.Change
	chunks  []rafs.Piece // all of the layer, each once
	batches []batch
	holes   bool // some file has one, or a chunk of zeros, which is the same
	file    *os.File
	size    int64 // of file
}

// batch is what was compressed together. Without a codec its chunks are stored
// one behind the other.
type batch struct {
	chunks []uint32 // of the spool
	size   int      // bytes of content
	codec  chunk.Codec
	off    int64
	length int
}

// readLayers reads all layers in parallel, with one set of workers for all.
func (c *converter) readLayers(ctx context.Context) ([]*spool, error) {
	spools := make([]*spool, len(c.img.Layers))
	for i, l := range c.img.Layers {
		f, err := c.scratch()
		if err != nil {
			return nil, err
		}
		spools[i] = &spool{name: l.Name, file: f}
	}
	c.pool = newPool(c.o.Workers, max(c.o.BatchSize, c.o.ChunkSize), c.digest)
	defer c.pool.stop()
	g, ctx := errgroup.WithContext(ctx)
	// A layer that waits for its network holds a job: two for each go round.
	g.SetLimit(min(max(2, c.o.Workers), maxLayers, cap(c.pool.free)/2))
	for i, l := range c.img.Layers {
		g.Go(func() error {
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := c.readLayer(ctx, i, l, spools[i]); err != nil {
				return fmt.Errorf("%s: %w", l.Name, err)
			}
			return nil
		})
	}
	return spools, g.Wait()
}

// readLayer reads a layer in one pass.
func (c *converter) readLayer(ctx context.Context, number int, l source.Layer, sp *spool) error {
	g, ctx := errgroup.WithContext(ctx)
	// Room for all jobs there are: who puts one in never waits for the collector.
	order := make(chan *job, cap(c.pool.free))
	g.Go(func() error {
		defer close(order)
		ctx, cancel := context.WithCancel(ctx)
		entries, err := l.Open(ctx, func(n int64) {
			c.o.Progress(Event{Layer: number, What: "read", Done: n, Total: l.Size})
		})
		if err != nil {
			cancel()
			return err
		}
		defer entries.Close()
		defer cancel() // first: a read that waits must end
		cut := &cutter{c: c, ctx: ctx, layer: number, order: order, in: entries, sp: sp}
		return cut.run()
	})
	var zeros bool
	g.Go(func() (err error) {
		zeros, err = c.collect(sp, order)
		return err
	})
	err := g.Wait()
	sp.holes = sp.holes || zeros
	return err
}

// collect takes batches in order.
func (c *converter) collect(sp *spool, order <-chan *job) (zeros bool, _ error) {
	w := bufio.NewWriterSize(sp.file, 1<<20)
	numbers := map[chunk.Digest]uint32{}
	for j := range order {
		<-j.done
		b := batch{size: len(j.raw), codec: j.codec, off: sp.size, length: len(j.stored)}
		for i := range j.pieces {
			p := &j.pieces[i]
			if p.zeros {
				zeros = true
				continue
			}
			n, ok := numbers[p.digest]
			if !ok {
				n = uint32(len(sp.chunks))
				numbers[p.digest] = n
				sp.chunks = append(sp.chunks, rafs.Piece{Size: p.size, Digest: p.digest})
			}
			if p.kept {
				b.chunks = append(b.chunks, n)
			}
			p.ino.Extents = append(p.ino.Extents, index.Extent{Off: p.off, Chunk: n})
		}
		if len(b.chunks) > 0 {
			sp.batches = append(sp.batches, b)
			if _, err := w.Write(j.stored); err != nil {
				return false, err
			}
			sp.size += int64(len(j.stored))
		}
		c.pool.free <- j
	}
	return zeros, w.Flush()
}

// cutter walks a layer and cuts the data of its files.
type cutter struct {
	c     *converter
	ctx   context.Context
	layer int
	order chan<- *job
	in    source.Reader
	sp    *spool
	batch *job // being filled, if any
	jobs  int  // submitted so far
}

func (x *cutter) run() error {
	for {
		e, err := x.in.Next()
		if err == io.EOF {
			if x.batch != nil {
				x.submit(x.batch)
			}
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
		x.sp.changes = append(x.sp.changes, e.Change)
	}
}

// file cuts a file. A chunk that no fragment of a sparse file touches is a hole
// and is left out.
func (x *cutter) file(e *layer.Entry) error {
	holes, err := layer.Cut(x.in, e, int64(x.c.o.ChunkSize), func(p layer.Piece) ([]byte, func(), error) {
		return x.piece(e.Inode, p.Off, p.Size)
	})
	x.sp.holes = x.sp.holes || holes
	return err
}

// piece returns room for a chunk of a file, and what to call when it is filled.
// Files smaller than a chunk share batches. Larger ones do not: their chunks are
// read one by one, and Nydus fails where a read meets two chunks of a batch.
func (x *cutter) piece(ino *index.Inode, off int64, size int) (raw []byte, done func(), _ error) {
	if ino.Size >= int64(x.c.o.ChunkSize) {
		j, err := x.get()
		if err != nil {
			return nil, nil, err
		}
		return j.add(ino, off, size), func() { x.submit(j) }, nil
	}
	if x.batch != nil && len(x.batch.raw)+size > int(x.c.o.BatchSize) {
		x.submit(x.batch)
		x.batch = nil
	}
	if x.batch == nil {
		j, err := x.get()
		if err != nil {
			return nil, nil, err
		}
		x.batch = j
	}
	return x.batch.add(ino, off, size), func() {}, nil
}

// get returns an empty job.
func (x *cutter) get() (*job, error) {
	select {
	case j := <-x.c.pool.free:
		if cap(j.raw) == 0 {
			j.raw = make([]byte, 0, max(x.c.o.BatchSize, x.c.o.ChunkSize))
		}
		j.raw, j.pieces, j.layer = j.raw[:0], j.pieces[:0], x.layer
		return j, nil
	case <-x.ctx.Done():
		return nil, x.ctx.Err()
	}
}

// submit hands a job on.
func (x *cutter) submit(j *job) {
	j.number = x.jobs
	x.jobs++
	x.order <- j
	x.c.pool.work <- j // has room for all jobs, too
}
