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
)

// maxLayers is how many layers are read at once: each has a decompressor, and a
// zstd layer may want up to 128 MiB for its own.
const maxLayers = 8

// spool is a layer that was read: its changes, whose extents number its chunks,
// and the stored bytes of the chunks, one behind the other in a file.
type spool struct {
	name    string
	changes []index.Change
	chunks  []spooled
	holes   bool // some file has one, or a chunk of zeros, which is the same
	file    *os.File
}

// spooled is a chunk of a spool. If length is 0 a lower layer or the dictionary
// has it.
type spooled struct {
	digest chunk.Digest
	size   uint32
	length uint32
	codec  chunk.Codec
	off    int64
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
	c.pool = newPool(c.o.Workers, c.o.ChunkSize, c.digest)
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
		zeros, err = c.collect(number, sp, order)
		return err
	})
	err := g.Wait()
	sp.holes = sp.holes || zeros
	return err
}

// collect takes chunks in order and keeps each different one once.
func (c *converter) collect(number int, sp *spool, order <-chan *job) (zeros bool, _ error) {
	w := bufio.NewWriterSize(sp.file, 1<<20)
	own := map[chunk.Digest]uint32{}
	var off int64
	for j := range order {
		<-j.done
		if j.zeros {
			zeros = true
			c.pool.free <- j
			continue
		}
		n, ok := own[j.digest]
		if !ok {
			n = uint32(len(sp.chunks))
			own[j.digest] = n
			sp.chunks = append(sp.chunks, spooled{j.digest, uint32(len(j.raw)), uint32(len(j.stored)), j.codec, off})
			if _, err := w.Write(j.stored); err != nil {
				return false, err
			}
			if off += int64(len(j.stored)); len(j.stored) > 0 {
				c.seen.add(j.digest, number)
			}
		}
		j.ino.Extents = append(j.ino.Extents, index.Extent{Off: j.off, Chunk: n})
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
}

func (x *cutter) run() error {
	for {
		e, err := x.in.Next()
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
		x.sp.changes = append(x.sp.changes, e.Change)
	}
}

// file cuts a file at multiples of the chunk size. A chunk that no fragment of
// a sparse file touches is a hole and is left out.
func (x *cutter) file(e *layer.Entry) error {
	step, size := int64(x.c.o.ChunkSize), e.Inode.Size
	fragments := e.Fragments
	next := int64(0)
	for len(fragments) > 0 {
		off := fragments[0].Off / step * step
		end := min(off+step, size)
		x.sp.holes = x.sp.holes || off > next
		next = end
		j, err := x.get()
		if err != nil {
			return err
		}
		if cap(j.raw) == 0 {
			j.raw = make([]byte, 0, step)
		}
		j.raw = j.raw[:end-off]
		pos := off // raw is filled up to here
		for len(fragments) > 0 && fragments[0].Off < end {
			f := &fragments[0]
			clear(j.raw[pos-off : f.Off-off])
			n := min(f.Length, end-f.Off)
			if _, err := io.ReadFull(x.in, j.raw[f.Off-off:f.Off-off+n]); err != nil {
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
		j.layer, j.ino, j.off = x.layer, e.Inode, off
		x.order <- j
		x.c.pool.work <- j // has room for all jobs, too
	}
	x.sp.holes = x.sp.holes || next < size
	return nil
}

func (x *cutter) get() (*job, error) {
	select {
	case j := <-x.c.pool.free:
		return j, nil
	case <-x.ctx.Done():
		return nil, x.ctx.Err()
	}
}
