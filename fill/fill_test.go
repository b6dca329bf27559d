package fill

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/memblob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/link"
)

// mixed builds an image of files of many sizes; seeds decide their content.
func mixed(codec chunk.Codec, seeds ...uint64) *builder {
	b := newBuilder(codec)
	for _, seed := range seeds {
		r := rand.New(rand.NewPCG(seed, 2))
		b.blob()
		for i := range 15 {
			n := 1 + r.IntN(1<<(4+r.IntN(14)))
			b.file(content(seed*1000+uint64(i), n))
			if r.IntN(4) == 0 {
				b.gap(r.IntN(100 << 10))
			}
		}
		b.file(content(seed*1000+900, 400<<10))
		if codec == chunk.None {
			continue
		}
		for i := range uint64(3) {
			var files [][]byte
			for k := range uint64(2 + r.IntN(12)) {
				files = append(files, content(seed*1000+100*i+100+k, 64+r.IntN(10<<10)))
			}
			b.pack(files...)
		}
	}
	return b
}

// Several images that share chunks, read by many at once, with faults that
// pass: every read is right, or fails while there are faults.
func TestReadsAreTrue(t *testing.T) {
	for _, faults := range []bool{false, true} {
		n := newNode(t, Options{Requests: 4})
		images := []*img{
			n.image(mixed(chunk.Zstd, 1, 2)),
			n.image(mixed(chunk.LZ4, 2, 3)), // other blobs, some of the same chunks
			n.image(mixed(chunk.Zstd, 1, 2, 3)),
		}
		broken := errors.New("broken")
		var asked atomic.Int64
		if faults {
			n.setFault(func(_ context.Context, _ blob.Ref, _, n int64) *memblob.Fault {
				switch k := asked.Add(1); k % 4 {
				case 0:
					return &memblob.Fault{Flip: 0x10}
				case 1:
					return &memblob.Fault{After: k * 977 % n, Err: broken}
				}
				return nil
			})
		}
		var wg sync.WaitGroup
		for k := range 12 {
			wg.Go(func() {
				r := rand.New(rand.NewPCG(uint64(k), 3))
				im := images[k%len(images)]
				for range 150 {
					i := r.IntN(im.linked.Chunks())
					c := im.linked.Chunk(i)
					end := c.Flat + int64(c.Size)
					for i++; r.IntN(3) > 0 && i < im.linked.Chunks(); i++ {
						next := im.linked.Chunk(i)
						if next.Flat-end >= chunk.Block {
							break // another image's
						}
						end = next.Flat + int64(next.Size)
					}
					from := c.Flat + r.Int64N(int64(c.Size))
					err := im.read(t.Context(), t, from, 1+r.Int64N(end-from))
					if err != nil && !(faults && (errors.Is(err, broken) || errors.Is(err, chunk.ErrCorrupt))) {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		n.setFault(nil)
		distinct := map[address]bool{}
		var brought int64
		for _, im := range images {
			im.all(t)
			im.settle()
			for i := range im.linked.Chunks() {
				_, at := im.address(im.linked.Chunk(i))
				distinct[at] = true
			}
			brought += im.Stats().Chunks
		}
		if brought != int64(len(distinct)) {
			t.Errorf("%d chunks were brought, there are %d", brought, len(distinct))
		}
		if len(n.engine.flights) != 0 {
			t.Errorf("%d flights are left", len(n.engine.flights))
		}
	}
}

func TestReadOfMetadataAndOutside(t *testing.T) {
	n := newNode(t, Options{})
	x := n.image(mixed(chunk.Zstd, 1))
	must(t, x.read(t.Context(), t, 0, x.linked.MetaSize))
	must(t, x.read(t.Context(), t, x.linked.MetaSize-10, x.linked.Segments[0].Flat-x.linked.MetaSize+20))
	if got := n.asked(); len(got) != 1 {
		t.Errorf("%d requests for metadata and one chunk", len(got))
	}
	p := make([]byte, 100)
	for _, off := range []int64{-1, x.Size() - 99, 1 << 62, -1 << 63} {
		if _, err := x.TryReadAt(p, off); err == nil {
			t.Errorf("TryReadAt(%d) of an image of %d bytes", off, x.Size())
		}
		if err := x.ReadAt(t.Context(), p, off); err == nil {
			t.Errorf("ReadAt(%d) of an image of %d bytes", off, x.Size())
		}
	}
}

// What the image does not know cannot be verified: an error, no zeros.
func TestReadOfAnotherImagesChunk(t *testing.T) {
	n := newNode(t, Options{})
	n.image(mixed(chunk.Zstd, 1, 2))
	b := newBuilder(chunk.Zstd)
	b.blob()
	b.file(content(1*1000+900, 400<<10)) // in the other image's segment
	x := n.image(b)
	x.all(t)
	s := x.linked.Segments[0]
	p := make([]byte, 4096)
	if err := x.ReadAt(t.Context(), p, s.Flat); err == nil || !strings.Contains(err.Error(), "no chunk") {
		t.Errorf("a byte of nobody: %v", err)
	}
}

func TestOneFetchForAllWhoWait(t *testing.T) {
	n := newNode(t, Options{})
	images := []*img{n.image(mixed(chunk.Zstd, 1)), n.image(mixed(chunk.Zstd, 1))}
	gate, entered := make(chan struct{}), make(chan struct{}, 100)
	n.setFault(func(context.Context, blob.Ref, int64, int64) *memblob.Fault {
		entered <- struct{}{}
		<-gate
		return nil
	})
	var wg sync.WaitGroup
	for k := range 64 {
		wg.Go(func() { must(t, images[k%2].chunk(t, 0)) })
	}
	<-entered
	close(gate)
	wg.Wait()
	for _, im := range images {
		im.settle()
	}
	if got := n.asked(); len(got) != 1 {
		t.Errorf("64 readers of one chunk made %d requests", len(got))
	}
}

func TestCancelledReaderLeavesTheFetch(t *testing.T) {
	n := newNode(t, Options{})
	x := n.image(mixed(chunk.Zstd, 1))
	gate := make(chan struct{})
	ctx, cancel := context.WithCancelCause(t.Context())
	gone := errors.New("the reader is gone")
	n.setFault(func(context.Context, blob.Ref, int64, int64) *memblob.Fault {
		cancel(gone)
		<-gate
		return nil
	})
	if err := x.read(ctx, t, x.linked.Chunk(0).Flat, 1); !errors.Is(err, gone) {
		t.Errorf("error %v, want the context's", err)
	}
	close(gate)
	x.settle()
	must(t, x.chunk(t, 0))
	if got := n.asked(); len(got) != 1 {
		t.Errorf("%d requests", len(got))
	}
}

// Closing an image breaks off what it fetches, and another image that waits
// for the same chunk asks its own source.
func TestCloseInFlight(t *testing.T) {
	n := newNode(t, Options{})
	entered := make(chan struct{})
	n.setFault(func(ctx context.Context, _ blob.Ref, _, _ int64) *memblob.Fault {
		entered <- struct{}{}
		<-ctx.Done()
		return nil
	})
	first, second := n.image(mixed(chunk.Zstd, 1)), n.image(mixed(chunk.Zstd, 1))
	im := first.Image
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { im.ReadAt(ctx, make([]byte, 1), im.linked.Chunk(0).Flat) })
	<-entered
	n.setFault(nil)
	waiting := make(chan error)
	go func() { waiting <- second.chunk(t, 0) }()
	cancel()
	wg.Wait()
	first.close(t)
	must(t, <-waiting)
	if st := im.Stats(); st.Errors != 0 {
		t.Errorf("closing is no failure: %+v", st)
	}
}

func TestStaleImage(t *testing.T) {
	n := newNode(t, Options{})
	dir := n.link(mixed(chunk.Zstd, 1))
	other := newNode(t, Options{})
	l, err := link.Open(dir)
	must(t, err)
	if _, err := other.engine.Open(l, n.source); !errors.Is(err, ErrStale) {
		t.Errorf("error %v, want ErrStale", err)
	}
}

func TestStats(t *testing.T) {
	n := newNode(t, Options{Window: 1, Neighbours: 1, Growth: 1})
	x := n.image(mixed(chunk.Zstd, 1))
	must(t, x.chunk(t, 0))
	must(t, x.chunk(t, 0))
	n.setFault(func(context.Context, blob.Ref, int64, int64) *memblob.Fault { return &memblob.Fault{Flip: 1} })
	for i := range 10 {
		if x.chunk(t, 1+i) == nil {
			t.Fatal("a flipped byte was not found")
		}
	}
	c, s := x.linked.Chunk(0), x.Stats()
	if s.ReadBytes != 2*int64(c.Size) || s.Requests != 11 || s.Chunks != 1 || s.ContentBytes != int64(c.Size) || s.Errors != 10 || len(s.LastErrors) != 8 {
		t.Errorf("%+v", s)
	}
	if bytes.Equal([]byte(s.LastErrors[0].Error), []byte(s.LastErrors[7].Error)) {
		t.Errorf("%q twice", s.LastErrors[0].Error)
	}
}

func BenchmarkHit(b *testing.B) {
	n := newNode(b, Options{})
	x := n.image(mixed(chunk.None, 1))
	must(b, x.Complete(b.Context(), nil))
	s := x.linked.Segments[0]
	p := make([]byte, 4096)
	for i := 0; b.Loop(); i++ {
		if ok, err := x.TryReadAt(p, s.Flat+int64(i)*4096%s.Size); !ok || err != nil {
			b.Fatal(ok, err)
		}
	}
}
