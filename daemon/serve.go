package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime/debug"
	"time"

	"github.com/shale-image/shale/keeper"
)

// serve answers one connection.
func (s *server) serve(ctx context.Context, c *net.UnixConn) {
	defer c.Close()
	caller, err := keeper.Allowed(c)
	if err != nil {
		s.log.Warn("call refused", "err", err)
		return
	}
	end, err := s.begin()
	if err != nil {
		if !errors.Is(err, errEnding) { // that the client sees without a word
			s.refuse(c, err)
		}
		return
	}
	defer end()
	greeting, _ := json.Marshal(hello{protocol, s.cfg.Version})
	if send(c, helloTime, kindHello, greeting) != nil {
		return
	}
	buf := make([]byte, maxPacket+1)
	c.SetReadDeadline(time.Now().Add(helloTime))
	kind, body, files, err := receive(c, buf)
	closeAll(files)
	if err != nil || kind != kindRequest {
		return
	}
	c.SetReadDeadline(time.Time{})
	var q request
	if err := json.Unmarshal(body, &q); err != nil {
		s.log.Warn("bad request", "err", err)
		return
	}
	call, cancel := watchHangup(ctx, c)
	defer cancel()
	result, out, err := s.safely(call, c, caller, q)
	defer closeAll(out)
	if err != nil {
		if ctx.Err() != nil && errors.Is(err, context.Canceled) {
			if s.leaving() {
				return // the client asks the next one
			}
			err = errEnding
		}
		s.log.Info("call failed", "op", q.Op, "err", err)
		s.refuse(c, err)
		return
	}
	js, err := json.Marshal(result)
	if err != nil {
		s.log.Error("encode result", "op", q.Op, "err", err)
		return
	}
	if len(out) > 0 {
		if send(c, resultTime, kindPiece, nil, out...) != nil {
			return
		}
		closeAll(out) // what the client has may be unmounted: nothing here keeps it busy
	}
	for len(js) > maxPacket {
		if send(c, resultTime, kindPiece, js[:maxPacket]) != nil {
			return
		}
		js = js[maxPacket:]
	}
	if err := send(c, resultTime, kindResult, js); err != nil {
		s.log.Warn("reply", "op", q.Op, "err", err)
	}
}

// maxCalls bounds the calls being served at one time.
const maxCalls = 512

// begin counts a call until its end.
func (s *server) begin() (end func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.ending:
		return nil, errEnding
	case s.calls >= maxCalls:
		return nil, fmt.Errorf("the node service has %d calls to serve already: %w", s.calls, ErrBusy)
	}
	s.calls++
	return func() {
		s.mu.Lock()
		s.calls--
		s.last = time.Now()
		s.mu.Unlock()
	}, nil
}

// beginWork counts a call that must not be cut short by "stop".
func (s *server) beginWork() (end func()) {
	s.mu.Lock()
	s.work++
	s.mu.Unlock()
	return func() {
		s.mu.Lock()
		s.work--
		s.worked = true
		s.mu.Unlock()
	}
}

// refuse sends an error.
func (s *server) refuse(c *net.UnixConn, err error) {
	js, _ := json.Marshal(encodeError(err))
	send(c, resultTime, kindError, js)
}

// safely dispatches a request. One that panics must not take the mounts of
// all others along.
func (s *server) safely(ctx context.Context, c *net.UnixConn, caller keeper.Peer, q request) (result any, out []*os.File, err error) {
	defer func() {
		if p := recover(); p != nil {
			s.log.Error("call panicked", "op", q.Op, "panic", p, "stack", string(debug.Stack()))
			err = fmt.Errorf("internal error in %q: %v (the service's log has more)", q.Op, p)
		}
	}()
	return s.dispatch(ctx, c, caller, q)
}
