package content

import (
	"bytes"
	"container/list"
	"context"
	"errors"
	"io"
	"sync"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// Windows of a Cached source: large enough that requests are few, and so many
// that what lies together in an image is fetched once.
const (
	cacheWindow  = 1 << 20
	cacheWindows = 64
)

// Cached makes a source fetch whole windows of 1 MiB and keep the last 64 of
// them: for who reads an image file by file. Long frames, which are decoded from their
// start for whatever is wanted of them, are decoded once, to a file without a name in
// tempDir ("": os.TempDir), as far as there is room. It is safe for concurrent use. Objects
// whose size is not known are passed through.
func Cached(src blob.Source, tempDir string) blob.Source {
	c := &cache{src: src, windows: map[windowKey]*list.Element{}, order: list.New()}
	c.frames = frames{source: src, dir: tempDir, known: map[windowKey]*frame{}}
	return c
}

// Chunk implements AtHand: for a source that does, and for chunks in long frames.
func (c *cache) Chunk(ctx context.Context, t *index.Tree, n uint32, p []byte) bool {
	k := &t.Chunks[n]
	if k.Digest.Algorithm == chunk.Origin {
		return false
	}
	if hand, ok := c.src.(AtHand); ok && hand.Chunk(ctx, t, n, p) && k.Digest.Verify(p) == nil {
		return true
	}
	return c.frames.read(ctx, &t.Blobs[k.Blob], k.Offset, p)
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

	frames frames
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
