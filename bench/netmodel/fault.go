package netmodel

import (
	"context"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// Fault is what is to go wrong with one response. The zero Fault is nothing.
type Fault struct {
	// Wait is how long nothing happens at first. If Drop is set the connection is
	// broken off then.
	Wait time.Duration
	Drop bool

	// Status, if not 0, is answered without asking the registry, with Header
	// (say, a Retry-After) and Body.
	Status int
	Header http.Header
	Body   []byte

	// Ask changes the request before the registry gets it, Answer what the
	// registry answers before the client does; either may be nil. A Body that
	// Answer puts in place of another reads from that one.
	Ask    func(*http.Request)
	Answer func(*http.Response)

	// Flip lists offsets in the object, not in the response, at which the
	// lowest bit is inverted; a ranged response flips those in its range.
	Flip []int64

	// After counts body bytes of the response: once they are sent, Truncate
	// breaks the connection off, and Stall lets nothing through for a while.
	After    int64
	Truncate bool
	Stall    time.Duration

	Reset bool    // what breaks the connection off is a reset, not its end
	Rate  float64 // bytes of the body a second, at most; 0 is no limit
}

// exchange is one request on its way.
type exchange struct {
	start   time.Time
	request Request
	fault   Fault
}

// copy gives the response's body to the client, through the link and as the
// fault wants it.
func (e *exchange) copy(ctx context.Context, w http.ResponseWriter, resp *http.Response, s sender) error {
	buf := make([]byte, piece)
	off := bodyOffset(resp)
	for {
		room := buf
		pending := e.fault.Truncate || e.fault.Stall > 0
		if left := e.fault.After - e.request.Down; pending && left < int64(len(room)) {
			room = room[:max(left, 0)]
		}
		if pending && len(room) == 0 {
			if err := e.fail(ctx, w); err != nil {
				return err
			}
			continue
		}
		n, err := io.ReadFull(resp.Body, room)
		if n > 0 {
			p := room[:n]
			for _, k := range e.fault.Flip {
				if i := k - off; i >= 0 && i < int64(n) {
					p[i] ^= 1
				}
			}
			if err := s.wait(ctx, n); err != nil {
				return err
			}
			if e.fault.Rate > 0 {
				if err := sleep(ctx, time.Duration(float64(n)/e.fault.Rate*float64(time.Second))); err != nil {
					return err
				}
			}
			if _, err := w.Write(p); err != nil {
				return err
			}
			if e.request.Down == 0 {
				e.request.FirstByte = time.Since(e.start)
			}
			e.request.Down += int64(n)
			off += int64(n)
		}
		switch err {
		case nil:
		case io.EOF, io.ErrUnexpectedEOF:
			// The transport tells an early end by the latter, but so does
			// ReadFull a short last piece; the length says which it was.
			if want := resp.ContentLength; want >= 0 && e.request.Down < want {
				return errBroken
			}
			return nil
		default:
			return err
		}
	}
}

// fail does what is due after fault.After bytes. Stalling is done once.
func (e *exchange) fail(ctx context.Context, w http.ResponseWriter) error {
	// What was sent so far must not stay in the server's buffer.
	if err := http.NewResponseController(w).Flush(); err != nil {
		return err
	}
	err := sleep(ctx, e.fault.Stall)
	e.fault.Stall = 0
	if err == nil && e.fault.Truncate {
		err = errBroken
	}
	return err
}

// bodyOffset returns where in the object the body begins.
func bodyOffset(resp *http.Response) int64 {
	r, ok := strings.CutPrefix(resp.Header.Get("Content-Range"), "bytes ")
	if !ok || resp.StatusCode != http.StatusPartialContent {
		return 0
	}
	first, _, _ := strings.Cut(r, "-")
	n, err := strconv.ParseInt(first, 10, 64)
	if err != nil {
		return 0
	}
	return n
}
