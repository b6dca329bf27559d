package inspect

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"runtime"
	"sort"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/stream"
)

// windowSize is how much one request brings: large enough that its way there and
// back hardly counts, small enough that some of them in memory do not either.
const windowSize = 4 << 20

// window is a piece of an object, and the spans that lie wholly in it.
type window struct {
	o      *object
	off, n int64
	spans  []index.Span
	data   []byte        // what was read; nil if it could not be
	done   chan struct{} // closed when data and the chunks' verdicts are there
}

// measure finds out how long the objects are in truth.
func (c *checker) measure(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	for _, o := range c.objects {
		g.Go(func() error {
			size, err := length(ctx, c.im.Source, o.ref)
			switch {
			case err != nil && !isDefect(err):
				return err
			case err != nil:
				c.lack(o, -1, err.Error())
				return nil
			case size > o.ref.Size:
				c.add(o.defect(o.ref.Size, fmt.Sprintf("it goes on after the %d bytes it should have", o.ref.Size)))
			case size < o.ref.Size:
				c.lack(o, size, fmt.Sprintf("it ends after %d bytes, it should have %d", size, o.ref.Size))
			}
			o.size, o.whole = min(size, o.ref.Size), size == o.ref.Size
			return nil
		})
	}
	return g.Wait()
}

// lack reports that an object has nothing from offset off on.
func (c *checker) lack(o *object, off int64, problem string) {
	d := o.defect(off, problem)
	d.Length = o.ref.Size - max(0, off)
	for i := range o.spans {
		if s := &o.spans[i]; s.Offset+s.Length > off {
			d.chunks = append(d.chunks, c.chunksIn(o, s)...)
		}
	}
	c.add(d)
}

// chunksIn returns the chunks that begin in a span.
func (c *checker) chunksIn(o *object, s *index.Span) []int {
	find := func(off int64) int {
		return sort.Search(len(o.chunks), func(i int) bool { return c.im.Tree.Chunks[o.chunks[i]].Offset >= off })
	}
	return o.chunks[find(s.Start):find(s.End())]
}

// length returns how many bytes of an object there are; one more than it
// should have if it goes on after that. Two requests of a byte each tell in
// the normal case, about 40 if it is too short.
func length(ctx context.Context, src blob.Source, ref blob.Ref) (int64, error) {
	has := func(off int64) (bool, error) {
		_, err := blob.ReadAll(ctx, src, blob.Ref{Digest: ref.Digest}, off, 1)
		if errors.Is(err, blob.ErrRange) {
			return false, nil
		}
		return err == nil, err
	}
	more, err := has(ref.Size)
	if err != nil || more {
		return ref.Size + 1, err
	}
	if ref.Size == 0 {
		return 0, nil
	}
	if all, err := has(ref.Size - 1); err != nil || all {
		return ref.Size, err
	}
	n := sort.Search(int(ref.Size), func(i int) bool {
		var ok bool
		if err == nil {
			ok, err = has(int64(i))
		}
		return !ok
	})
	return int64(n), err
}

// plan cuts an object into windows, not through spans.
func (c *checker) plan(o *object) (all []*window) {
	next := 0
	for off := int64(0); off < o.size; {
		end := min(off+windowSize, o.size)
		first := next
		for ; next < len(o.spans) && !o.windowed; next++ {
			s := &o.spans[next]
			if s.Offset+s.Length > o.size { // measure has told
				continue
			}
			if next == first {
				if s.Offset == off {
					end = max(end, s.Offset+s.Length) // it alone may be larger than a window
				}
			}
			if s.Offset+s.Length > end {
				end = min(end, s.Offset)
				break
			}
		}
		all = append(all, &window{o: o, off: off, n: end - off, spans: o.spans[first:next], done: make(chan struct{})})
		off = end
	}
	return all
}

// read fetches all objects and verifies their digests and chunks. Windows are
// fetched and their chunks verified several at a time; digests of objects are
// taken by one goroutine, which sees the windows in order.
func (c *checker) read(ctx context.Context) error {
	var plan []*window
	var total, done int64
	for _, o := range c.objects {
		plan = append(plan, c.plan(o)...)
		total += o.size
	}
	g, ctx := errgroup.WithContext(ctx)
	pending := make(chan *window, max(4, runtime.GOMAXPROCS(0)))
	g.Go(func() error {
		defer close(pending)
		for _, w := range plan {
			select {
			case pending <- w:
			case <-ctx.Done():
				return ctx.Err()
			}
			g.Go(func() error {
				defer close(w.done)
				return c.window(ctx, w)
			})
		}
		return nil
	})
	g.Go(func() error {
		sums := make([]hash.Hash, len(c.objects))
		for _, o := range c.objects {
			sums[o.number] = sha256.New()
		}
		for w := range pending {
			select {
			case <-w.done:
			case <-ctx.Done():
				return ctx.Err()
			}
			sums[w.o.number].Write(w.data)
			w.o.whole = w.o.whole && w.data != nil
			release(w.data)
			w.data = nil
			done += w.n
			c.progress(done, total)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		for _, o := range c.objects {
			if o.whole { // else something has been said already
				c.compareDigest(o, sums[o.number].Sum(nil))
			}
		}
		return nil
	})
	return g.Wait()
}

// window reads one window and verifies its chunks.
func (c *checker) window(ctx context.Context, w *window) error {
	p := take(w.n)
	if err := fetch(ctx, c.im.Source, w, p); err != nil {
		release(p)
		if !isDefect(err) {
			return err
		}
		d := w.o.defect(w.off, err.Error())
		d.Length = w.n
		for i := range w.spans {
			d.chunks = append(d.chunks, c.chunksIn(w.o, &w.spans[i])...)
		}
		c.add(d)
		return nil
	}
	for i := range w.spans {
		if s := &w.spans[i]; s.Offset+s.Length <= w.off+w.n {
			c.span(w.o, s, p[s.Offset-w.off:])
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	w.data = p
	return nil
}

// span verifies the chunks of a span, whose stored bytes p begins with.
func (c *checker) span(o *object, s *index.Span, p []byte) {
	r, err := stream.NewReader(bytes.NewReader(p), []index.Span{*s}, s.Start, s.End(), nil)
	c.verify(o, s, r, err)
}

// windowedSpans verifies the chunks of layers whose spans need windows, each span's from its own beginning.
func (c *checker) windowedSpans(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(max(4, runtime.GOMAXPROCS(0)))
	for _, o := range c.objects {
		for i := range o.spans {
			s := &o.spans[i]
			if !o.windowed || o.size < o.ref.Size || len(c.chunksIn(o, s)) == 0 {
				continue
			}
			g.Go(func() error {
				return c.windowedSpan(ctx, o, s)
			})
		}
	}
	return g.Wait()
}

// windowedSpan verifies the chunks that begin in a span. It reads from
// the first to the last of them.
func (c *checker) windowedSpan(ctx context.Context, o *object, s *index.Span) error {
	chunks := c.chunksIn(o, s)
	from, to := c.im.Tree.Chunks[chunks[0]].Offset, c.im.Tree.Chunks[chunks[len(chunks)-1]].End()
	spans := c.im.Tree.Blobs[o.blob].Cover(from, to)
	w, err := stream.Beside(ctx, c.im.Source, c.im.Tree, spans)
	if err != nil && isDefect(err) {
		c.verify(o, s, nil, err)
		return nil
	}
	if err != nil {
		return err
	}
	off, n := index.Stored(spans, from, to)
	body, err := c.im.Source.Range(ctx, blob.Ref{Digest: o.ref.Digest}, off, n)
	if err != nil {
		return err
	}
	defer body.Close()
	in := &kept{Reader: body}
	r, err := stream.NewReader(in, spans, from, to, w)
	c.verify(o, s, r, err)
	return in.err
}

// kept keeps the error of what is read: it is none of the image's.
type kept struct {
	io.Reader
	err error
}

func (k *kept) Read(p []byte) (int, error) {
	n, err := k.Reader.Read(p)
	if err != nil && err != io.EOF {
		k.err = err
	}
	return n, err
}

// verify verifies the chunks that begin in a span, which r reads unless err says
// why it cannot.
func (c *checker) verify(o *object, s *index.Span, r *stream.Reader, err error) {
	chunks := c.chunksIn(o, s)
	bad := func(err error, chunks []int) {
		d := o.defect(s.Offset, err.Error())
		d.Length, d.chunks = s.Length, chunks
		if len(chunks) == 1 {
			d.Chunk = c.im.Tree.Chunks[chunks[0]].Digest.String()
		}
		c.add(d)
	}
	if err != nil {
		bad(err, chunks)
		return
	}
	defer r.Close()
	for k, i := range chunks {
		ch := &c.im.Tree.Chunks[i]
		if ch.Offset < r.Pos() { // two chunks of one content
			continue
		}
		var data []byte
		err := r.Skip(ch.Offset - r.Pos())
		if err == nil {
			data, err = r.Next(int(ch.Size))
		}
		if err != nil {
			bad(err, chunks[k:])
			return
		}
		if err := r.Verify(ch.Digest, data); err != nil {
			bad(err, chunks[k:k+1])
		}
	}
}

func fetch(ctx context.Context, src blob.Source, w *window, p []byte) error {
	r, err := src.Range(ctx, blob.Ref{Digest: w.o.ref.Digest}, w.off, w.n)
	if err != nil {
		return err
	}
	defer r.Close()
	_, err = io.ReadFull(r, p)
	return err
}

// buffers are those of windows of the usual size.
var buffers = sync.Pool{New: func() any { p := make([]byte, windowSize); return &p }}

func take(n int64) []byte {
	if n > windowSize {
		return make([]byte, n)
	}
	return (*buffers.Get().(*[]byte))[:n]
}

func release(p []byte) {
	if p = p[:cap(p)]; len(p) == windowSize {
		buffers.Put(&p)
	}
}
