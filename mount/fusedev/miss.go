package fusedev

import (
	"container/list"
	"context"
	"sync"
	"syscall"
)

// miss is a READ whose bytes are not at hand. Exactly one of two answers it:
// the goroutine that runs ReadAt, or, when ctx ends first, the function that
// stop belongs to. So the deadline holds even if ReadAt forgets about ctx.
type miss struct {
	unique uint64
	off    int64
	n      int

	ctx     context.Context // ends at the miss's deadline or with the connection
	cancel  context.CancelFunc
	stop    func() bool   // true: the caller is the one who answers
	waiting *list.Element // in missQueue.waiting; nil once it runs
}

// missQueue runs at most max misses at a time; others wait in order of
// arrival. A waiting miss is about 200 bytes and has no buffer; the kernel
// keeps more than that for the request itself, so the queue needs no bound of
// its own, and the threads that read requests never wait for a place in it:
// they must go on to answer hits.
type missQueue struct {
	mu      sync.Mutex
	running int
	waiting list.List // of *miss
	workers sync.WaitGroup
}

func (s *Server) startMiss(unique uint64, off int64, n int) {
	m := &miss{unique: unique, off: off, n: n}
	m.ctx, m.cancel = context.WithTimeout(s.ctx, s.timeout)
	q := &s.queue
	q.mu.Lock()
	defer q.mu.Unlock()
	m.stop = context.AfterFunc(m.ctx, func() { s.expire(m) })
	if q.running == s.maxInflight {
		m.waiting = q.waiting.PushBack(m)
		return
	}
	q.running++
	q.workers.Go(func() { s.work(m) })
}

// next returns the miss that waits longest, or nil, and then the caller's
// place is given up.
func (q *missQueue) next() *miss {
	q.mu.Lock()
	defer q.mu.Unlock()
	e := q.waiting.Front()
	if e == nil {
		q.running--
		return nil
	}
	m := q.waiting.Remove(e).(*miss)
	m.waiting = nil
	return m
}

// work runs one miss, and then those that wait.
func (s *Server) work(m *miss) {
	b, err := getBuffer()
	for ; m != nil; m = s.queue.next() {
		if err == nil {
			s.runMiss(m, b)
		} else if m.stop() {
			s.failMiss(m, err)
		}
		m.cancel()
	}
	if b != nil {
		putBuffer(b)
	}
}

func (s *Server) runMiss(m *miss, b *buffer) {
	err := m.ctx.Err()
	if err == nil {
		err = s.content.ReadAt(m.ctx, b.body(m.n), m.off)
	}
	switch {
	case !m.stop(): // answered, or about to be, by expire
	case err != nil:
		s.failMiss(m, err)
	default:
		s.send(b.reply(m.unique, m.n))
	}
}

// expire answers a miss whose context ended before its ReadAt returned.
func (s *Server) expire(m *miss) {
	s.queue.mu.Lock()
	if m.waiting != nil {
		s.queue.waiting.Remove(m.waiting)
		m.waiting = nil
	}
	s.queue.mu.Unlock()
	s.failMiss(m, context.Cause(m.ctx))
	m.cancel()
}

func (s *Server) failMiss(m *miss, err error) {
	if s.ctx.Err() == nil { // else: nobody is left to be told
		s.failed(m.off, m.n, err)
		s.send(errorReply(m.unique, syscall.EIO))
	}
}
