package reader

import (
	"cmp"
	"context"
	"errors"
	"io"
	"sync"
)

// spoolAhead is how much of an object a spool takes before somebody reads it:
// what arrives at 100 Mbit/s in the time that an image takes to be linked, and
// some.
const spoolAhead = 8 << 20

// spool reads an object as it arrives, whether or not its reader is ready for it.
type spool struct {
	cancel context.CancelFunc
	done   chan struct{} // the goroutine has ended

	mu    sync.Mutex
	cond  *sync.Cond
	parts [][]byte
	held  int
	err   error
}

var errSpoolClosed = errors.New("read after close")

// newSpool opens an object and begins to read it. The caller calls Close.
func newSpool(ctx context.Context, open func(context.Context) (io.ReadCloser, error)) *spool {
	s := &spool{done: make(chan struct{})}
	s.cond = sync.NewCond(&s.mu)
	ctx, s.cancel = context.WithCancel(ctx)
	go func() {
		defer close(s.done)
		defer s.cancel()
		s.end(s.fill(ctx, open))
	}()
	return s
}

func (s *spool) fill(ctx context.Context, open func(context.Context) (io.ReadCloser, error)) error {
	body, err := open(ctx)
	if err != nil {
		return err
	}
	defer body.Close()
	for {
		p := make([]byte, 64<<10)
		n, err := body.Read(p)
		s.mu.Lock()
		if n > 0 {
			s.parts, s.held = append(s.parts, p[:n]), s.held+n
			s.cond.Broadcast()
		}
		for s.held >= spoolAhead && s.err == nil {
			s.cond.Wait()
		}
		closed := s.err
		s.mu.Unlock()
		if err = cmp.Or(closed, err); err != nil {
			return err
		}
	}
}

func (s *spool) end(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		s.err = err
	}
	s.cond.Broadcast()
}

func (s *spool) Read(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.parts) == 0 && s.err == nil {
		s.cond.Wait()
	}
	if len(s.parts) == 0 || errors.Is(s.err, errSpoolClosed) {
		return 0, s.err
	}
	n := copy(p, s.parts[0])
	if s.parts[0] = s.parts[0][n:]; len(s.parts[0]) == 0 {
		s.parts = s.parts[1:]
	}
	s.held -= n
	s.cond.Broadcast()
	return n, nil
}

// Close ends the request. Who reads gets an error.
func (s *spool) Close() error {
	s.end(errSpoolClosed)
	s.mu.Lock()
	s.err = errSpoolClosed
	s.parts = nil
	s.mu.Unlock()
	s.cancel()
	<-s.done
	return nil
}
