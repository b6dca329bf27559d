package content

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/memblob"
)

func TestCached(t *testing.T) {
	p := make([]byte, 5<<20+123)
	r := rand.New(rand.NewPCG(1, 2))
	for i := range p {
		p[i] = byte(r.Uint32())
	}
	src := memblob.New(nil)
	ref := src.Put(p)
	var mu sync.Mutex
	requests, fail := 0, true
	src.Fault = func(context.Context, blob.Ref, int64, int64) *memblob.Fault {
		mu.Lock()
		defer mu.Unlock()
		requests++
		if fail {
			return &memblob.Fault{After: -1, Err: blob.ErrUnavailable}
		}
		return nil
	}
	c := Cached(src)
	if _, err := blob.ReadAll(t.Context(), c, ref, 0, 10); !errors.Is(err, blob.ErrUnavailable) {
		t.Fatal(err)
	}
	fail, requests = false, 0
	var wg sync.WaitGroup
	for range 4 {
		seed := r.Uint64()
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, 1))
			for range 200 {
				off := r.Int64N(int64(len(p)))
				n := 1 + r.Int64N(min(int64(len(p))-off, 3<<20))
				got, err := blob.ReadAll(t.Context(), c, ref, off, n)
				if err != nil || !bytes.Equal(got, p[off:off+n]) {
					t.Errorf("%d bytes at %d: %v", n, off, err)
				}
			}
		})
	}
	wg.Wait()
	if requests > 6 {
		t.Errorf("%d requests for 6 windows", requests)
	}
	if _, err := blob.ReadAll(t.Context(), c, ref, int64(len(p))-5, 10); !errors.Is(err, blob.ErrRange) {
		t.Errorf("behind the end: %v", err)
	}
}
