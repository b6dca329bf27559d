package fill

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/memblob"
	"github.com/shale-image/shale/chunk"
)

var errDown = errors.New("the registry is down")

func down(context.Context, blob.Ref, int64, int64) *memblob.Fault {
	return &memblob.Fault{After: -1, Err: errDown}
}

// A complete image needs nobody.
func TestComplete(t *testing.T) {
	n := newNode(t, Options{})
	x := n.image(mixed(chunk.Zstd, 1, 2))
	must(t, x.chunk(t, 3))
	x.settle()
	missing := x.Missing()
	if missing.Chunks == 0 || missing.Chunks >= x.linked.Chunks() || missing.Stored == 0 || missing.Stored >= missing.Content {
		t.Fatalf("missing: %+v", missing)
	}
	var got atomic.Int64
	must(t, x.Complete(t.Context(), func(n int64) { got.Add(n) }))
	if got.Load() != missing.Content {
		t.Errorf("progress of %d bytes, want %d", got.Load(), missing.Content)
	}
	if m := x.Missing(); m != (Missing{}) {
		t.Errorf("missing: %+v", m)
	}
	n.asked()
	n.setFault(down)
	x.all(t)
	must(t, x.Complete(t.Context(), nil))
	var size int64
	for i := range x.linked.Chunks() {
		size += int64(x.linked.Chunk(i).Size)
	}
	if x.ContentBytes() != size {
		t.Errorf("ContentBytes %d, want %d", x.ContentBytes(), size)
	}
	if got := n.asked(); len(got) != 0 {
		t.Errorf("requests for a complete image: %v", got)
	}
}

// Readers and two images that complete at once: each chunk is fetched once.
func TestCompleteTogether(t *testing.T) {
	n := newNode(t, Options{})
	images := []*img{n.image(mixed(chunk.Zstd, 1, 2, 3)), n.image(mixed(chunk.Zstd, 2, 3, 4))}
	distinct := map[address]bool{}
	for _, x := range images {
		for i := range x.linked.Chunks() {
			_, at := x.address(x.linked.Chunk(i))
			distinct[at] = true
		}
	}
	var wg sync.WaitGroup
	for _, x := range images {
		wg.Go(func() {
			if err := x.Complete(t.Context(), nil); err != nil {
				t.Error(err)
			}
		})
		wg.Go(func() { x.all(t) })
	}
	wg.Wait()
	var brought int64
	for _, x := range images {
		x.settle()
		brought += x.Stats().Chunks
	}
	if brought != int64(len(distinct)) {
		t.Errorf("%d chunks were brought, there are %d", brought, len(distinct))
	}
}

func TestCompleteFails(t *testing.T) {
	n := newNode(t, Options{})
	x := n.image(mixed(chunk.Zstd, 1, 2))
	n.setFault(down)
	if err := x.Complete(t.Context(), nil); !errors.Is(err, errDown) {
		t.Errorf("error %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	n.setFault(func(context.Context, blob.Ref, int64, int64) *memblob.Fault { cancel(); return nil })
	if err := x.Complete(ctx, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want the context's", err)
	}
	n.setFault(nil)
	must(t, x.Complete(t.Context(), nil))
	x.all(t)
}

// What was fetched is never fetched again because a process died.
func TestKilledAndReopened(t *testing.T) {
	n := newNode(t, Options{})
	dir := n.link(mixed(chunk.Zstd, 1, 2))
	x := n.open(dir, n.source)
	for i := range 10 {
		must(t, x.chunk(t, 3*i))
	}
	x.settle()
	had := x.present()
	// A process that is killed closes nothing. Its files stay as they are.
	killed := n.pool
	t.Cleanup(func() { must(t, killed.Close()) })
	n.reopen(Options{})
	n.setFault(down)
	y := n.open(dir, n.source)
	if got := y.present(); len(got) != len(had) || len(had) == y.linked.Chunks() {
		t.Errorf("%d chunks of %d, there were %d", len(got), y.linked.Chunks(), len(had))
	}
	for _, i := range had {
		must(t, y.chunk(t, i))
	}
	n.setFault(nil)
	must(t, y.Complete(t.Context(), nil))
	y.all(t)
}
