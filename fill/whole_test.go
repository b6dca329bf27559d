package fill

import (
	"context"
	"errors"
	"io"
	"sync"
	"testing"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/memblob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/link"
)

// rangeless is a registry that serves blobs from their starts only.
func rangeless(_ context.Context, _ blob.Ref, off, _ int64) *memblob.Fault {
	if off > 0 {
		return &memblob.Fault{After: -1, Err: blob.ErrRange}
	}
	return nil
}

// many has more spans than are held at once.
func many() *builder {
	b := newBuilder(chunk.Zstd)
	b.blob()
	for range 2*pieceSpans + 100 {
		b.files(200)
		if b.seed%700 == 0 {
			b.gap(5000)
		}
	}
	return b
}

// TestWhole: an image comes by one request a blob, also if some of it is here.
func TestWhole(t *testing.T) {
	for name, b := range map[string]*builder{
		"plain": mixed(chunk.None, 1, 2), "zstd": mixed(chunk.Zstd, 1, 2), "lz4": mixed(chunk.LZ4, 3), "many": many(),
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, Options{})
			x := n.image(b)
			for i := 0; i < x.linked.Chunks(); i += 7 {
				must(t, x.chunk(t, i))
			}
			x.settle()
			n.asked()
			var content, came int64
			m := x.Missing()
			content = m.Content
			n.setFault(rangeless)
			var mu sync.Mutex
			must(t, x.Whole(t.Context(), func(n int64) {
				mu.Lock()
				defer mu.Unlock()
				came += n
			}))
			if m := x.Missing(); m.Chunks > 0 || came != content {
				t.Errorf("%d chunks are missing, %d bytes came of %d", m.Chunks, came, content)
			}
			if asked := n.asked(); len(asked) > len(b.blobs) {
				t.Errorf("asked %v", asked)
			}
			x.all(t)
			if asked := n.asked(); len(asked) > 0 {
				t.Errorf("asked %v", asked)
			}
		})
	}
}

// TestWholeForReaders: where a registry serves no parts, and nothing else is known about
// an image, its readers see nothing of it.
func TestWholeForReaders(t *testing.T) {
	n := newNode(t, Options{})
	b := mixed(chunk.Zstd, 4, 5)
	x := n.image(b)
	n.setFault(rangeless)
	var wg sync.WaitGroup
	for i := range x.linked.Chunks() {
		wg.Go(func() { must(t, x.chunk(t, i)) })
	}
	wg.Wait()
	if st := x.Stats(); st.Errors != 0 || x.Missing().Chunks != 0 {
		t.Errorf("%+v, missing %+v", st, x.Missing())
	}
	whole := 0
	for _, a := range n.asked() {
		if a.off == 0 && a.n >= int64(len(b.blobs[0]))/2 {
			whole++
		}
	}
	if whole != len(b.blobs) {
		t.Errorf("%d blobs were read %d times", len(b.blobs), whole)
	}
}

// TestWholeBreaks: a body that breaks off is no end, as long as each brings more.
func TestWholeBreaks(t *testing.T) {
	n := newNode(t, Options{})
	b := mixed(chunk.Zstd, 6)
	x := n.image(b)
	passes := int64(0)
	n.setFault(func(_ context.Context, _ blob.Ref, _, size int64) *memblob.Fault {
		passes++
		return &memblob.Fault{After: size * min(passes, 4) / 4, Err: io.ErrUnexpectedEOF}
	})
	must(t, x.Whole(t.Context(), nil))
	if passes != 4 {
		t.Errorf("%d passes", passes)
	}
	x.all(t)

	x = n.image(mixed(chunk.Zstd, 7))
	n.setFault(func(_ context.Context, _ blob.Ref, _, size int64) *memblob.Fault {
		passes++
		return &memblob.Fault{After: size / 2, Err: io.ErrUnexpectedEOF}
	})
	if err := x.Whole(t.Context(), nil); !errors.Is(err, io.ErrUnexpectedEOF) || len(x.present()) == 0 || passes != 4+2 {
		t.Errorf("%v, %d passes, %d chunks", err, passes, len(x.present()))
	}
	n.setFault(nil)
	x.all(t)
}

// TestWholeWrong: wrong bytes are not stored, and asked of somebody else.
func TestWholeWrong(t *testing.T) {
	n := newNode(t, Options{})
	x := n.image(mixed(chunk.Zstd, 8))
	n.setFault(lie)
	if err := x.Whole(t.Context(), nil); !errors.Is(err, chunk.ErrCorrupt) || x.Missing().Chunks == 0 {
		t.Errorf("%v, missing %+v", err, x.Missing())
	}
	for _, i := range x.present() {
		must(t, x.chunk(t, i))
	}
	good := memblob.New(nil)
	for _, p := range n.blobs {
		good.Put(p)
	}
	x.source = sourceFunc(func(ctx context.Context, ref blob.Ref, off, size int64) (io.ReadCloser, error) {
		body, err := n.source.Range(ctx, ref, off, size)
		return rejected{body, good}, err
	})
	must(t, x.Whole(t.Context(), nil))
	x.all(t)
}

// rejected is a body that knows who else to ask.
type rejected struct {
	io.ReadCloser
	other blob.Source
}

func (r rejected) Reject() []blob.Source { return []blob.Source{r.other} }

// TestWholeCancelled ends at once.
func TestWholeCancelled(t *testing.T) {
	n := newNode(t, Options{})
	x := n.image(mixed(chunk.None, 9))
	ctx, cancel := context.WithCancel(t.Context())
	n.setFault(func(ctx context.Context, _ blob.Ref, _, _ int64) *memblob.Fault {
		cancel()
		<-ctx.Done()
		return &memblob.Fault{After: -1, Err: ctx.Err()}
	})
	if err := x.Whole(ctx, nil); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// TestWholePiece: spans between two chunks of which nothing is missing are not held.
func TestWholePiece(t *testing.T) {
	b := newBuilder(chunk.None)
	b.blob()
	b.files(16, cut, 16)
	b.respan(16)
	x := newNode(t, Options{}).image(b)
	all, k := x.piece([]link.Chunk{x.linked.Chunk(0), x.linked.Chunk(2)})
	if k != 1 || all.Last != all.First {
		t.Errorf("%d chunks of %d spans", k, all.Last-all.First+1)
	}
}
