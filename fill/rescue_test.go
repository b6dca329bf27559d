package fill

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/memblob"
	"github.com/shale-image/shale/chunk"
)

// lie flips a bit of everything.
func lie(context.Context, blob.Ref, int64, int64) *memblob.Fault { return &memblob.Fault{Flip: 1} }

// bring puts chunks into the pool as if they had come another way.
func (n *node) bring(t *testing.T, digests ...chunk.Digest) error {
	b, err := n.pool.Build()
	if err != nil {
		return err
	}
	for _, d := range digests {
		if err := b.Add(d, n.pieces[d]); err != nil {
			return errors.Join(err, b.Abort())
		}
	}
	_, err = b.Commit()
	return err
}

// Where the index is wrong, readers wait for all of the image, which is read
// once, and get right bytes.
func TestRescue(t *testing.T) {
	for name, fault := range map[string]func(context.Context, blob.Ref, int64, int64) *memblob.Fault{
		"wrong bytes": lie,
		"no ranges": func(context.Context, blob.Ref, int64, int64) *memblob.Fault {
			return &memblob.Fault{After: -1, Err: blob.ErrRange}
		},
		"not there": func(context.Context, blob.Ref, int64, int64) *memblob.Fault {
			return &memblob.Fault{After: -1, Err: blob.ErrNotFound}
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, Options{})
			x := n.image(mixed(chunk.Zstd, 1, 2))
			var calls atomic.Int64
			x.OnWrongIndex(func(context.Context) error {
				calls.Add(1)
				var all []chunk.Digest
				for i := range x.linked.Chunks() {
					all = append(all, x.linked.Chunk(i).Digest)
				}
				return n.bring(t, all...)
			})
			n.setFault(fault)
			var wg sync.WaitGroup
			for i := range x.linked.Chunks() {
				wg.Go(func() { must(t, x.chunk(t, i)) })
			}
			wg.Wait()
			if calls.Load() != 1 {
				t.Errorf("the image was read %d times", calls.Load())
			}
		})
	}
}

// What the image does not have in truth is not had by reading all of it, and
// what the network refuses is no reason to.
func TestNoRescue(t *testing.T) {
	n := newNode(t, Options{})
	x := n.image(mixed(chunk.Zstd, 3))
	calls := 0
	x.OnWrongIndex(func(context.Context) error {
		calls++
		return n.bring(t, x.linked.Chunk(1).Digest)
	})
	n.setFault(down)
	if err := x.chunk(t, 0); err == nil || calls > 0 {
		t.Errorf("without a network: %v, read %d times", err, calls)
	}
	x.settle()
	n.setFault(lie)
	if err := x.chunk(t, 0); !errors.Is(err, chunk.ErrCorrupt) {
		t.Errorf("a chunk that no layer has: %v", err)
	}
	must(t, x.chunk(t, 1))
	if calls != 1 {
		t.Errorf("the image was read %d times", calls)
	}
}

// A rescue that fails is tried again, but not at once.
func TestRescueAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, Options{})
		x := n.image(mixed(chunk.Zstd, 4))
		calls := 0
		x.OnWrongIndex(func(context.Context) error {
			if calls++; calls == 1 {
				return blob.ErrUnavailable
			}
			return n.bring(t, x.linked.Chunk(0).Digest)
		})
		n.setFault(lie)
		for range 3 {
			if err := x.chunk(t, 0); !errors.Is(err, chunk.ErrCorrupt) {
				t.Fatal(err)
			}
			x.settle()
		}
		if calls != 1 {
			t.Errorf("the image was read %d times", calls)
		}
		time.Sleep(rescuePause)
		must(t, x.chunk(t, 0))
	})
}

// A rescue that takes for ever, at a place that dribbles, is waited for by nobody once
// the index can be used again, and has no read fail.
func TestRescueDribbles(t *testing.T) {
	for name, err := range map[string]error{"no ranges": blob.ErrRange, "wrong bytes": nil} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newNode(t, Options{})
				x := n.image(mixed(chunk.None, 5))
				var calls atomic.Int64
				x.OnWrongIndex(func(ctx context.Context) error {
					calls.Add(1)
					<-ctx.Done()
					return ctx.Err()
				})
				n.setFault(func(context.Context, blob.Ref, int64, int64) *memblob.Fault {
					if err != nil {
						return &memblob.Fault{After: -1, Err: err}
					}
					return &memblob.Fault{Flip: 1}
				})
				const over = 40 * time.Second
				began := time.Now()
				var wg sync.WaitGroup
				for i := range x.linked.Chunks() {
					wg.Go(func() {
						must(t, x.chunk(t, i))
						if d := time.Since(began); d > time.Minute { // which a reader waits
							t.Errorf("chunk %d came after %v", i, d)
						}
					})
				}
				time.Sleep(over)
				// 3, 6, 12, 24 and 39 s after the first time
				if most := 6 * x.linked.Chunks(); len(n.asked()) > most {
					t.Errorf("asked more than %d times", most)
				}
				n.setFault(nil)
				wg.Wait()
				if st := x.Stats(); calls.Load() != 1 || st.Errors != 0 {
					t.Errorf("the image was read %d times, %d errors", calls.Load(), st.Errors)
				}
				x.close(t)
			})
		})
	}
}
