package fill

import (
	"context"
	"io"
	"slices"
	"sync/atomic"
	"time"

	"github.com/shale-image/shale/index"
)

// ends are the first and the last span of a request, of which others may need a part too. It
// reads the stored bytes of all its spans: those that are fetched, and edges of others.
type ends struct {
	edges *edges
	first int // number of the first span
	spans []index.Span

	head, tail []*edge       // of others, of spans one behind the other; what is between has to come
	own        []*edge       // what comes of the first and the last span here
	body       io.Reader     // all
	at         *atomic.Int64 // where in the blob its next byte lies
	waited     bool          // for an edge
}

// ends returns those of a request for spans, of which [from, to) of the stream is needed. The one
// that is fresh takes nothing from others.
func (im *Image) ends(first int, spans []index.Span, from, to int64, fresh bool) *ends {
	n := &ends{edges: &im.edges, first: first, spans: spans, at: new(atomic.Int64)}
	n.at.Store(spans[0].Offset)
	im.edges.find(n, from, to, fresh, max(unit, int64(im.worth.bytes())))
	return n
}

// used tells whether anything comes from others.
func (n *ends) used() bool { return len(n.head)+len(n.tail) > 0 }

// others returns what comes from them.
func (n *ends) others() []*edge { return slices.Concat(n.head, n.tail) }

// missing returns which of the stored bytes have to come.
func (n *ends) missing() (off, length int64) {
	first, last := &n.spans[0], &n.spans[len(n.spans)-1]
	from, to := first.Offset, last.Offset+last.Length
	if k := len(n.head); k > 0 {
		from = n.head[k-1].span.Offset + n.head[k-1].span.Length
	}
	if len(n.tail) > 0 {
		to = n.tail[0].span.Offset
	}
	return from, max(0, to-from)
}

// use sets what was fetched of what was missing; it may be nil if that is nothing.
func (n *ends) use(ctx context.Context, fetched io.Reader) {
	if n.body = fetched; !n.used() {
		return
	}
	var parts []io.Reader
	at := n.spans[0].Offset
	take := func(run []*edge) {
		for _, x := range run { // two spans of gzip may share a byte
			parts = append(parts, &taken{ctx: ctx, ends: n, edge: x, at: at - x.span.Offset})
			at = x.span.Offset + x.span.Length
		}
	}
	take(n.head)
	if _, length := n.missing(); length > 0 {
		parts, at = append(parts, fetched), at+length
	}
	take(n.tail)
	n.body = io.MultiReader(parts...)
}

// wait returns when an edge of another request is here, or errLate.
func (n *ends) wait(ctx context.Context, x *edge) error {
	select {
	case <-x.done:
	default:
		n.waited = true
		late := time.NewTimer(edgesPatience)
		defer late.Stop()
		select {
		case <-x.done:
		case <-late.C:
			return errLate
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	if !x.here {
		return errLate
	}
	return nil
}

// taken reads an edge of another request, when it is here.
type taken struct {
	ctx  context.Context
	ends *ends
	edge *edge
	at   int64
}

func (t *taken) Read(p []byte) (int, error) {
	if err := t.ends.wait(t.ctx, t.edge); err != nil {
		return 0, err
	}
	if t.at == t.edge.span.Length {
		return 0, io.EOF
	}
	k := copy(p, t.edge.stored[t.at:])
	t.at += int64(k)
	return k, nil
}

// Read reads the body, and keeps of it what is to become edges.
func (n *ends) Read(p []byte) (int, error) {
	k, err := n.body.Read(p)
	at := n.at.Add(int64(k)) - int64(k)
	for _, x := range n.own {
		if from, to := max(0, x.span.Offset-at), min(int64(k), x.span.Offset+x.span.Length-at); from < to {
			x.stored = append(x.stored, p[from:to]...)
			n.edges.came(x)
		}
	}
	return k, err
}

// rest reads what is left of the last edge that comes here, which is on its way.
func (n *ends) rest() {
	if k := len(n.own); k > 0 {
		last := &n.own[k-1].span
		_, _ = io.CopyN(io.Discard, n, max(0, last.Offset+last.Length-n.at.Load()))
	}
}

// windows returns which bytes have to come of what lies beside the spans, at off and of
// that length.
func (n *ends) windows(off, length int64) (from, missing int64) {
	end := off + length
	for i, x := range n.head {
		off += x.beside(i == 0)
	}
	for _, x := range n.tail {
		end -= x.beside(false)
	}
	return off, max(0, end-off)
}

// window returns what an edge of another request brings with it of what lies beside, at off;
// nil if that has to come.
func (n *ends) window(ctx context.Context, off int64) ([]byte, error) {
	for _, x := range n.others() {
		if x.windowed && x.span.Window.Offset == off {
			if err := n.wait(ctx, x); err != nil {
				return nil, err
			}
			return x.window, nil
		}
	}
	return nil, nil
}

// windowCame keeps a window, at off, for what is to become an edge.
func (n *ends) windowCame(off int64, window []byte) {
	for _, x := range n.own {
		if x.windowed && x.span.Window.Offset == off {
			x.window = window
			n.edges.came(x)
		}
	}
}
