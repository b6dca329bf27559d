package fill

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/memblob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/link"
)

const kib = 1 << 10

// The files of these images are stored as they are, so that sizes are exact.
func TestMerging(t *testing.T) {
	n := newNode(t, Options{Window: 256 * kib, Neighbours: 64 * kib, Growth: 1})
	for k, c := range []struct {
		name  string
		build func(b *builder)
		has   []int // chunks that are here already
		read  [2]int
		want  string
	}{
		{"a file, then its neighbours up to 64 KiB",
			func(b *builder) { b.files(100*kib, 40*kib, 20*kib, 10*kib) }, nil, [2]int{0, 1}, "[0+160]"},
		{"a file up to the window",
			func(b *builder) { b.files(400*kib, 40*kib) }, nil, [2]int{0, 1}, "[0+256]"},
		{"no neighbours beyond the window",
			func(b *builder) { b.files(250*kib, 20*kib) }, nil, [2]int{0, 1}, "[0+250]"},
		{"from the middle of a file",
			func(b *builder) { b.files(400*kib, 40*kib) }, nil, [2]int{5, 6}, "[320+120]"},
		{"over a gap of 16 KiB",
			func(b *builder) { b.files(10 * kib); b.gap(16 * kib); b.files(10 * kib) }, nil, [2]int{0, 1}, "[0+36]"},
		{"not over a larger one",
			func(b *builder) { b.files(10 * kib); b.gap(16*kib + 1); b.files(10 * kib) }, nil, [2]int{0, 1}, "[0+10]"},
		{"over one of 64 KiB if both sides are read",
			func(b *builder) { b.files(10 * kib); b.gap(64 * kib); b.files(10 * kib) }, nil, [2]int{0, 2}, "[0+84]"},
		{"not over a larger one even then",
			func(b *builder) { b.files(10 * kib); b.gap(65 * kib); b.files(10 * kib) }, nil, [2]int{0, 2}, "[0+10 75+10]"},
		{"not over a chunk that is here",
			func(b *builder) { b.files(192 * kib) }, []int{1}, [2]int{0, 1}, "[0+64]"},
		{"but if both sides are read",
			func(b *builder) { b.files(192 * kib) }, []int{1}, [2]int{0, 3}, "[0+192]"},
		{"not over two even then",
			func(b *builder) { b.files(256 * kib) }, []int{1, 2}, [2]int{0, 4}, "[0+64 192+64]"},
		{"not across blobs",
			func(b *builder) { b.files(10 * kib); b.blob(); b.files(10 * kib) }, nil, [2]int{0, 1}, "[0+10]"},
		{"all that a read wants, whatever the window",
			func(b *builder) { b.files(512 * kib) }, nil, [2]int{0, 7}, "[0+448]"},
		{"two requests for a read over two blobs",
			func(b *builder) { b.files(64 * kib); b.blob(); b.files(64 * kib) }, nil, [2]int{0, 2}, "[0+64 0+64]"},
		{"as many spans as a chunk may have",
			func(b *builder) { b.files(256 * kib); b.respan(128 * kib / index.MaxSpans) }, nil, [2]int{0, 1}, "[0+128]"},
		{"not more of them, whatever a read wants",
			func(b *builder) { b.files(256 * kib); b.respan(64 * kib / index.MaxSpans) }, nil, [2]int{0, 2}, "[0+64 64+64]"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBuilder(chunk.None)
			b.seed = uint64(k+1) * 1000
			b.blob()
			c.build(b)
			x := n.image(b)
			for _, i := range c.has {
				ch := x.linked.Chunk(i)
				s, at := x.address(ch)
				must(t, s.pool.Store(at.off, n.pieces[ch.Digest]))
			}
			n.asked()
			last := x.linked.Chunk(c.read[1] - 1)
			off := x.linked.Chunk(c.read[0]).Flat
			must(t, x.read(t.Context(), t, off, last.Flat+int64(last.Size)-off))
			x.settle()
			var got []string
			for _, a := range n.asked() {
				got = append(got, fmt.Sprintf("%d+%d", a.off/kib, a.n/kib))
			}
			slices.Sort(got)
			if s := fmt.Sprint(got); s != c.want {
				t.Errorf("requests (KiB) %s, want %s", s, c.want)
			}
		})
	}
}

// respan makes spans of so many bytes of the first blob, which stores content as it is.
func (b *builder) respan(each int64) {
	b.broken = func() {
		x := &b.tree.Blobs[0]
		size := x.StreamSize()
		x.Spans = nil
		for at := int64(0); at < size; at += each {
			x.Append(index.Span{Size: each, Offset: at, Length: each})
		}
	}
}

// A slow link saves requests, a fast one far away saves round trips.
func TestReachGrows(t *testing.T) {
	for _, c := range []struct {
		delay          time.Duration
		rate           float64
		window, beyond int64 // at least, and at most a tenth more
	}{
		{0, 1 << 40, 256 * kib, 64 * kib},
		{time.Millisecond, 12.5e6, 256 * kib, 64 * kib},
		{5 * time.Millisecond, 13.2e6, 256 * kib, 64 * kib},
		{21 * time.Millisecond, 12.5e6, 1024 * kib, 128 * kib},
		{time.Second, 12.5e6, 2048 * kib, 256 * kib},
	} {
		synctest.Test(t, func(t *testing.T) {
			n := newNode(t, Options{Window: 256 * kib, Neighbours: 64 * kib})
			b := newBuilder(chunk.None)
			b.blob()
			b.files(8 << 20)
			x := n.open(n.link(b), &wire{Source: n.source, delay: c.delay, rate: c.rate})
			for i := 0; i < x.linked.Chunks(); i += 20 {
				must(t, x.chunk(t, i))
				x.settle()
			}
			window, beyond := x.reach()
			if window < c.window || window > c.window*11/10 || beyond < c.beyond || beyond > c.beyond*11/10 {
				t.Errorf("%v, %.0f B/s: %d and %d KiB, want %d and %d", c.delay, c.rate, window/kib, beyond/kib, c.window/kib, c.beyond/kib)
			}
		})
	}
}

// Whatever is here or in flight, a plan has what is asked for, keeps its limits,
// and claims nothing twice.
func TestPlanProperties(t *testing.T) {
	n := newNode(t, Options{})
	var images []*img
	for seed := range uint64(4) {
		images = append(images, n.image(mixed(chunk.Zstd, 10+seed, 11+seed, 12+seed)))
	}
	rapid.Check(t, func(t *rapid.T) {
		x := rapid.SampledFrom(images).Draw(t, "image")
		count := x.linked.Chunks()
		n.engine.flights = map[address]*flight{}
		for _, i := range rapid.SliceOf(rapid.IntRange(0, count-1)).Draw(t, "busy") {
			_, at := x.address(x.linked.Chunk(i))
			n.engine.flights[at] = &flight{}
		}
		defer clear(n.engine.flights)
		i := rapid.IntRange(0, count-1).Draw(t, "chunk")
		hi := min(count, i+rapid.IntRange(0, 20).Draw(t, "more"))
		window := rapid.Int64Range(1, 1<<20).Draw(t, "window")
		beyond := rapid.Int64Range(0, 1<<18).Draw(t, "beyond")

		wants := x.collect(i, hi, window, beyond)
		c := x.linked.Chunk(i)
		if x.here(c) {
			if len(wants) > 0 {
				t.Fatalf("chunk %d is in flight and yet planned", i)
			}
			return
		}
		if !slices.ContainsFunc(wants, func(w want) bool { return w.index == i }) {
			t.Fatalf("chunk %d is not in %v", i, wants)
		}
		var bytes, mine int64 // stored bytes to be fetched; those of the file that was read
		spans, planned := map[int]bool{}, map[int]bool{}
		for k, w := range wants {
			if x.here(w.chunk) {
				t.Fatalf("chunk %d is in flight and yet planned", w.index)
			}
			planned[w.index] = true
			fresh := !spans[w.chunk.Span]
			if fresh {
				s, _ := x.linked.Span(w.chunk.Span)
				bytes += s.Length
				spans[w.chunk.Span] = true
			}
			own := w.index >= i
			for j := i + 1; j <= w.index && own; j++ {
				own = j < hi || x.linked.Chunk(j).Next
			}
			if own {
				mine += x.linked.StoredShare(w.chunk)
			}
			if w.index < i && w.chunk.Span != c.Span {
				t.Fatalf("chunk %d lies before chunk %d and not in the same batch", w.index, i)
			}
			if k == 0 {
				continue
			}
			if last := wants[k-1]; w.index <= last.index || w.chunk.Blob != c.Blob || w.chunk.Offset < last.chunk.End() {
				t.Fatalf("%d of %v does not follow", k, wants)
			}
			last, this := x.linked.Stored(wants[k-1].chunk), x.linked.Stored(w.chunk)
			gap, most := this.Offset-last.Offset-last.Length, int64(maxGap)
			if w.index >= hi {
				most = spareGap
			}
			if fresh && (gap < 0 || gap > most) {
				t.Fatalf("%d of %v does not follow: gap %d", k, wants, gap)
			}
			if fresh && w.index >= hi && (bytes > window || !own && bytes > mine+beyond) {
				t.Fatalf("%d bytes, %d of them of the file that was read; limits are %d and %d", bytes, mine, window, beyond)
			}
		}
		if len(x.segments) > 1 {
			return // what a batch has may lie in several
		}
		for j := range count {
			if c := x.linked.Chunk(j); spans[c.Span] && !planned[j] && !x.here(c) {
				t.Fatalf("chunk %d is fetched with %v and yet not in it", j, wants)
			}
		}
	})
}

// A batch is fetched once, for all that it has, and within no limit but that of
// the next.
func TestBatches(t *testing.T) {
	for _, c := range []struct {
		name       string
		window     int64
		neighbours func(first, second int64) int64 // stored bytes of the batches
		has        []int
		read       int
		want       string
	}{
		{"the batch, whatever the window", 1, func(a, b int64) int64 { return 1 }, nil, 0, "[0 1 2 3]"},
		{"also from its end", 1, func(a, b int64) int64 { return 1 }, nil, 3, "[0 1 2 3]"},
		{"the next one if the window has room", 1 << 20, func(a, b int64) int64 { return a + b }, nil, 1, "[0 1 2 3 4 5 6]"},
		{"but not if neighbours have none", 1 << 20, func(a, b int64) int64 { return b - 1 }, nil, 1, "[0 1 2 3]"},
		{"but not if the window has none", 48 << 10, func(a, b int64) int64 { return a + b }, nil, 1, "[0 1 2 3]"},
		{"what is here is not brought again", 1, func(a, b int64) int64 { return 1 }, []int{0, 2}, 1, "[1 3]"},
		{"from behind what is here", 1 << 20, func(a, b int64) int64 { return a + b }, []int{0, 2, 5}, 3, "[1 3 4 6]"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBuilder(chunk.Zstd)
			b.blob()
			b.batch(20*kib, 1, 30*kib, 15*kib)
			b.batch(40*kib, 7*kib, 5)
			spans := b.spans[0].Spans
			n := newNode(t, Options{Window: c.window, Neighbours: c.neighbours(spans[0].Length, spans[1].Length), Growth: 1})
			x := n.image(b)
			for _, i := range c.has {
				ch := x.linked.Chunk(i)
				s, at := x.address(ch)
				must(t, s.pool.Store(at.off, n.pieces[ch.Digest]))
			}
			n.asked()
			must(t, x.chunk(t, c.read))
			x.settle()
			if got := n.asked(); len(got) != 1 || got[0].off != 0 {
				t.Errorf("requests: %v", got)
			}
			var brought []int
			for _, i := range x.present() {
				if !slices.Contains(c.has, i) {
					brought = append(brought, i)
				}
			}
			if got := fmt.Sprint(brought); got != c.want {
				t.Errorf("brought %s, want %s", got, c.want)
			}
			if s := x.Stats(); s.Chunks != int64(len(brought)) || s.Requests != 1 {
				t.Errorf("%+v", s)
			}
			x.all(t)
		})
	}
}

// What a batch has may lie in segments whose order is another: that of their
// numbers, which are random.
func TestBatchAcrossSegments(t *testing.T) {
	tested := false
	for seed := uint64(0); seed < 64 && !tested; seed += 4 {
		n := newNode(t, Options{})
		p, q, r := content(seed, 20*kib), content(seed+1, 30*kib), content(seed+2, 5*kib)
		before := newBuilder(chunk.Zstd)
		before.blob()
		before.file(r)
		n.image(before) // its chunk has a place, and is not here
		b := newBuilder(chunk.Zstd)
		b.blob()
		b.pack(p, q, r)
		x := n.image(b)
		if len(x.segments) != 2 {
			t.Fatalf("%d segments", len(x.segments))
		}
		tested = x.linked.Chunk(0).Offset > 0 // r comes first
		must(t, x.chunk(t, 1))
		x.settle()
		n.asked()
		x.all(t)
		if got := n.asked(); len(got) > 1 {
			t.Errorf("requests: %v", got)
		}
	}
	if !tested {
		t.Error("no order was another")
	}
}

// The numbers of an index are anybody's. What link lets through of them harms
// nobody but the chunks of the span.
func TestInvalidChunkFailsAlone(t *testing.T) {
	build := func() *builder {
		b := newBuilder(chunk.Zstd)
		b.blob()
		b.file(make([]byte, 10*kib)[:1])
		b.batch(10*kib, 20*kib)
		b.batch(11*kib, 20*kib, 5)
		b.files(30*kib, 100*kib)
		return b
	}
	for name, c := range map[string]struct {
		broken func(c *index.Chunk, s *index.Span) // c lies in s
		span   bool                                // all the span's chunks fail
	}{
		"wrong digest":       {func(c *index.Chunk, s *index.Span) { c.Digest.Sum[0]++ }, false},
		"wrong place":        {func(c *index.Chunk, s *index.Span) { c.Offset++; c.Size-- }, false},
		"wrong codec":        {func(c *index.Chunk, s *index.Span) { s.Codec = chunk.LZ4 }, true},
		"shorter":            {func(c *index.Chunk, s *index.Span) { s.Length-- }, true},
		"a byte":             {func(c *index.Chunk, s *index.Span) { s.Length = 1 }, true},
		"begins later":       {func(c *index.Chunk, s *index.Span) { s.Length--; s.Offset++ }, true},
		"across two batches": {func(c *index.Chunk, s *index.Span) { c.Offset += 25 * kib }, false},
	} {
		for _, read := range []int{0, 1, 2, 3, 4} {
			t.Run(fmt.Sprint(name, " ", read), func(t *testing.T) {
				n := newNode(t, Options{})
				b := build()
				bad := &b.tree.Chunks[3] // the first of the second batch
				var digests []chunk.Digest
				b.broken = func() {
					s := &b.tree.Blobs[0].Spans[2]
					c.broken(bad, s)
					digests = []chunk.Digest{bad.Digest}
					for _, ch := range b.tree.Chunks {
						if c.span && s.Start <= ch.Offset && ch.End() <= s.End() {
							digests = append(digests, ch.Digest)
						}
					}
				}
				x := n.image(b)
				for k := range x.linked.Chunks() {
					i := (k + read) % x.linked.Chunks()
					err := x.chunk(t, i)
					if isBad := slices.Contains(digests, x.linked.Chunk(i).Digest); isBad != errors.Is(err, chunk.ErrCorrupt) || !isBad && err != nil {
						t.Errorf("chunk %d: %v", i, err)
					}
				}
				x.settle()
				// However often: the others came by the first requests already.
				if got := len(n.asked()); got > 5+len(digests) {
					t.Errorf("%d requests", got)
				}
			})
		}
	}
	for name, broken := range map[string]func(c *index.Chunk, s *index.Span){
		"chunk behind the blob":   func(c *index.Chunk, s *index.Span) { c.Offset = 1 << 40 },
		"span behind the blob":    func(c *index.Chunk, s *index.Span) { s.Offset = 1 << 40 },
		"span longer than others": func(c *index.Chunk, s *index.Span) { s.Length = chunk.MaxSize },
		"unknown codec":           func(c *index.Chunk, s *index.Span) { s.Codec = 77 },
		"not as long as it is":    func(c *index.Chunk, s *index.Span) { s.Codec = chunk.None },
	} {
		n := newNode(t, Options{})
		b := build()
		b.broken = func() { broken(&b.tree.Chunks[3], &b.tree.Blobs[0].Spans[2]) }
		n.store(b)
		if err := link.Link(t.Context(), &b.tree, n.pool, filepath.Join(t.TempDir(), "linked")); !errors.Is(err, index.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A batch that comes damaged fails for its chunks, whichever of them are wanted
// and whatever comes with it.
func TestDamagedBatch(t *testing.T) {
	for has := range 3 {
		n := newNode(t, Options{Window: 1 << 20, Neighbours: 1 << 20})
		b := newBuilder(chunk.Zstd)
		b.blob()
		b.batch(20*kib, 30*kib, 15*kib)
		b.batch(40*kib, 7*kib)
		x := n.image(b)
		for i := range has {
			ch := x.linked.Chunk(i)
			s, at := x.address(ch)
			must(t, s.pool.Store(at.off, n.pieces[ch.Digest]))
		}
		n.setFault(func(context.Context, blob.Ref, int64, int64) *memblob.Fault {
			return &memblob.Fault{Flip: 1} // the request begins with the batch
		})
		if err := x.chunk(t, 2); !errors.Is(err, chunk.ErrCorrupt) {
			t.Errorf("has %d: %v", has, err)
		}
		x.settle()
		n.setFault(nil)
		n.asked()
		want := fmt.Sprint([]int{0, 1, 2, 3, 4}[:has], []int{3, 4})
		if got := x.present(); fmt.Sprint(got[:has], got[has:]) != want {
			t.Errorf("has %d: %v are here, want %s", has, got, want)
		}
		x.all(t)
		if got := n.asked(); len(got) != 1 {
			t.Errorf("has %d: requests %v", has, got)
		}
	}
}
