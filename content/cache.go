package content

import (
	"bytes"
	"container/list"
	"context"
	"errors"
	"io"
	"os"
	"sync"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/stream"
)

// Windows of a Cached source: large enough that requests are few, and so many
// that what lies together in an image is fetched once.
const (
	cacheWindow  = 1 << 20
	cacheWindows = 64
)

// Cached makes a source fetch whole windows of 1 MiB and keep the last 64 of
// them: for who reads an image file by file. A long frame of zstd, which is decoded from
// its start for whatever is wanted of it, is decoded once, to a file without a name. It is
// safe for concurrent use. Objects whose size is not known are passed through.
func Cached(src blob.Source) blob.Source {
	return &cache{src: src, windows: map[windowKey]*list.Element{}, order: list.New(), frames: map[windowKey]*os.File{}}
}

// Chunk implements AtHand: for a source that does, and for chunks in long frames.
func (c *cache) Chunk(ctx context.Context, t *index.Tree, n uint32, p []byte) bool {
	k := &t.Chunks[n]
	if hand, ok := c.src.(AtHand); ok && hand.Chunk(ctx, t, n, p) && k.Digest.Verify(p) == nil {
		return true
	}
	b := &t.Blobs[k.Blob]
	spans := b.Cover(k.Offset, k.Offset+int64(k.Size))
	if len(spans) != 1 || spans[0].Codec != chunk.Zstd || spans[0].Length <= cacheWindow {
		return false
	}
	f, err := c.frame(ctx, b, spans[0])
	if err != nil {
		return false // who reads it without us finds out why
	}
	_, err = f.ReadAt(p, k.Offset-spans[0].Start)
	return err == nil
}

// frame returns what a span decodes to.
func (c *cache) frame(ctx context.Context, b *index.Blob, s index.Span) (*os.File, error) {
	c.decoding.Lock()
	defer c.decoding.Unlock()
	key := windowKey{b.Digest, s.Offset}
	if f := c.frames[key]; f != nil {
		return f, nil
	}
	body, err := c.src.Range(ctx, blob.Ref{Digest: b.Digest, Size: b.Size}, s.Offset, s.Length)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	r, err := stream.NewReader(body, []index.Span{s}, s.Start, s.End(), nil)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	f, err := os.CreateTemp("", ".shale-frame-")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	for r.Pos() < s.End() {
		p, err := r.Next(int(min(s.End()-r.Pos(), 128<<10)))
		if err == nil {
			_, err = f.Write(p)
		}
		if err != nil {
			return nil, errors.Join(err, f.Close())
		}
	}
	c.frames[key] = f
	return f, nil
}

// windowKey is a window by its number, or a frame by its offset.
type windowKey struct {
	digest string
	number int64
}

type cached struct {
	key  windowKey
	done chan struct{}
	data []byte
	err  error
}

type cache struct {
	src blob.Source

	mu      sync.Mutex
	windows map[windowKey]*list.Element
	order   *list.List // of *cached, last used first

	decoding sync.Mutex // held while a frame is decoded
	frames   map[windowKey]*os.File
}

// Range implements blob.Source.
func (c *cache) Range(ctx context.Context, ref blob.Ref, off, n int64) (io.ReadCloser, error) {
	if ref.Size <= 0 || off < 0 || n <= 0 || off > ref.Size-n || n > cacheWindow*cacheWindows/2 {
		return c.src.Range(ctx, ref, off, n)
	}
	var parts []io.Reader
	for n > 0 {
		w, err := c.window(ctx, ref, off/cacheWindow)
		if err != nil {
			return nil, err
		}
		p := w[off%cacheWindow:]
		p = p[:min(int64(len(p)), n)]
		parts = append(parts, bytes.NewReader(p))
		off, n = off+int64(len(p)), n-int64(len(p))
	}
	return io.NopCloser(io.MultiReader(parts...)), nil
}

// window returns a window, fetched once for all who want it.
func (c *cache) window(ctx context.Context, ref blob.Ref, number int64) ([]byte, error) {
	key := windowKey{ref.Digest, number}
	c.mu.Lock()
	e, ok := c.windows[key]
	if !ok {
		e = c.order.PushFront(&cached{key: key, done: make(chan struct{})})
		c.windows[key] = e
		if c.order.Len() > cacheWindows {
			c.drop(c.order.Back())
		}
	}
	c.order.MoveToFront(e)
	c.mu.Unlock()
	w := e.Value.(*cached)
	if ok {
		select {
		case <-w.done:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		if errors.Is(w.err, context.Canceled) && ctx.Err() == nil { // another gave up
			return c.window(ctx, ref, number)
		}
		return w.data, w.err
	}
	off := number * cacheWindow
	w.data, w.err = blob.ReadAll(ctx, c.src, ref, off, min(cacheWindow, ref.Size-off))
	if w.err != nil { // the next who asks tries again
		c.mu.Lock()
		if c.windows[key] == e {
			c.drop(e)
		}
		c.mu.Unlock()
	}
	close(w.done)
	return w.data, w.err
}

// drop forgets a window. c.mu is held.
func (c *cache) drop(e *list.Element) {
	delete(c.windows, e.Value.(*cached).key)
	c.order.Remove(e)
}
