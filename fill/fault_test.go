package fill

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/memblob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/pool"
)

// small is an image of one blob with files of 10, 20 and 30 KiB, which one
// request fetches.
func small() *builder {
	b := newBuilder(chunk.None)
	b.blob()
	b.files(10*kib, 20*kib, 30*kib)
	return b
}

// A source that does not do what it should: the error says which chunk, of
// which blob, at which offset; nobody hangs; and when the source is good again
// so are the reads.
func TestBadSources(t *testing.T) {
	broken := errors.New("broken")
	body := func(p []byte) io.ReadCloser { return io.NopCloser(bytes.NewReader(p)) }
	for name, c := range map[string]struct {
		bad  func(p []byte) (io.ReadCloser, error) // p is the right answer
		want error
		ok   int // chunks that can be had all the same
	}{
		"fails":              {func([]byte) (io.ReadCloser, error) { return nil, broken }, broken, 0},
		"panics":             {func([]byte) (io.ReadCloser, error) { panic("ouch") }, nil, 0},
		"ends its goroutine": {func([]byte) (io.ReadCloser, error) { runtime.Goexit(); return nil, nil }, nil, 0},
		"is empty":           {func([]byte) (io.ReadCloser, error) { return body(nil), nil }, io.ErrUnexpectedEOF, 0},
		"is short":           {func(p []byte) (io.ReadCloser, error) { return body(p[:len(p)-1]), nil }, io.ErrUnexpectedEOF, 2},
		"is long":            {func(p []byte) (io.ReadCloser, error) { return body(append(p, 1, 2, 3)), nil }, nil, 3},
		"lies":               {func(p []byte) (io.ReadCloser, error) { return body(make([]byte, len(p))), nil }, chunk.ErrCorrupt, 0},
		"begins wrong":       {func(p []byte) (io.ReadCloser, error) { p[0] ^= 1; return body(p), nil }, chunk.ErrCorrupt, 2},
		"ends wrong":         {func(p []byte) (io.ReadCloser, error) { p[len(p)-1] ^= 1; return body(p), nil }, chunk.ErrCorrupt, 2},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, Options{})
			var mu sync.Mutex
			bad := true
			x := n.open(n.link(small()), sourceFunc(func(ctx context.Context, ref blob.Ref, off, size int64) (io.ReadCloser, error) {
				p, err := blob.ReadAll(ctx, n.source, ref, off, size)
				mu.Lock()
				defer mu.Unlock()
				if err == nil && bad {
					return c.bad(p)
				}
				return body(p), err
			}))
			// All at once: one request leads, the others are in tow.
			errs := make([]error, 3)
			first, last := x.linked.Chunk(0), x.linked.Chunk(2)
			whole := x.read(t.Context(), t, first.Flat, last.Flat+int64(last.Size)-first.Flat)
			if (whole == nil) != (c.ok == 3) {
				t.Errorf("all chunks: %v", whole)
			}
			x.settle()
			ok := len(x.present())
			if ok != c.ok {
				t.Errorf("%d chunks could be had, want %d", ok, c.ok)
			}
			for i := range errs {
				err := x.chunk(t, i)
				ch := x.linked.Chunk(i)
				if err == nil {
					continue
				}
				for _, s := range []string{x.linked.Blobs[0].Digest, fmt.Sprintf("offset %d", ch.Offset), ch.Digest.String()} {
					if !strings.Contains(err.Error(), s) {
						t.Errorf("%q does not tell %q", err, s)
					}
				}
				if c.want != nil && !errors.Is(err, c.want) {
					t.Errorf("error %v, want %v", err, c.want)
				}
			}
			mu.Lock()
			bad = false
			mu.Unlock()
			x.all(t)
		})
	}
}

// A reader whose chunk came along in somebody's request does not fail with it.
func TestWaiterTriesAgain(t *testing.T) {
	n := newNode(t, Options{})
	x := n.image(small())
	entered, gate := make(chan struct{}), make(chan struct{})
	n.setFault(func(context.Context, blob.Ref, int64, int64) *memblob.Fault {
		n.setFault(nil)
		close(entered)
		<-gate
		return &memblob.Fault{After: -1, Err: blob.ErrUnavailable}
	})
	lead, along := make(chan error), make(chan error)
	go func() { lead <- x.chunk(t, 0) }()
	<-entered
	go func() { along <- x.chunk(t, 2) }()
	x.waiters(2)
	close(gate)
	if err := <-lead; !errors.Is(err, blob.ErrUnavailable) {
		t.Errorf("the one who asked: %v", err)
	}
	must(t, <-along)
	if got := n.asked(); len(got) != 2 || got[1].n != 30*kib {
		t.Errorf("requests %v", got)
	}
}

// waiters returns when chunk i is in flight and whoever runs has had a turn.
func (x *img) waiters(i int) {
	_, at := x.address(x.linked.Chunk(i))
	for {
		x.engine.mu.Lock()
		f := x.engine.flights[at]
		x.engine.mu.Unlock()
		if f != nil {
			break
		}
		runtime.Gosched()
	}
	for range 1000 {
		runtime.Gosched()
	}
}

// A source that hangs costs the timeout and not a second more; one that
// dribbles may take as long as it likes.
func TestDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, Options{Timeout: 10 * time.Second})
		x := n.image(small())
		n.setFault(func(ctx context.Context, _ blob.Ref, _, _ int64) *memblob.Fault {
			<-ctx.Done()
			return nil
		})
		start := time.Now()
		var wg sync.WaitGroup
		for range 20 { // they do not wait for one another
			wg.Go(func() {
				err := x.chunk(t, 0)
				if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "10s") {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if d := time.Since(start); d != 10*time.Second {
			t.Errorf("gave up after %v, want 10 s", d)
		}
		n.setFault(nil)

		b := newBuilder(chunk.None)
		b.blob()
		b.files(256 * kib)
		slow := n.open(n.link(b), &wire{Source: n.source, rate: 64 * kib / 9}) // 9 s a chunk
		must(t, slow.chunk(t, 0))
		must(t, slow.chunk(t, 3))
		if st := slow.Stats(); st.Requests != 1 {
			t.Errorf("%d requests", st.Requests)
		}
	})
}

// An image whose source hangs holds up nobody but those who want its chunks,
// and what is fetched in the background not even them.
func TestSlowOnesHoldUpNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, Options{Requests: 2, Timeout: time.Hour})
		b := newBuilder(chunk.None)
		b.blob()
		for range 40 {
			b.files(50 * kib)
			b.gap(100 * kib) // each file is a request
		}
		slow := n.image(b)
		other := newBuilder(chunk.None)
		other.blob()
		other.file(content(77, 50*kib))
		good := n.image(other)
		n.setFault(func(ctx context.Context, _ blob.Ref, _, _ int64) *memblob.Fault {
			<-ctx.Done()
			return nil
		})
		hang := n.fault
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := slow.Complete(ctx, nil); !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		})
		synctest.Wait()
		n.setFault(nil)
		start := time.Now()
		must(t, slow.chunk(t, 39)) // does not wait behind Complete
		n.setFault(hang)
		for i := range 10 {
			wg.Go(func() { slow.read(ctx, t, slow.linked.Chunk(20+i).Flat, 1) })
		}
		synctest.Wait()
		n.setFault(nil)
		must(t, good.chunk(t, 0)) // does not wait for another image
		if d := time.Since(start); d != 0 {
			t.Errorf("waited %v", d)
		}
		cancel()
		wg.Wait()
	})
}

// Images that share chunks do not wait for each other's source if it hangs.
func TestSharedChunksOfASourceThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, Options{Timeout: time.Hour})
		b := newBuilder(chunk.None)
		b.blob()
		for range 64 {
			b.files(50 * kib)
			b.gap(100 * kib) // each file is a request
		}
		dir := n.link(b)
		a := n.open(dir, sourceFunc(func(ctx context.Context, _ blob.Ref, _, _ int64) (io.ReadCloser, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}))
		good := n.open(dir, n.source)
		must(t, good.chunk(t, 0)) // warm for both
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for i := 1; i < 64; i++ {
			c := a.linked.Chunk(i)
			wg.Go(func() { a.read(ctx, t, c.Flat, int64(c.Size)) })
		}
		synctest.Wait()
		start := time.Now()
		must(t, good.chunk(t, 0))
		if d := time.Since(start); d != 0 {
			t.Errorf("what is here took %v", d)
		}
		good.all(t)
		if d := time.Since(start); d > foreignWait {
			t.Errorf("63 chunks took %v", d)
		}
		must(t, a.chunk(t, 63)) // what another image has brought
		cancel()
		wg.Wait()
	})
}

// smallDisk is a directory on a file system of so many bytes ("1m").
func smallDisk(t *testing.T, size string) string {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Skip("needs to mount a tmpfs: ", err)
	}
	t.Cleanup(func() {
		if unix.Unmount(dir, 0) != nil {
			must(t, unix.Unmount(dir, unix.MNT_DETACH))
		}
	})
	return dir
}

// A full disk costs time, not correctness.
func TestPoolFull(t *testing.T) {
	dir := smallDisk(t, "1m")
	n := newNodeIn(t, dir, Options{})
	b := newBuilder(chunk.None)
	b.blob()
	b.files(4 << 20)
	x := n.image(b)
	x.all(t)
	got := x.present()
	if len(got) == 0 || len(got) == x.linked.Chunks() {
		t.Fatalf("%d of %d chunks are stored in a pool of 1 MiB", len(got), x.linked.Chunks())
	}
	x.settle()
	n.asked()
	last := x.linked.Chunk(x.linked.Chunks() - 1)
	for off := int64(0); off < cut; off += 4096 { // page by page: one fetch
		must(t, x.read(t.Context(), t, last.Flat+off, 4096))
	}
	// Across chunks of both kinds.
	first := x.linked.Chunk(0)
	must(t, x.read(t.Context(), t, first.Flat+1, last.Flat-first.Flat))
	if got := n.asked(); len(got) != 0 {
		t.Errorf("what is in memory was fetched again: %v", got)
	}
	if err := x.Complete(t.Context(), nil); !errors.Is(err, pool.ErrNoSpace) {
		t.Errorf("Complete: %v, want ErrNoSpace", err)
	}
	must(t, unix.Mount("tmpfs", dir, "tmpfs", unix.MS_REMOUNT, "size=32m"))
	must(t, x.Complete(t.Context(), nil))
	if got := x.present(); len(got) != x.linked.Chunks() {
		t.Errorf("%d of %d chunks", len(got), x.linked.Chunks())
	}
	if e := n.engine; len(e.flights) != 0 || len(e.held) != 0 || e.heldLen != 0 {
		t.Errorf("%d flights, %d of them held with %d bytes", len(e.flights), len(e.held), e.heldLen)
	}
}
