package fill

import (
	"bytes"
	"container/list"
	"context"
	"io"
	"sync"
	"time"

	"github.com/shale-image/shale/index"
)

// What is kept of one image: so many bytes, and for so long after the last of them has
// come. The largest span that is has edgeSize bytes stored.
const (
	edgesMemory = 8 << 20
	edgesTime   = 10 * time.Second
	edgeSize    = 256 << 10
)

// edgesPatience is how long a request stands back for another one that brings its edges.
const edgesPatience = 100 * time.Millisecond

// edges keep what requests have brought at their ends of spans that they needed a part
// of: a block of a layer ends anywhere in a chunk, and who reads the next chunk, or the one
// before, would fetch the same block again, 8% of what a start fetches from gzip layers
// and 14% from zstd. What is kept is as it is stored, so it proves to be right or wrong each
// time it is used as what comes from the network does.
type edges struct {
	mu    sync.Mutex
	known map[int]*list.Element
	order list.List // of *edge, used last first
	size  int
	over  *time.Timer

	coming map[int]chan struct{} // spans that a request is to bring and keep; closed when it ends
}

// settle waits for requests that are to bring the first or the last of some spans, so that
// these do not come twice; not for long, since by now a reader may wait for the others.
func (e *edges) settle(ctx context.Context, first, last int) {
	ctx, cancel := context.WithTimeout(ctx, edgesPatience)
	defer cancel()
	for _, span := range []int{first, last} {
		e.mu.Lock()
		done := e.coming[span]
		e.mu.Unlock()
		if done == nil {
			continue
		}
		select {
		case <-done:
		case <-ctx.Done():
		}
	}
}

// expect notes what a keeper is to bring, and returns what to call when it has ended.
func (e *edges) expect(k *keeper) (ended func()) {
	if len(k.parts) == 0 {
		return func() {}
	}
	done := make(chan struct{})
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.coming == nil {
		e.coming = map[int]chan struct{}{}
	}
	for _, x := range k.parts {
		e.coming[x.number] = done
	}
	return func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		close(done)
		for _, x := range k.parts {
			if e.coming[x.number] == done {
				delete(e.coming, x.number)
			}
		}
	}
}

type edge struct {
	span   int // its number
	stored []byte
	window []byte // stored; nil if it is not known
}

// get returns what is kept of a span, or nil.
func (e *edges) get(span int) *edge {
	e.mu.Lock()
	defer e.mu.Unlock()
	x, ok := e.known[span]
	if !ok {
		return nil
	}
	e.order.MoveToFront(x)
	return x.Value.(*edge)
}

// remove forgets a span. e.mu is held.
func (e *edges) remove(x *list.Element) {
	old := e.order.Remove(x).(*edge)
	delete(e.known, old.span)
	e.size -= len(old.stored) + len(old.window)
}

// put keeps a span, and as many others as there is room for.
func (e *edges) put(x *edge) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.known == nil {
		e.known = map[int]*list.Element{}
	}
	if old, ok := e.known[x.span]; ok {
		e.remove(old)
	}
	e.known[x.span] = e.order.PushFront(x)
	for e.size += len(x.stored) + len(x.window); e.size > edgesMemory; {
		e.remove(e.order.Back())
	}
	if e.over == nil {
		e.over = time.AfterFunc(edgesTime, e.clear)
	}
	e.over.Reset(edgesTime)
}

// clear forgets all.
func (e *edges) clear() {
	e.mu.Lock()
	defer e.mu.Unlock()
	clear(e.known)
	e.order.Init()
	if e.size = 0; e.over != nil {
		e.over.Stop()
	}
}

// drop forgets what is kept of the ends.
func (e *edges) drop(n *ends) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, span := range []int{n.first, n.first + len(n.spans) - 1} {
		if x, ok := e.known[span]; ok {
			e.remove(x)
		}
	}
}

// ends are the first and the last span of a request, as far as they are kept.
type ends struct {
	first      int // number of the first span
	spans      []index.Span
	head, tail *edge // nil if they have to come
}

// find sets what is kept.
func (e *edges) find(n *ends) {
	last := len(n.spans) - 1
	if n.spans[0].Divisible() || n.spans[last].Divisible() {
		return // any part of them can come by itself
	}
	if n.head = e.get(n.first); last > 0 {
		n.tail = e.get(n.first + last)
	}
}

// used tells whether anything is kept.
func (n *ends) used() bool { return n.head != nil || n.tail != nil }

// missing returns which of the stored bytes have to come.
func (n *ends) missing() (off, length int64) {
	first, last := &n.spans[0], &n.spans[len(n.spans)-1]
	from, to := first.Offset, last.Offset+last.Length
	if n.head != nil {
		from += first.Length
	}
	if n.tail != nil {
		to -= last.Length
	}
	return from, max(0, to-from)
}

// body is all that is stored, where fetched is what was missing; it may be nil if that
// is nothing.
func (n *ends) body(fetched io.Reader) io.Reader {
	var parts []io.Reader
	at := n.spans[0].Offset
	if n.head != nil {
		parts, at = append(parts, bytes.NewReader(n.head.stored)), at+int64(len(n.head.stored))
	}
	if _, length := n.missing(); length > 0 {
		parts, at = append(parts, fetched), at+length
	}
	if n.tail != nil { // two spans of gzip may share a byte
		parts = append(parts, bytes.NewReader(n.tail.stored[at-n.spans[len(n.spans)-1].Offset:]))
	}
	return io.MultiReader(parts...)
}

// windows returns which bytes have to come of what lies beside the spans, at off and of
// that length.
func (n *ends) windows(off, length int64) (from, missing int64) {
	last := len(n.spans) - 1
	end := off + length
	if n.head != nil && n.spans[0].Window.Length > 0 {
		off += int64(len(n.head.window))
	}
	if n.tail != nil && n.spans[last].Window.Length > 0 && !n.spans[last].Inflated() {
		end -= int64(len(n.tail.window))
	}
	return off, max(0, end-off)
}

// keeper reads a body and keeps of it what is to become edges.
type keeper struct {
	io.Reader
	at    int64 // of the next byte in the blob
	parts []kept
}

// kept is a span of which a request uses a part.
type kept struct {
	number int
	span   *index.Span
	stored []byte
}

func (k *keeper) Read(p []byte) (int, error) {
	n, err := k.Reader.Read(p)
	for i := range k.parts {
		x := &k.parts[i]
		if from, to := max(0, x.span.Offset-k.at), min(int64(n), x.span.Offset+x.span.Length-k.at); from < to {
			x.stored = append(x.stored, p[from:to]...)
		}
	}
	k.at += int64(n)
	return n, err
}

// keeper returns what is to read the body, and keeps of it the spans at the ends which the
// stream's bytes [from, to) are a part of.
func (n *ends) keeper(from, to int64) *keeper {
	k := &keeper{at: n.spans[0].Offset}
	first, last := &n.spans[0], &n.spans[len(n.spans)-1]
	if first.Divisible() || last.Divisible() {
		return k
	}
	if n.head == nil && (first.Start < from || first == last && to < first.End()) && first.Length <= edgeSize {
		k.parts = append(k.parts, kept{number: n.first, span: first, stored: make([]byte, 0, first.Length)})
	}
	if n.tail == nil && first != last && to < last.End() && last.Length <= edgeSize {
		k.parts = append(k.parts, kept{number: n.first + len(n.spans) - 1, span: last, stored: make([]byte, 0, last.Length)})
	}
	return k
}

// keep makes edges of what a keeper has read, and what lies beside. It reads what is left of
// the last of them, which is on its way.
func (e *edges) keep(k *keeper, beside *besides) {
	if len(k.parts) == 0 {
		return
	}
	last := k.parts[len(k.parts)-1].span
	_, _ = io.CopyN(io.Discard, k, max(0, last.Offset+last.Length-k.at))
	for _, x := range k.parts {
		if int64(len(x.stored)) == x.span.Length {
			e.put(&edge{span: x.number, stored: x.stored, window: beside.of(x.span)})
		}
	}
}
