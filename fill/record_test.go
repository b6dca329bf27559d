package fill

import (
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/shale-image/shale/chunk"
)

// flats are the addresses of a recording, relative to that of the first chunk.
func flats(x *img) (out []int64) {
	all, _ := x.Touched()
	for _, t := range all {
		out = append(out, (t.Flat-x.linked.Chunk(0).Flat)/chunk.Block)
	}
	return out
}

func TestTouched(t *testing.T) {
	n := newNode(t, Options{})
	b := newBuilder(chunk.Zstd)
	b.blob()
	b.files(cut*4, 100)
	x := n.image(b)
	at := x.linked.Chunk(0).Flat
	must(t, x.read(t.Context(), t, 0, 4096)) // metadata are no file's
	must(t, x.read(t.Context(), t, at+9*chunk.Block, 4096))
	must(t, x.read(t.Context(), t, at+2*chunk.Block+4096, 2*chunk.Block))
	must(t, x.read(t.Context(), t, at+3*chunk.Block, 3*chunk.Block)) // 3 and 4 again
	must(t, x.read(t.Context(), t, at+9*chunk.Block+8192, 100))
	if got, want := flats(x), []int64{9, 2, 3, 4, 5}; !slices.Equal(got, want) {
		t.Errorf("blocks %d, want %d", got, want)
	}
	if _, lost := x.Touched(); lost {
		t.Error("lost")
	}
	if x.Linked().MetaSum != x.linked.MetaSum {
		t.Error("of another linked image")
	}
	// What comes along, or ahead, was not read.
	x.settle()
	if p := len(x.present()); p < 4 {
		t.Errorf("%d chunks are here", p)
	}
	n.reopen(Options{Unrecorded: true})
	y := n.open(x.linked.Dir, n.source)
	y.all(t)
	if got, lost := y.Touched(); len(got) != 0 || lost {
		t.Errorf("%v, though it was not to be recorded", got)
	}
}

// Who waits is noted with how long, from when on.
func TestTouchedWait(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		n := newNodeIn(t, dir, Options{})
		b := newBuilder(chunk.None)
		b.blob()
		b.files(cut)
		w := &wire{Source: n.source, delay: 30 * time.Millisecond, rate: 1e9}
		x := n.open(n.link(b), w)
		time.Sleep(100 * time.Millisecond)
		must(t, x.chunk(t, 0))
		got, _ := x.Touched()
		if len(got) != cut/chunk.Block {
			t.Fatalf("%v", got)
		}
		for _, g := range got {
			if g.At < 99*time.Millisecond || g.At > 101*time.Millisecond || g.Wait < 30*time.Millisecond || g.Wait > 40*time.Millisecond {
				t.Errorf("read at %v, waited %v", g.At, g.Wait)
			}
		}
		x.close(t)
	})
}

// A recording is bounded, and says when it is not all.
func TestTouchedBound(t *testing.T) {
	r := newRecord(4 * maxTouches * chunk.Block)
	for i := range int64(2 * maxTouches) {
		r.note(2*i*chunk.Block, (2*i+1)*chunk.Block, 0)
	}
	if len(r.touches) != maxTouches || !r.lost {
		t.Errorf("%d, lost: %v", len(r.touches), r.lost)
	}
}

// In a container that runs for days the times end, and do not begin again.
func TestTouchedLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRecord(4 * chunk.Block)
		for i, after := range []time.Duration{0, 11 * time.Hour, 48 * time.Hour} {
			time.Sleep(after)
			r.note(int64(i)*chunk.Block, int64(i+1)*chunk.Block, time.Duration(i)*24*time.Hour)
		}
		for i, at := range []time.Duration{0, 0, 11*time.Hour + 48*time.Hour - 48*time.Hour} {
			if got := time.Duration(r.touches[i].at) * tick; got != at {
				t.Errorf("block %d was read at %v, want %v", i, got, at)
			}
		}
		if r.touches[2].wait != 1<<32-1 {
			t.Errorf("waited %v", time.Duration(r.touches[2].wait)*tick)
		}
		time.Sleep(24 * time.Hour)
		if r.note(3*chunk.Block, 4*chunk.Block, 0); r.touches[3].at != 1<<32-1 {
			t.Errorf("read at %v", time.Duration(r.touches[3].at)*tick)
		}
	})
}

// BenchmarkRecord is a hit of one page and of 128 KiB: not recorded, of blocks that
// were read before, and for the first time. docs/BENCHMARKS.md has figures.
func BenchmarkRecord(b *testing.B) {
	for _, size := range []int64{4 << 10, 128 << 10} {
		for _, how := range []string{"off", "again", "first"} {
			b.Run(fmt.Sprintf("%dK/%s", size>>10, how), func(b *testing.B) {
				n := newNode(b, Options{Unrecorded: how == "off"})
				w := newBuilder(chunk.None)
				w.blob()
				w.files(64 << 20)
				x := n.image(w)
				x.all(b)
				x.settle()
				start, end := x.linked.Chunk(0).Flat, x.Size()-size
				p := make([]byte, size)
				off := start
				b.SetBytes(size)
				b.ResetTimer()
				for b.Loop() {
					if how == "first" && off == start {
						b.StopTimer()
						x.record = newRecord(x.linked.FlatSize)
						b.StartTimer()
					}
					if ok, err := x.TryReadAt(p, off); !ok || err != nil {
						b.Fatal(ok, err)
					}
					if off += max(size, chunk.Block); off > end {
						off = start
					}
				}
			})
		}
	}
}
