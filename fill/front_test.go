package fill

import (
	"context"
	"fmt"
	"io"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/chunk"
)

// weir is a source whose bytes come as far as it lets them.
type weir struct {
	blob.Source
	mu       sync.Mutex
	more     *sync.Cond
	limit    int64
	requests int
}

func newWeir(s blob.Source) *weir {
	g := &weir{Source: s}
	g.more = sync.NewCond(&g.mu)
	return g
}

// open lets bytes come up to an offset of the blob.
func (g *weir) open(to int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.limit = to
	g.more.Broadcast()
}

func (g *weir) asked() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.requests
}

func (g *weir) Range(ctx context.Context, ref blob.Ref, off, n int64) (io.ReadCloser, error) {
	g.mu.Lock()
	g.requests++
	g.mu.Unlock()
	r, err := g.Source.Range(ctx, ref, off, n)
	return &weirReader{r, g, off}, err
}

type weirReader struct {
	io.ReadCloser
	g   *weir
	off int64
}

func (r *weirReader) Read(p []byte) (int, error) {
	r.g.mu.Lock()
	for r.off >= r.g.limit {
		r.g.more.Wait()
	}
	p = p[:min(int64(len(p)), r.g.limit-r.off)]
	r.g.mu.Unlock()
	n, err := r.ReadCloser.Read(p)
	r.off += int64(n)
	return n, err
}

// TestOneFrame: a layer that can only be decoded from its start is one request,
// whoever reads it and where. A reader waits for the part that it wants, not for all
// of it; one that gives up does not end it for the others.
func TestOneFrame(t *testing.T) {
	for _, files := range []int{4, 24} { // of a MiB
		t.Run(fmt.Sprint(files, " MiB"), func(t *testing.T) {
			b := newBuilder(chunk.Zstd)
			b.blob()
			b.gap(1000) // so that the frame is not all of the blob
			b.batch(slices.Repeat([]int{1 << 20}, files)...)
			stored := int64(len(b.blobs[0]))
			n := newNode(t, Options{})
			g := newWeir(n.source)
			x := n.open(n.link(b), g)
			t.Cleanup(func() { g.open(stored) })

			read := func(i int) <-chan error {
				done := make(chan error, 1)
				go func() { done <- x.chunk(t, i) }()
				return done
			}
			comes := func(i int, done <-chan error) {
				t.Helper()
				select {
				case err := <-done:
					must(t, err)
				case <-time.After(time.Minute): // or never
					t.Fatalf("chunk %d does not come, although its part has", i)
				}
			}
			early, late := read(0), read(files-1)
			half := read(files / 2)
			// What decodes to a bit more than the first chunk.
			g.open(stored * 3 / 2 / int64(files))
			comes(0, early)
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			last := x.linked.Chunk(files - 1)
			if err := x.read(ctx, t, last.Flat, 4096); err == nil {
				t.Error("the last part is there before it has come")
			}
			g.open(stored*int64(files/2+1)/int64(files) + stored/int64(2*files))
			comes(files/2, half)
			comes(1, read(1)) // which has passed
			select {
			case <-late:
				t.Error("the last part is there before it has come")
			default:
			}
			g.open(stored)
			comes(files-1, late)
			x.all(t)
			if g.asked() != 1 {
				t.Errorf("%d requests, want 1", g.asked())
			}
		})
	}
}
