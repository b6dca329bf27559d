package fusedev

import (
	"syscall"
)

// handle answers one request. It returns what to write, in b or on the heap,
// or nil if there is nothing to write now: the request wants no answer, or
// became a miss that is answered later.
func (s *Server) handle(raw []byte, b *buffer) []byte {
	r, ok := parse(raw)
	if !ok {
		s.log.Error("fuse: malformed request", "bytes", len(raw))
		return nil
	}
	switch r.op {
	case opRead:
		return s.read(r, b)
	case opForget, opBatchForget, opNotifyReply:
		return nil // these have no answer
	case opInterrupt:
		// A reader got a signal, which may be any and says nothing about
		// whether the data is still wanted. ENOSYS: send no more of these.
		return errorReply(r.unique, syscall.ENOSYS)
	}
	n, errno := s.answer(r, b)
	if errno != 0 {
		return errorReply(r.unique, errno)
	}
	return b.reply(r.unique, n)
}

// answer fills the body of b for requests whose answer needs no data.
func (s *Server) answer(r request, b *buffer) (n int, errno syscall.Errno) {
	switch r.op {
	case opInit:
		return s.init(r, b)
	case opLookup:
		name := s.name + "\x00"
		if r.node != rootNode || string(r.arg) != name {
			return 0, syscall.ENOENT
		}
		p := b.zeroed(entryOutSize)
		ne.PutUint64(p[0:], fileNode)
		ne.PutUint64(p[16:], forever) // the name
		ne.PutUint64(p[24:], forever) // the attributes
		s.attr(p[40:], fileNode)
		return len(p), 0
	case opGetattr:
		p := b.zeroed(attrOutSize)
		ne.PutUint64(p[0:], forever)
		if !s.attr(p[16:], r.node) {
			return 0, syscall.ESTALE
		}
		return len(p), 0
	case opOpen:
		if r.node != fileNode {
			return 0, syscall.ESTALE
		}
		p := b.zeroed(openOutSize)
		ne.PutUint32(p[8:], s.openFlags)
		return len(p), 0
	case opStatfs:
		p := b.zeroed(statfsOutSize)
		ne.PutUint32(p[40:], pageSize) // bsize
		ne.PutUint32(p[44:], 255)      // namelen
		ne.PutUint32(p[48:], pageSize) // frsize
		return len(p), 0
	case opRelease, opReleasedir, opFlush, opAccess, opDestroy:
		return 0, 0
	}
	return 0, syscall.ENOSYS
}

// init answers INIT:
//
//	fuse_init_in   major, minor, max_readahead, flags, flags2 (since 7.36), all u32
//	fuse_init_out  major u32, minor u32, max_readahead u32, flags u32,
//	               max_background u16, congestion_threshold u16, max_write u32,
//	               time_gran u32, max_pages u16, map_alignment u16, flags2 u32, ...
func (s *Server) init(r request, b *buffer) (int, syscall.Errno) {
	if len(r.arg) < initInMinSize {
		return 0, syscall.EIO
	}
	major, minor, flags := ne.Uint32(r.arg), ne.Uint32(r.arg[4:]), uint64(ne.Uint32(r.arg[12:]))
	if major != 7 || minor < 28 { // 7.28 (Linux 4.20) brought max_pages
		s.log.Error("fuse: kernel protocol is not supported", "major", major, "minor", minor)
		return 0, syscall.EPROTO
	}
	if flags&flagInitExt != 0 && len(r.arg) >= initInMinSize+4 {
		flags |= uint64(ne.Uint32(r.arg[16:])) << 32
	}
	flags &= wantedFlags
	p := b.zeroed(initOutSize)
	ne.PutUint32(p[0:], 7)
	ne.PutUint32(p[4:], min(minor, 45))
	ne.PutUint32(p[8:], MaxRead)
	ne.PutUint32(p[12:], uint32(flags))
	ne.PutUint16(p[16:], maxBackground)
	ne.PutUint16(p[18:], maxBackground/4*3)
	ne.PutUint32(p[20:], maxWrite)
	ne.PutUint32(p[24:], 1) // time_gran, ns
	ne.PutUint16(p[28:], MaxRead/pageSize)
	ne.PutUint32(p[32:], uint32(flags>>32))
	return len(p), 0
}

// attr writes the struct fuse_attr of a node to p, which is cleared:
//
//	ino u64, size u64, blocks u64, atime u64, mtime u64, ctime u64, their
//	nsec 3*u32, mode u32, nlink u32, uid u32, gid u32, rdev u32, blksize u32, flags u32
func (s *Server) attr(p []byte, node uint64) bool {
	ne.PutUint64(p[0:], node)
	ne.PutUint32(p[80:], pageSize)
	switch node {
	case rootNode:
		ne.PutUint32(p[60:], syscall.S_IFDIR|0o500)
		ne.PutUint32(p[64:], 2)
	case fileNode:
		ne.PutUint64(p[8:], uint64(s.size))
		ne.PutUint64(p[16:], (uint64(s.size)+511)/512)
		ne.PutUint32(p[60:], syscall.S_IFREG|0o400)
		ne.PutUint32(p[64:], 1)
	default:
		return false
	}
	return true
}

// read answers a READ at once if all of its bytes are at hand, and makes it a
// miss otherwise.
func (s *Server) read(r request, b *buffer) []byte {
	if r.node != fileNode {
		return errorReply(r.unique, syscall.ESTALE)
	}
	if len(r.arg) < readInMinSize {
		return errorReply(r.unique, syscall.EIO)
	}
	start, n := ne.Uint64(r.arg[8:]), int64(ne.Uint32(r.arg[16:]))
	if start >= uint64(s.size) || n == 0 {
		return b.reply(r.unique, 0) // at or past the end of the file
	}
	off := int64(start)
	s.push.near(off)
	n = min(n, s.size-off)
	if n > MaxRead {
		return errorReply(r.unique, syscall.EIO) // INIT promised less
	}
	ok, err := s.content.TryReadAt(b.body(int(n)), off)
	switch {
	case err != nil:
		s.failed(off, int(n), err)
		return errorReply(r.unique, syscall.EIO)
	case !ok:
		s.misses.Add(1)
		s.startMiss(r.unique, off, int(n))
		return nil
	}
	s.hits.Add(1)
	return b.reply(r.unique, int(n))
}
