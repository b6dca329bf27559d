package fill

import (
	"context"
	"math"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/memblob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/link"
	"github.com/shale-image/shale/pool"
)

// TestPrefetch: what lies first comes by one request a blob, and nothing else does.
func TestPrefetch(t *testing.T) {
	b := newBuilder(chunk.None)
	b.blob()
	b.files(cut, 3*cut, cut, 5*cut)
	b.blob()
	b.files(cut, cut)
	b.blob()
	b.files(200*cut, cut)
	n := newNode(t, Options{})
	n.store(b)
	b.tree.Blobs[0].First = 5 * cut
	b.tree.Blobs[2].First = 200 * cut // more than is taken of one
	dir := t.TempDir() + "/linked"
	must(t, link.Link(t.Context(), &b.tree, n.pool, dir))
	x := n.open(dir, n.source)
	x.Prefetch()
	x.settle()
	got := n.asked()
	slices.SortFunc(got, func(a, b asked) int { return int(a.n - b.n) })
	want := []asked{{b.tree.Blobs[0].Digest, 0, 5 * cut}, {b.tree.Blobs[2].Digest, 0, maxPrefetch}}
	if !slices.Equal(got, want) {
		t.Errorf("asked for %+v, want %+v", got, want)
	}
	if p := x.present(); len(p) != 5+maxPrefetch/cut {
		t.Errorf("chunks %v are here", p)
	}
	must(t, x.chunk(t, 0))
	if got := n.asked(); len(got) > 0 {
		t.Errorf("asked again for %+v", got)
	}
	x.Prefetch() // of the one that has more
	x.settle()
	if got := n.asked(); len(got) != 1 || got[0].off != maxPrefetch {
		t.Errorf("asked for %+v", got)
	}
	// Where all is here nobody's lock is needed to see it.
	x.all(t)
	n.engine.mu.Lock()
	defer n.engine.mu.Unlock()
	done := make(chan struct{})
	go func() {
		defer close(done)
		x.Prefetch()
	}()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Error("the lock is held, or waited for, to look for what is missing")
	}
}

// TestPrefetchJoined: what a reader waits for already is not asked for again, and what lies
// behind it is.
func TestPrefetchJoined(t *testing.T) {
	b := newBuilder(chunk.None)
	b.blob()
	b.files(cut)
	b.gap(2 * maxGap)
	b.files(cut, cut)
	b.blob()
	b.files(cut)
	n := newNode(t, Options{})
	n.store(b)
	b.tree.Blobs[0].First, b.tree.Blobs[1].First = 3*cut, cut
	dir := t.TempDir() + "/linked"
	must(t, link.Link(t.Context(), &b.tree, n.pool, dir))
	x := n.open(dir, n.source)
	hold := make(chan struct{})
	n.setFault(func(context.Context, blob.Ref, int64, int64) *memblob.Fault {
		<-hold
		return nil
	})
	x.engine.mu.Lock()
	wants := x.collect(0, 0, 0, 0)
	x.engine.claim(x.Image, wants, 0, 0)
	x.engine.mu.Unlock()
	x.Image.start(wants)
	x.Prefetch()
	close(hold)
	x.settle()
	got := n.asked()
	slices.SortFunc(got, func(a, b asked) int { return int(a.n - b.n) })
	if len(got) != 3 || got[2] != (asked{b.tree.Blobs[0].Digest, cut + 2*maxGap, 2 * cut}) || len(x.present()) != 4 {
		t.Errorf("asked for %+v, chunks %v are here", got, x.present())
	}
}

// TestFetchInOrder: what others have read comes in their order, a few requests at a
// time, one while a reader waits for another.
func TestFetchInOrder(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		n := newNodeIn(t, dir, Options{})
		b := newBuilder(chunk.None)
		b.blob()
		b.files(cut)
		b.blob()
		const others = 20
		for range others {
			b.files(cut)
			b.gap(2 * maxGap) // so that each comes by a request of its own
		}
		x := n.image(b)
		var wanted []pool.Entry
		for i := others; i > 0; i-- {
			c := x.linked.Chunk(i)
			wanted = append(wanted, pool.Entry{Digest: c.Digest, Size: c.Size}, pool.Entry{Digest: chunk.Sum(chunk.BLAKE3, []byte{byte(i)}), Size: 1})
		}
		hold := make(chan struct{})
		var flying, most atomic.Int32
		n.setFault(func(_ context.Context, ref blob.Ref, _, _ int64) *memblob.Fault {
			if ref.Digest == b.tree.Blobs[0].Digest {
				<-hold
				return nil
			}
			most.Store(max(most.Load(), flying.Add(1)))
			time.Sleep(10 * time.Millisecond)
			flying.Add(-1)
			return nil
		})
		read := make(chan error)
		go func() { read <- x.chunk(t, 0) }()
		synctest.Wait()
		n.asked()
		ordered := func(some []pool.Entry, atATime int32) {
			t.Helper()
			most.Store(0)
			x.FetchInOrder(t.Context(), some)
			time.Sleep(time.Second)
			got := n.asked()
			inOrder := atATime > 1 || slices.IsSortedFunc(got, func(a, b asked) int { return int(b.off - a.off) })
			if len(got) != others/2 || !inOrder || most.Load() != atATime {
				t.Errorf("%d requests, %d at a time, want %d: %+v", len(got), most.Load(), atATime, got)
			}
		}
		ordered(wanted[:others], 1) // each is followed by one that the image does not have
		close(hold)
		must(t, <-read)
		x.settle()
		ordered(wanted[others:], orderedRequests)
		if p := x.present(); len(p) != others+1 {
			t.Errorf("%d chunks are here", len(p))
		}
		x.close(t)
	})
}

// TestTold: what is told comes with what of it lies around it and nothing else, by who fetches it in
// order, and by who waits for some of it meanwhile. Later readers bring what they do otherwise.
func TestTold(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		n := newNodeIn(t, dir, Options{})
		b := newBuilder(chunk.None)
		b.blob()
		b.files(cut, cut, cut, cut, cut, cut, cut) // 0 to 6
		for range orderedRequests {
			b.gap(2 * maxGap)
			b.files(cut) // 7 to 10
		}
		b.gap(2 * maxGap)
		b.files(cut, cut, cut, cut, cut, cut) // 11 to 16
		x := n.image(b)
		tell := func(chunks ...int) (all []pool.Entry) {
			for _, i := range chunks {
				c := x.linked.Chunk(i)
				all = append(all, pool.Entry{Digest: c.Digest, Size: c.Size})
			}
			return all
		}
		asks := func(from, to int) asked {
			first, last := x.linked.Stored(x.linked.Chunk(from)), x.linked.Stored(x.linked.Chunk(to))
			return asked{b.tree.Blobs[0].Digest, first.Offset, last.Offset + last.Length - first.Offset}
		}
		check := func(want ...asked) {
			t.Helper()
			got := n.asked()
			slices.SortFunc(got, func(a, b asked) int { return int(a.off - b.off) })
			if !slices.Equal(got, want) {
				t.Errorf("asked for %+v, want %+v", got, want)
			}
		}
		x.FetchInOrder(t.Context(), tell(3, 2))
		x.settle()
		check(asks(2, 3)) // from before the first
		x.FetchInOrder(t.Context(), tell(0, 1, 2, 3, 4, 6))
		x.settle()
		check(asks(0, 1), asks(4, 4), asks(6, 6)) // up to what is here, and without what is not told

		hold := make(chan struct{})
		n.setFault(func(context.Context, blob.Ref, int64, int64) *memblob.Fault {
			<-hold
			return nil
		})
		done := make(chan struct{})
		go func() {
			defer close(done)
			x.FetchInOrder(t.Context(), tell(7, 8, 9, 10, 11, 12, 13, 14))
		}()
		synctest.Wait()
		check(asks(7, 7), asks(8, 8), asks(9, 9), asks(10, 10))
		read := make(chan error)
		go func() { read <- x.chunk(t, 12) }()
		synctest.Wait()
		check(asks(12, 14)) // more than else, and not what is behind it
		close(hold)
		must(t, <-read)
		<-done
		x.settle()
		check(asks(11, 11))

		// What was told and has not come is no better known than the rest.
		_, err := x.engine.pool.Evict(&pool.References{}, math.MaxInt64)
		must(t, err)
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		x.FetchInOrder(ended, tell(12, 13, 14))
		must(t, x.chunk(t, 12))
		x.settle()
		check(asks(12, 13))
		x.close(t)
	})
}
