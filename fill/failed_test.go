package fill

import (
	"context"
	"errors"
	"io"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/chunk"
)

// TestSlowFailure: a read that fails after a while is one try, however the kernel
// asks for it, also for those who only joined it. A moment later there is another.
func TestSlowFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBuilder(chunk.None)
		b.blob()
		b.files(3*cut, cut)
		n := newNode(t, Options{})
		broken := errors.New("500")
		var tries atomic.Int64
		var failing atomic.Bool
		failing.Store(true)
		x := n.open(n.link(b), sourceFunc(func(ctx context.Context, ref blob.Ref, off, size int64) (io.ReadCloser, error) {
			if !failing.Load() {
				return n.source.Range(ctx, ref, off, size)
			}
			tries.Add(1)
			time.Sleep(10 * time.Second)
			return nil, broken
		}))
		fails := func(i int, off, size int64) time.Duration {
			t.Helper()
			began := time.Now()
			if err := x.read(context.Background(), t, x.linked.Chunk(i).Flat+off, size); !errors.Is(err, broken) {
				t.Errorf("chunk %d: %v", i, err)
			}
			return time.Since(began)
		}
		go func() {
			time.Sleep(time.Second)
			// It came along with chunk 0, and nobody waited for it then.
			if d := fails(1, 0, cut); d != 9*time.Second {
				t.Errorf("who joined waited for %v", d)
			}
		}()
		if d := fails(0, 0, cut); d != 10*time.Second {
			t.Errorf("the first read took %v", d)
		}
		synctest.Wait()
		if d := fails(0, 0, 4096); d != 0 {
			t.Errorf("the same once more took %v", d)
		}
		if tries.Load() != 1 {
			t.Errorf("%d tries, want 1", tries.Load())
		}
		failing.Store(false)
		time.Sleep(failureStands + 1)
		x.all(t)
		x.close(t)
	})
}

// Many failures do not take more and more memory.
func TestFailuresAreBounded(t *testing.T) {
	var f failures
	for i := range 3 * maxFailures {
		f.note(address{1, int64(i)}, time.Now().Add(-time.Minute), io.ErrUnexpectedEOF)
	}
	if len(f.all) > maxFailures || f.of(address{1, 3*maxFailures - 1}) == nil {
		t.Errorf("%d of %d are remembered", len(f.all), 3*maxFailures)
	}
	f = failures{}
	f.note(address{1, 0}, time.Now().Add(-time.Minute), chunk.ErrCorrupt)
	f.note(address{2, 0}, time.Now(), io.ErrUnexpectedEOF)
	if len(f.all) > 0 {
		t.Error("what is wrong, or fails at once, is asked for again")
	}
}
