package fusedev

import (
	"fmt"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	// MaxRead is the largest READ in bytes, and so the largest p that a
	// Content is asked to fill: 256 pages, the kernel's own limit unless
	// fs.fuse.max_pages_limit was raised.
	MaxRead = 1 << 20

	pageSize = 4096

	// requestSize is the room for one request. The kernel wants at least
	// 8 KiB (FUSE_MIN_READ_BUFFER) and never sends more than that here,
	// since maxWrite is one page.
	requestSize = 16 << 10
	maxWrite    = pageSize
)

// buffer holds one reply: the header right before a page-aligned body, so that
// one write(2) of contiguous memory answers and the kernel copies whole pages.
//
//	0        4080     4096                4096 + MaxRead
//	| unused | header | body                            |
//
// The memory is not the Go heap's: it must not move under the kernel's feet,
// nor be scanned or zeroed by the runtime for each read.
type buffer struct{ mem []byte }

func newBuffer() (*buffer, error) {
	mem, err := mapPages(pageSize + MaxRead)
	if err != nil {
		return nil, err
	}
	return &buffer{mem}, nil
}

func mapPages(n int) ([]byte, error) {
	mem, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("fuse: map a buffer of %d bytes: %w", n, err)
	}
	return mem, nil
}

func (b *buffer) free() { _ = unix.Munmap(b.mem) }

// body returns the first n bytes of the body.
func (b *buffer) body(n int) []byte { return b.mem[pageSize : pageSize+n : pageSize+n] }

// zeroed is body, cleared: fixed-size answers leave most fields 0.
func (b *buffer) zeroed(n int) []byte {
	p := b.body(n)
	clear(p)
	return p
}

// reply completes the answer to a request with the first n bytes of the body
// and returns the bytes to write.
func (b *buffer) reply(unique uint64, n int) []byte {
	p := b.mem[pageSize-outHeaderSize : pageSize+n]
	putHeader(p, unique, 0)
	return p
}

// putHeader writes the header of the answer p, which tells its own length.
func putHeader(p []byte, unique uint64, errno syscall.Errno) {
	ne.PutUint32(p, uint32(len(p)))
	ne.PutUint32(p[4:], uint32(-int32(errno)))
	ne.PutUint64(p[8:], unique)
}

// errorReply answers a request with an error.
func errorReply(unique uint64, errno syscall.Errno) []byte {
	p := make([]byte, outHeaderSize)
	putHeader(p, unique, errno)
	return p
}

// spare keeps buffers for all servers of the process. How many are in use is bounded
// by each server's Threads and MaxInflight; how many idle, by maxSpare.
var spare struct {
	sync.Mutex
	list []*buffer
}

const maxSpare = 32

func getBuffer() (*buffer, error) {
	spare.Lock()
	if n := len(spare.list); n > 0 {
		b := spare.list[n-1]
		spare.list = spare.list[:n-1]
		spare.Unlock()
		return b, nil
	}
	spare.Unlock()
	return newBuffer()
}

func putBuffer(b *buffer) {
	spare.Lock()
	keep := len(spare.list) < maxSpare
	if keep {
		spare.list = append(spare.list, b)
	}
	spare.Unlock()
	if !keep {
		b.free()
	}
}
