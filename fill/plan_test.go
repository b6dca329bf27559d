package fill

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

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
		{"over a gap of 64 KiB",
			func(b *builder) { b.files(10 * kib); b.gap(64 * kib); b.files(10 * kib) }, nil, [2]int{0, 1}, "[0+84]"},
		{"not over a larger one",
			func(b *builder) { b.files(10 * kib); b.gap(64*kib + 1); b.files(10 * kib) }, nil, [2]int{0, 1}, "[0+10]"},
		{"over a chunk that is here",
			func(b *builder) { b.files(192 * kib) }, []int{1}, [2]int{0, 1}, "[0+192]"},
		{"not over two",
			func(b *builder) { b.files(256 * kib) }, []int{1, 2}, [2]int{0, 1}, "[0+64]"},
		{"not across blobs",
			func(b *builder) { b.files(10 * kib); b.blob(); b.files(10 * kib) }, nil, [2]int{0, 1}, "[0+10]"},
		{"all that a read wants, whatever the window",
			func(b *builder) { b.files(512 * kib) }, nil, [2]int{0, 7}, "[0+448]"},
		{"two requests for a read over two blobs",
			func(b *builder) { b.files(64 * kib); b.blob(); b.files(64 * kib) }, nil, [2]int{0, 2}, "[0+64 0+64]"},
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

// Whatever is here or in flight, a plan begins with what is asked for, keeps
// its limits, and claims nothing twice.
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
		if _, at := x.address(c); n.engine.flights[at] != nil {
			if len(wants) > 0 {
				t.Fatalf("chunk %d is in flight and yet planned", i)
			}
			return
		}
		if len(wants) == 0 || wants[0].index != i {
			t.Fatalf("chunk %d is not the first of %v", i, wants)
		}
		var bytes, outside int64
		own := true
		for k, w := range wants {
			if n.engine.flights[w.at] != nil {
				t.Fatalf("chunk %d is in flight and yet planned", w.index)
			}
			for j := i + 1; k > 0 && j <= w.index && own; j++ {
				own = j < hi || x.linked.Chunk(j).Next
			}
			bytes += int64(w.chunk.Length)
			if !own && w.index >= hi {
				outside += int64(w.chunk.Length)
			}
			if k == 0 {
				continue
			}
			last := wants[k-1].chunk
			gap := w.chunk.Offset - last.Offset - int64(last.Length)
			if w.index <= wants[k-1].index || w.chunk.Blob != c.Blob || gap < 0 || gap > maxGap {
				t.Fatalf("%d of %v does not follow: gap %d", k, wants, gap)
			}
			if w.index >= hi && (bytes > window || outside > beyond) {
				t.Fatalf("%d bytes, %d of them of other files; limits are %d and %d", bytes, outside, window, beyond)
			}
		}
	})
}

// The numbers of an index are anybody's. What link lets through of them harms
// nobody but the chunk itself.
func TestInvalidChunkFailsAlone(t *testing.T) {
	for name, broken := range map[string]func(c *index.Chunk){
		"offset behind the blob": func(c *index.Chunk) { c.Offset = 1 << 40 },
		"length behind the blob": func(c *index.Chunk) { c.Length = chunk.MaxSize },
		"wrong codec":            func(c *index.Chunk) { c.Codec = chunk.LZ4 },
		"wrong digest":           func(c *index.Chunk) { c.Digest.Sum[0]++ },
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, Options{})
			b := small()
			bad := &b.tree.Chunks[1]
			b.broken = func() { broken(bad) }
			x := n.image(b)
			for i := range x.linked.Chunks() {
				err := x.chunk(t, i)
				if isBad := x.linked.Chunk(i).Digest == bad.Digest; isBad != errors.Is(err, chunk.ErrCorrupt) || !isBad && err != nil {
					t.Errorf("chunk %d: %v", i, err)
				}
			}
		})
	}
	good := link.Chunk{Size: 1, Length: 1}
	if !valid(good) {
		t.Error("a good chunk is not valid")
	}
	for _, change := range []func(c *link.Chunk){
		func(c *link.Chunk) { c.Size = 0 },
		func(c *link.Chunk) { c.Size = chunk.MaxSize + 1 },
		func(c *link.Chunk) { c.Length = 0 },
		func(c *link.Chunk) { c.Length = 1<<32 - 1 },
		func(c *link.Chunk) { c.Offset = -1 },
	} {
		c := good
		if change(&c); valid(c) {
			t.Errorf("%+v is valid", c)
		}
	}
}
