package fill

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/memblob"
	"github.com/shale-image/shale/chunk"
)

// TestCompleteSlowly: all comes, one request at a time, what is near to what was read
// first.
func TestCompleteSlowly(t *testing.T) {
	n := newNode(t, Options{})
	b := newBuilder(chunk.None)
	b.blob()
	b.files(20<<20, 1<<20)
	x := n.image(b)
	if !x.LastMiss().IsZero() {
		t.Error("nobody has read, and somebody had to wait")
	}
	mid := x.linked.Chunks() / 2
	must(t, x.chunk(t, mid))
	x.settle()
	if time.Since(x.LastMiss()) > time.Minute {
		t.Errorf("the last miss was at %v", x.LastMiss())
	}
	var flying, most atomic.Int32
	n.setFault(func(context.Context, blob.Ref, int64, int64) *memblob.Fault {
		most.Store(max(most.Load(), flying.Add(1)))
		time.Sleep(time.Millisecond)
		flying.Add(-1)
		return nil
	})
	n.asked()
	must(t, x.CompleteSlowly(t.Context(), Slowly{}))
	if m := x.Missing(); m.Chunks != 0 {
		t.Errorf("missing: %+v", m)
	}
	if most.Load() != 1 {
		t.Errorf("%d requests at a time, want 1", most.Load())
	}
	log := n.asked()
	if len(log) == 0 || log[0].off <= x.linked.Chunk(mid).Offset || log[0].off > x.linked.Chunk(mid).Offset+near {
		t.Errorf("the first request was at %d, the last read at %d", log[0].off, x.linked.Chunk(mid).Offset)
	}
	for _, a := range log {
		if a.n > slowRequest {
			t.Errorf("a request of %d bytes, want %d at most", a.n, slowRequest)
		}
	}
	must(t, x.CompleteSlowly(t.Context(), Slowly{}))
	if log := n.asked(); len(log) != 0 {
		t.Errorf("requests for a complete image: %v", log)
	}
}

// TestCompleteSlowlyYields: while a reader of another image waits nothing is asked
// for, and the rate is kept.
func TestCompleteSlowlyYields(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, Options{})
		b := newBuilder(chunk.None)
		b.blob()
		b.files(4 << 20)
		x := n.image(b)
		ctx, cancel := context.WithCancel(t.Context())
		n.engine.waiting.Add(1)
		ended := make(chan error, 1)
		begun := time.Now()
		go func() { ended <- x.CompleteSlowly(ctx, Slowly{Rate: 1 << 20}) }()
		time.Sleep(time.Minute)
		if log := n.asked(); len(log) != 0 {
			t.Errorf("while a reader waits: %v", log)
		}
		n.engine.waiting.Add(-1)
		must(t, <-ended)
		if took := time.Since(begun) - time.Minute; took < 3*time.Second || took > 6*time.Second {
			t.Errorf("4 MiB at 1 MiB/s took %v", took)
		}
		n.engine.waiting.Add(1)
		go func() { ended <- x.CompleteSlowly(ctx, Slowly{}) }()
		synctest.Wait()
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("%v, want Canceled", err)
		}
		n.engine.waiting.Add(-1)
	})
}
