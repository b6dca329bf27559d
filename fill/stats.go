package fill

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/shale-image/shale/link"
)

// Stats is what an image has read and fetched since it was opened.
type Stats struct {
	ReadBytes    int64     `json:"read_bytes"`    // served to the face
	Requests     int64     `json:"requests"`      // ranged requests made
	FetchedBytes int64     `json:"fetched_bytes"` // asked for in them
	Chunks       int64     `json:"chunks"`        // chunks brought by them
	ContentBytes int64     `json:"content_bytes"` // what those chunks decode to
	PackBytes    int64     `json:"pack_bytes"`    // of content that came by a start pack
	PackWaits    int64     `json:"pack_waits"`    // reads that waited for the pack alone
	Stalls       int64     `json:"stalls"`        // reads that waited for a request
	Errors       int64     `json:"errors"`
	LastErrors   []Failure `json:"last_errors,omitempty"` // oldest first, at most 8
}

// Failure is a fetch that failed.
type Failure struct {
	Time  time.Time `json:"time"`
	Error string    `json:"error"`
}

type stats struct {
	readBytes, requests, fetched, chunks, content, errors atomic.Int64
	packBytes, packWaits, stalls                          atomic.Int64
	missed                                                atomic.Int64 // Unix time in ns, see LastMiss

	mu   sync.Mutex
	last []Failure
}

func (s *stats) read(n int) { s.readBytes.Add(int64(n)) }

func (s *stats) request(n int64) {
	s.requests.Add(1)
	s.fetched.Add(n)
}

func (s *stats) filled(c link.Chunk) {
	s.chunks.Add(1)
	s.content.Add(int64(c.Size))
}

func (s *stats) landed(n int64) { s.packBytes.Add(n) }

// waited notes what a read waited for.
func (s *stats) waited(pack, request bool) {
	switch {
	case request:
		s.stalls.Add(1)
		s.missed.Store(time.Now().UnixNano())
	case pack:
		s.packWaits.Add(1)
	}
}

func (s *stats) fail(err error) {
	s.errors.Add(1)
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.last) == 8 {
		s.last = s.last[1:]
	}
	s.last = append(s.last, Failure{time.Now(), err.Error()})
}

// Stats returns a snapshot.
func (im *Image) Stats() Stats {
	s := &im.stats
	s.mu.Lock()
	last := append([]Failure(nil), s.last...)
	s.mu.Unlock()
	return Stats{
		ReadBytes: s.readBytes.Load(), Requests: s.requests.Load(), FetchedBytes: s.fetched.Load(),
		Chunks: s.chunks.Load(), ContentBytes: s.content.Load(),
		PackBytes: s.packBytes.Load(), PackWaits: s.packWaits.Load(), Stalls: s.stalls.Load(), Errors: s.errors.Load(), LastErrors: last,
	}
}
