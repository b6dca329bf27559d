package fill

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/chunk"
)

// Two images have the same chunks, and the source of one that asks first has none
// of them: that is no failure of the other.
func TestSharedChunksOfASourceThatFails(t *testing.T) {
	reads := map[string]func(x *img, t *testing.T) error{
		"read":  func(x *img, t *testing.T) error { return x.chunk(t, 0) },
		"bring": func(x *img, t *testing.T) error { return x.Bring(t.Context(), x.linked.Chunk(0).Flat, cut) },
	}
	for name, read := range reads {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newNode(t, Options{})
				dir := n.link(mixed(chunk.None, 1))
				bad := n.open(dir, sourceFunc(func(context.Context, blob.Ref, int64, int64) (io.ReadCloser, error) {
					time.Sleep(100 * time.Millisecond)
					return nil, blob.ErrNotFound
				}))
				good := n.open(dir, n.source)
				failed := make(chan error, 1)
				go func() { failed <- read(bad, t) }()
				synctest.Wait() // it has asked
				if err := read(good, t); err != nil {
					t.Errorf("whose source is good: %v", err)
				}
				if err := <-failed; !errors.Is(err, blob.ErrNotFound) {
					t.Errorf("whose source is bad: %v", err)
				}
			})
		})
	}
}

// A reader waits for what was guessed, and again for another guess: that both fail
// is no failure of what the reader would ask for.
func TestGuessesThatFail(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, Options{})
		x := n.image(mixed(chunk.None, 1))
		e := x.engine
		guess := func() want { // e.mu is held
			c := x.linked.Chunk(0)
			s, at := x.address(c)
			wants := []want{{index: 0, chunk: c, segment: s, at: at}}
			e.claim(x.Image, wants, 0, 0)
			wants[0].flight.guessed = true
			return wants[0]
		}
		e.mu.Lock()
		first := guess()
		e.mu.Unlock()
		read := make(chan error, 1)
		go func() { read <- x.chunk(t, 0) }()
		synctest.Wait()
		broken := errors.New("broken")
		e.mu.Lock()
		first.flight.err = broken
		close(first.flight.done)
		second := guess()
		e.mu.Unlock()
		synctest.Wait()
		e.land(second, nil, broken)
		must(t, <-read)
	})
}

// What is stored while it is looked for, by who enters no flights, is nobody's
// flight and no error.
func TestJoinWhileItIsStored(t *testing.T) {
	n := newNode(t, Options{Window: 1, Neighbours: 1})
	b := newBuilder(chunk.Zstd)
	const batches, files = 100, 200
	for range batches {
		b.blob()
		b.batch(slices.Repeat([]int{100}, files)...)
	}
	x := n.image(b)
	last := func(i int) int { return (i+1)*files - 1 } // all others of its batch are looked at before
	var at atomic.Int64
	at.Store(-1)
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := range batches {
			for at.Load() < int64(i) {
			}
			for range (i % 40) * 200 {
				at.Load()
			}
			c := x.linked.Chunk(last(i))
			s, to := x.address(c)
			if err := s.pool.Store(to.off, n.pieces[c.Digest]); err != nil {
				t.Error(err)
			}
		}
	})
	for i := range batches {
		at.Store(int64(i))
		must(t, x.chunk(t, last(i)))
	}
	wg.Wait()
}

// A request for nobody yet that is slow is waited for as long as something comes of it, but
// for no more than half of the time that a request may take.
func TestSlowGuessIsWaitedFor(t *testing.T) {
	for timeout, requests := range map[time.Duration]int{time.Minute: 1, 10 * time.Second: 2} {
		synctest.Test(t, func(t *testing.T) {
			n := newNode(t, Options{Timeout: timeout})
			b := newBuilder(chunk.None)
			b.blob()
			b.files(12 * cut)
			w := &wire{Source: n.source, rate: cut} // a chunk a second
			x := n.open(n.link(b), w)
			x.expect(0, 12)
			synctest.Wait()
			must(t, x.chunk(t, 11))
			if w.requests != requests {
				t.Errorf("%d requests, want %d if one may take %v", w.requests, requests, timeout)
			}
			x.settle()
		})
	}
}

// Requests for nobody hang when their bodies have begun, all that there may be: readers
// have room beside them.
func TestGuessesTakeNoRoom(t *testing.T) {
	n := newNode(t, Options{Window: 1, Neighbours: 1})
	b := newBuilder(chunk.LZ4) // which needs all of a piece in memory
	b.blob()
	for range 20 {
		b.batch(2<<20, 2<<20)
	}
	var hangs atomic.Bool
	var hanging atomic.Int32
	x := n.open(n.link(b), sourceFunc(func(ctx context.Context, ref blob.Ref, off, length int64) (io.ReadCloser, error) {
		if !hangs.Load() {
			return n.source.Range(ctx, ref, off, length)
		}
		hanging.Add(1)
		return io.NopCloser(hung{ctx}), nil
	}))
	hangs.Store(true)
	for i := range cap(x.guesses) {
		x.expect(2*i, 2*i+1)
	}
	for hanging.Load() < int32(cap(x.guesses)) {
		time.Sleep(time.Millisecond)
	}
	time.Sleep(20 * time.Millisecond) // they have what room they get
	if x.guessMemory.TryAcquire(guessMemory) || !x.memory.TryAcquire(imageMemory) {
		t.Fatal("they have none, or that of readers")
	}
	x.memory.Release(imageMemory)
	hangs.Store(false)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	last := x.linked.Chunk(x.linked.Chunks() - 1)
	must(t, x.read(ctx, t, last.Flat, 4*kib))
	x.close(t)
}

// hung is a body of which nothing comes.
type hung struct{ ctx context.Context }

func (h hung) Read([]byte) (int, error) {
	<-h.ctx.Done()
	return 0, fmt.Errorf("it hung: %w", context.Cause(h.ctx))
}

// What can only come as one large piece is not guessed.
func TestLargePiecesAreNotGuessed(t *testing.T) {
	n := newNode(t, Options{})
	b := newBuilder(chunk.Zstd)
	b.blob()
	b.files(cut)
	b.batch(8<<20, 8<<20) // 8 MiB when they are compressed
	b.files(cut)
	x := n.image(b)
	x.expect(0, x.linked.Chunks())
	x.settle()
	if got := x.present(); len(got) != 2 || got[0] != 0 || got[1] != 3 {
		t.Errorf("chunks %v came", got)
	}
}
