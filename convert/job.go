package convert

import (
	"bytes"
	"sync"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// job is one chunk on its way from a layer to its spool.
type job struct {
	layer int
	raw   []byte // content
	done  chan struct{}

	// Set when done has received.
	zeros  bool // content is all zeros: the rest is not set
	digest chunk.Digest
	codec  chunk.Codec
	stored []byte // backed by buf, or by raw if not compressed; nil: some lower layer has it
	buf    []byte

	ino *index.Inode // gets an extent at off
	off int64
}

// budget is what the chunks on the way may take, content and compressed form;
// so a chunk of 16 MiB has 8 of them, one of 64 KiB up to 2048.
const budget = 256 << 20

// pool has the jobs of all layers, which bound a conversion's memory, and the
// workers.
type pool struct {
	free chan *job
	work chan *job
	wg   sync.WaitGroup
}

// newPool starts workers, which do job after job until stop is called.
func newPool(workers int, chunkSize uint32, do func(*job)) *pool {
	n := max(4, min(16*workers, budget/(2*int(chunkSize))))
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
	if j.zeros = isZero(j.raw); j.zeros {
		return
	}
	j.digest = chunk.Sum(chunk.BLAKE3, j.raw)
	if c.o.Dict.has(j.digest) || c.seen.below(j.digest, j.layer) {
		j.stored = nil
		return
	}
	var ok bool
	j.codec = c.o.Compressor
	if j.buf, ok = j.codec.Encode(j.buf[:0], j.raw); ok {
		j.stored = j.buf
	} else {
		j.codec, j.stored = chunk.None, j.raw
	}
}

var zeros [4096]byte

func isZero(p []byte) bool {
	for len(p) > len(zeros) {
		if !bytes.Equal(p[:len(zeros)], zeros[:]) {
			return false
		}
		p = p[len(zeros):]
	}
	return bytes.Equal(p, zeros[:len(p)])
}

// seen knows the lowest layer that has stored a chunk so far. It only saves
// work: which layer a chunk belongs to is decided when all have been read.
type seen struct {
	mu     sync.Mutex
	layers map[chunk.Digest]int
}

// below tells whether the layer or a lower one has stored the chunk.
func (s *seen) below(d chunk.Digest, layer int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	at, ok := s.layers[d]
	return ok && at <= layer
}

func (s *seen) add(d chunk.Digest, layer int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if at, ok := s.layers[d]; !ok || layer < at {
		if s.layers == nil {
			s.layers = map[chunk.Digest]int{}
		}
		s.layers[d] = layer
	}
}
