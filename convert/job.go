package convert

import (
	"slices"
	"sync"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// job is a chunk, or a batch of small files, on its way from a layer to its
// spool.
type job struct {
	layer, number int    // of the job in its layer
	raw           []byte // content of all pieces, later of those that are kept
	pieces        []piece
	done          chan struct{}

	// Set when done has received.
	codec  chunk.Codec // of stored; None: pieces are stored as they are
	stored []byte      // backed by buf, or by raw
	buf    []byte
}

// piece is a chunk of a job.
type piece struct {
	ino  *index.Inode // gets an extent at off
	off  int64
	size uint32

	zeros  bool // content is all zeros: the rest is not set
	digest chunk.Digest
	kept   bool // it is in raw: nothing is known to have it before
}

// add makes room for a piece.
func (j *job) add(ino *index.Inode, off int64, size int) []byte {
	j.pieces = append(j.pieces, piece{ino: ino, off: off, size: uint32(size)})
	n := len(j.raw)
	j.raw = j.raw[:n+size]
	return j.raw[n:]
}

// budget is what the batches on the way may take, content and compressed form;
// so of 16 MiB there may be 8 of them, of 512 KiB up to 256.
const budget = 256 << 20

// pool has the jobs of all layers, which bound a conversion's memory, and the
// workers.
type pool struct {
	free chan *job
	work chan *job
	wg   sync.WaitGroup
}

// newPool starts workers, which do job after job until stop is called.
func newPool(workers int, batch uint32, do func(*job)) *pool {
	n := max(4, min(16*workers, budget/(2*int(batch))))
	p := &pool{free: make(chan *job, n), work: make(chan *job, n)}
	for range n {
		p.free <- &job{done: make(chan struct{}, 1)}
	}
	for range min(workers, n) {
		p.wg.Go(func() {
			for j := range p.work {
				do(j)
				j.done <- struct{}{}
			}
		})
	}
	return p
}

// stop waits for the workers to finish what they have. Nothing may be put in
// any more.
func (p *pool) stop() {
	close(p.work)
	p.wg.Wait()
}

// digest does a job: it looks for zeros and for content that is there already,
// and compresses what is left.
func (c *converter) digest(j *job) {
	kept := j.raw[:0]
	for off, i := 0, 0; i < len(j.pieces); i++ {
		p := &j.pieces[i]
		raw := j.raw[off : off+int(p.size)]
		off += int(p.size)
		if p.zeros = chunk.IsZero(raw); p.zeros {
			continue
		}
		p.digest = chunk.Sum(chunk.BLAKE3, raw)
		if p.kept = !c.o.Dict.has(p.digest) && c.seen.first(p.digest, place{j.layer, j.number, i}); p.kept {
			kept = append(kept, raw...)
		}
	}
	j.raw = kept
	j.codec, j.stored, j.buf = c.encode(j.buf, j.raw)
}

// encode compresses content, if that makes it smaller. buf is memory for the
// result.
func (c *converter) encode(buf, raw []byte) (codec chunk.Codec, stored, mem []byte) {
	buf, ok := c.o.Compressor.Encode(buf[:0], raw)
	if !ok {
		return chunk.None, raw, buf
	}
	return c.o.Compressor, buf, buf
}

// place is where a chunk first comes up: layer, job in the layer, piece of it.
type place [3]int

func (p place) before(q place) bool { return slices.Compare(p[:], q[:]) < 0 }

// seen knows the first place of each chunk so far. It only saves work: that a
// chunk is kept where it first comes up, and nowhere else, is made sure when all
// layers have been read.
type seen struct {
	mu     sync.Mutex
	places map[chunk.Digest]place
}

// first enters a place of a chunk and tells whether none is known before it.
func (s *seen) first(d chunk.Digest, at place) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p, ok := s.places[d]; ok && p.before(at) {
		return false
	}
	if s.places == nil {
		s.places = map[chunk.Digest]place{}
	}
	s.places[d] = at
	return true
}
