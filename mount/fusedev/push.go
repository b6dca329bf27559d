package fusedev

import (
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

const (
	pushWindow = 128 << 10 // as much as the kernel's readahead would read, and aligned
	pushUnit   = 16 << 10  // what is pushed if all of it is at hand
	pushAhead  = 512 << 10 // at most, for who reads one window after the other
	pushQueue  = 64        // windows that wait; others are passed over

	storeOutSize = 24 // nodeid u64, offset u64, size u32, padding u32
	invalOutSize = 24 // ino u64, off s64, len s64

	// forgetEvery is how often pages of the served file are given back to the
	// kernel that EROFS has a copy of.
	forgetEvery = 10 * time.Second
)

// pusher gives the kernel pages that lie around those it asks for, if they are at
// hand. It does what readahead would, but for what is missing: that a reader of
// readahead would have to wait for. It has to do so as long as there is a file that the
// kernel has opened with no readahead.
//
// Storing a page waits for its lock, which whoever reads that page holds until we
// have answered. So no thread that reads requests ever does it, and what finds the
// queue full is not done.
type pusher struct {
	server *Server
	around Around
	queue  chan int64 // where READs were
	steady atomic.Bool
	used   atomic.Bool // there were READs since the last time

	forgetting atomic.Bool

	pushed  []uint64   // bits, by unit
	streams [16]stream // of those who read lately
	oldest  int
}

// stream is somebody who may read one page after the other.
type stream struct {
	next  int64 // where the next READ would be
	ahead int64 // bytes that were pushed last
}

// near notes a READ at off.
func (p *pusher) near(off int64) {
	if p == nil {
		return
	}
	if !p.used.Load() {
		p.used.Store(true)
	}
	select {
	case p.queue <- off:
	default:
	}
}

// run pushes until the connection ends.
func (p *pusher) run() {
	b, err := newBuffer()
	if err != nil {
		p.server.log.Warn("fuse: pages are not pushed", "err", err)
		return
	}
	defer b.free()
	p.pushed = make([]uint64, p.server.size/pushUnit/64+1)
	tick := time.NewTicker(forgetEvery)
	defer tick.Stop()
	for {
		select {
		case off := <-p.queue:
			if p.steady.Load() {
				p.follow(off, b)
			} else {
				lo := off &^ (pushWindow - 1)
				p.extent(off, lo, lo+pushWindow, b)
			}
		case <-tick.C:
			if p.steady.Load() && p.used.Swap(false) && !p.forgetting.Swap(true) {
				clear(p.pushed)
				go p.forget()
			}
		case <-p.server.ctx.Done():
			return
		}
	}
}

// follow pushes for who reads one page after the other, further and further.
func (p *pusher) follow(off int64, b *buffer) {
	u := off / pushUnit
	if p.pushed[u/64]>>(u%64)&1 != 0 {
		return // while this READ was on its way
	}
	for i := range p.streams {
		if s := &p.streams[i]; s.next == off {
			s.ahead = min(max(2*s.ahead, pushUnit), pushAhead)
			s.next = p.extent(off, off, off+s.ahead, b)
			return
		}
	}
	p.streams[p.oldest] = stream{next: off + pageSize}
	p.oldest = (p.oldest + 1) % len(p.streams)
}

// extent pushes what is at hand in [lo, hi), of what belongs together with off, and was not
// pushed before; and, since the kernel has asked for it, what lies right there. It returns
// the end.
func (p *pusher) extent(off, lo, hi int64, b *buffer) int64 {
	here := off / pushUnit
	lo, hi = p.around.Extent(off, lo, min(hi, p.server.size))
	first, last := (lo+pushUnit-1)/pushUnit, hi/pushUnit
	var from, to int64 // bytes of the body that are to be pushed
	base := first * pushUnit
	for u := first; u < last; u++ {
		word, bit := &p.pushed[u/64], uint64(1)<<(u%64)
		at := u*pushUnit - base
		if (u == here || *word&bit == 0) && p.around.Peek(b.body(pushAhead)[at:at+pushUnit], u*pushUnit) {
			*word |= bit
			if to < at {
				p.store(b, base, from, to)
				from = at
			}
			to = at + pushUnit
		}
	}
	p.store(b, base, from, to)
	return last * pushUnit
}

// store gives the kernel the bytes [from, to) of the body, which begins at base.
func (p *pusher) store(b *buffer, base, from, to int64) {
	if from == to {
		return
	}
	// The header lies over what was pushed before.
	const head = outHeaderSize + storeOutSize
	m := b.mem[pageSize-head+from : pageSize+to]
	putNotification(m, notifyStore)
	ne.PutUint64(m[16:], fileNode)
	ne.PutUint64(m[24:], uint64(base+from))
	ne.PutUint32(m[32:], uint32(to-from))
	ne.PutUint32(m[36:], 0)
	p.server.notify(m)
}

// forget has the kernel drop all pages of the file. It waits for those that somebody waits
// for, perhaps for long.
func (p *pusher) forget() {
	defer p.forgetting.Store(false)
	var m [outHeaderSize + invalOutSize]byte
	putNotification(m[:], notifyInvalInode)
	ne.PutUint64(m[16:], fileNode)
	p.server.notify(m[:])
}

// notify writes a notification. That is a matter of speed only.
func (s *Server) notify(m []byte) {
	s.conn.RLock()
	defer s.conn.RUnlock()
	if s.conn.fd >= 0 {
		_, _ = unix.Write(s.conn.fd, m)
	}
}
