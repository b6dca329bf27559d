package fusetree

import (
	"context"
	"errors"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Read implements fuse.RawFileSystem.
func (s *Server) Read(c cancel, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	nid := s.nid(in.NodeId)
	n, err := s.read(c, nid, buf[:min(len(buf), int(in.Size))], int64(in.Offset))
	if err != nil {
		if s.ctx.Err() == nil { // else: nobody is left to be told
			s.failed(nid, "read", err)
		}
		return nil, fuse.EIO
	}
	return fuse.ReadResultData(buf[:n]), fuse.OK
}

// read fills p from the file at off, up to the end of the file.
func (s *Server) read(c cancel, nid uint64, p []byte, off int64) (n int, err error) {
	pieces, err := s.nodes.Map(nid, off, int64(len(p)))
	if err != nil {
		return 0, err
	}
	if err := s.ctx.Err(); err != nil {
		return 0, err
	}
	var ctx context.Context
	for _, piece := range pieces {
		q := p[n:][:piece.Length]
		n += len(q)
		if piece.Flat < 0 {
			clear(q)
			continue
		}
		if ctx == nil {
			ok, err := s.content.TryReadAt(q, piece.Flat)
			if err != nil {
				return 0, err
			}
			if ok {
				continue
			}
			var done func()
			ctx, done = s.patience(c)
			defer done()
			s.misses.Add(1)
		}
		if err := s.content.ReadAt(ctx, q, piece.Flat); err != nil {
			return 0, err
		}
	}
	if ctx == nil {
		s.hits.Add(1)
	}
	return n, nil
}

var errTimeout = errors.New("the bytes did not come in time")

// patience is the context of a read that has to wait: it ends after
// Options.ReadTimeout, or with the connection.
//
// The library closes c for two reasons. One is that the reader got a signal:
// it may be any, and page faults and other readers may wait for the same page,
// so it does not matter. The other is the connection's end.
func (s *Server) patience(c cancel) (context.Context, func()) {
	ctx, cancel := context.WithTimeoutCause(s.ctx, s.o.ReadTimeout, errTimeout)
	go func() {
		select {
		case <-c:
		case <-ctx.Done():
			return
		}
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for !s.ended() {
			select {
			case <-tick.C:
			case <-ctx.Done():
				return
			}
		}
		s.cancel()
	}()
	return ctx, cancel
}

// ended tells whether the connection has ended.
func (s *Server) ended() bool {
	fds := []unix.PollFd{{Fd: int32(s.dev.Load().Fd())}}
	n, err := unix.Poll(fds, 0)
	return n > 0 && err == nil && fds[0].Revents&unix.POLLERR != 0
}
