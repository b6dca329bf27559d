package scan

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"sync"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/layer"
)

// scanner walks a layer.
type scanner struct {
	ctx context.Context
	in  *layer.Reader
	l   *Layer

	job     *job // being filled
	free    chan *job
	work    chan *job
	workers sync.WaitGroup
	cut     uint32
	keep    func(chunk.Digest, []byte) error
	zeros   []bool // by chunk
	err     error  // of odd
}

// job is some content on its way to a worker and back.
type job struct {
	raw    []byte
	pieces []piece
	err    error
}

type piece struct {
	n      uint32 // the chunk's number
	size   int
	zeros  bool
	digest chunk.Digest
}

// jobSize is how much content makes a job, one chunk at least: enough for switching to
// cost nothing, small enough for the caches.
const jobSize = 256 << 10

func (x *scanner) start(o Options) {
	n := workers(o)
	x.keep, x.cut = o.Keep, cmp.Or(o.Cut, chunk.Size)
	x.free, x.work = make(chan *job, 4*n), make(chan *job, 4*n)
	for range 4 * n {
		x.free <- &job{}
	}
	for range n {
		x.workers.Go(func() {
			for j := range x.work {
				j.err = j.hash(x.keep)
				x.free <- j
			}
		})
	}
}

// hash is what workers do.
func (j *job) hash(keep func(chunk.Digest, []byte) error) error {
	raw := j.raw
	for i := range j.pieces {
		p := &j.pieces[i]
		b := raw[:p.size]
		raw = raw[p.size:]
		if p.zeros = chunk.IsZero(b); p.zeros {
			continue
		}
		p.digest = chunk.Sum(chunk.BLAKE3, b)
		if keep != nil {
			if err := keep(p.digest, b); err != nil {
				return err
			}
		}
	}
	return nil
}

// get returns a free job, and takes in what came of it before.
func (x *scanner) get() (*job, error) {
	j := <-x.free
	err := j.err
	for i := range j.pieces {
		p := &j.pieces[i]
		x.l.Chunks[p.n].Digest = p.digest
		x.zeros[p.n] = p.zeros
	}
	*j = job{raw: j.raw[:0], pieces: j.pieces[:0]}
	if err == nil {
		err = cmp.Or(x.err, x.ctx.Err())
	}
	return j, err
}

// stop waits for the workers.
func (x *scanner) stop() (err error) {
	if x.job != nil {
		x.work <- x.job
		x.job = nil
	}
	close(x.work)
	for range cap(x.free) {
		if _, e := x.get(); e != nil && err == nil {
			err = e
		}
	}
	x.workers.Wait()
	return err
}

func (x *scanner) run() error {
	for {
		e, err := x.in.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if e.Op == index.Add && e.Inode.IsRegular() {
			_, err := layer.Cut(x.in, e, int64(x.cut), func(p layer.Piece) ([]byte, func(), error) { return x.begin(e.Inode, p) })
			if err != nil {
				return fmt.Errorf("%s: %w", e.Path, err)
			}
		}
		x.l.Changes = append(x.l.Changes, e.Change)
	}
}

// begin returns room for a chunk, and what to call when it is there.
func (x *scanner) begin(ino *index.Inode, p layer.Piece) ([]byte, func(), error) {
	if x.job != nil && len(x.job.raw)+p.Size > cap(x.job.raw) {
		x.work <- x.job
		x.job = nil
	}
	if x.job == nil {
		j, err := x.get()
		if err != nil {
			x.free <- j // stop counts on it
			return nil, nil, err
		}
		if cap(j.raw) == 0 {
			j.raw = make([]byte, 0, max(jobSize, int(x.cut)))
		}
		x.job = j
	}
	j := x.job
	n := uint32(len(x.l.Chunks))
	ino.Extents = append(ino.Extents, index.Extent{Off: p.Off, Chunk: n})
	x.l.Chunks = append(x.l.Chunks, index.Chunk{Size: uint32(p.Size), Offset: p.At})
	x.zeros = append(x.zeros, false)
	j.pieces = append(j.pieces, piece{n: n, size: p.Size})
	at := len(j.raw)
	j.raw = j.raw[:at+p.Size]
	raw := j.raw[at:]
	if p.At >= 0 {
		return raw, func() {}, nil
	}
	return raw, func() { x.odd(n, raw) }, nil
}

// odd keeps a chunk that the layer has not in one piece.
func (x *scanner) odd(n uint32, raw []byte) {
	if chunk.IsZero(raw) {
		return
	}
	c := &x.l.Chunks[n]
	c.Blob = 1
	var err error
	if c.Offset, err = x.l.side.chunk(raw); err != nil && x.err == nil {
		x.err = err
	}
}

// finish makes holes of zeros.
func (x *scanner) finish() {
	for _, ch := range x.l.Changes {
		if ch.Inode == nil {
			continue
		}
		kept := ch.Inode.Extents[:0]
		for _, e := range ch.Inode.Extents {
			if !x.zeros[e.Chunk] {
				kept = append(kept, e)
			}
		}
		ch.Inode.Extents = kept
	}
}
