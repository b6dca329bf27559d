package fill

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/shale-image/shale/chunk"
)

// readers play the kernel: a sequential read of [from, to) with a readahead of
// 128 KiB, which arrives page by page, the last one first.
func readAhead128(t *testing.T, x *img, from, to int64) {
	for off := from; off < to; off += 128 * kib {
		var wg sync.WaitGroup
		for page := min(off+128*kib, to) - 4*kib; page >= off; page -= 4 * kib {
			wg.Go(func() { must(t, x.read(t.Context(), t, page, 4*kib)) })
		}
		wg.Wait()
	}
}

// At 20 ms a request a sequential reader gets more than nine tenths of the
// link, one that jumps about causes next to no traffic that it does not need.
func TestSequentialReaderGetsTheLink(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, Options{})
		b := newBuilder(chunk.None)
		b.blob()
		for range 30 {
			b.files(1<<20, 16*kib, 16*kib)
		}
		b.files(16 << 20)
		w := &wire{Source: n.source, delay: 20 * time.Millisecond, rate: 100e6 / 8}
		x := n.open(n.link(b), w)
		s := x.linked.Segments[0]
		start := time.Now()
		readAhead128(t, x, s.Flat, s.Flat+s.Size)
		took := time.Since(start)
		if least := time.Duration(float64(s.Size) / w.rate * 1e9); took > least*10/9 {
			t.Errorf("%d bytes took %v, the link needs %v", s.Size, took, least)
		}
		if w.bytes != s.Size || w.requests > 120 {
			t.Errorf("%d requests, %d bytes", w.requests, w.bytes)
		}
		t.Logf("%d bytes in %v, %d requests", w.bytes, took, w.requests)
	})
}

func TestRandomReaderIsNotSequential(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, Options{Window: 128 * kib, Growth: 1})
		b := newBuilder(chunk.None)
		b.blob()
		b.files(16 << 20)
		x := n.image(b)
		s := x.linked.Segments[0]
		for i := range int64(16) { // far apart, and each where no other was
			readAhead128(t, x, s.Flat+(i*7%16)<<20, s.Flat+(i*7%16)<<20+128*kib)
		}
		synctest.Wait()
		if got := len(x.present()); got > 16*3 { // two that are read, one of the window
			t.Errorf("%d chunks came for 16 reads of 2", got)
		}
	})
}

// Of an image that starts again all is here that it reads: nothing is fetched for
// it, however sequential it looks, until it reads what is not.
func TestNothingIsFetchedAheadOfWhoMissesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, Options{Window: 128 * kib, Growth: 1})
		b := newBuilder(chunk.None)
		b.blob()
		b.files(16 << 20)
		dir := n.link(b)
		x := n.open(dir, n.source)
		s := x.linked.Segments[0]
		readAhead128(t, x, s.Flat, s.Flat+384*kib)
		x.settle()
		x.close(t)

		x = n.open(dir, n.source)
		here := x.present()
		for range 8 {
			readAhead128(t, x, s.Flat, s.Flat+384*kib)
		}
		x.settle()
		if now := x.present(); len(now) != len(here) {
			t.Errorf("chunks %v came without being read, of %v", now, here)
		}
		readAhead128(t, x, s.Flat+384*kib, s.Flat+1024*kib)
		x.settle()
		if now := x.present(); len(now) < len(here)+16 {
			t.Errorf("of a reader that goes on behind what is here %v came", now)
		}
	})
}
