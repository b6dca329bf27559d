package retry_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/blobtest"
	"github.com/shale-image/shale/blob/memblob"
	"github.com/shale-image/shale/blob/retry"
)

func TestConformance(t *testing.T) {
	t.Run("clean", func(t *testing.T) {
		blobtest.Run(t, func(contents map[string][]byte) blob.Source {
			return retry.New(memblob.New(contents), retry.Policy{})
		})
	})
	// Every second request breaks off after a while, and nobody notices.
	t.Run("breaking", func(t *testing.T) {
		blobtest.Run(t, func(contents map[string][]byte) blob.Source {
			mem := memblob.New(contents)
			mem.Fault = func(_ context.Context, _ blob.Ref, off, n int64) *memblob.Fault {
				if off%2 == 0 && n > 1 {
					return &memblob.Fault{After: n/2 | 1, Err: io.ErrUnexpectedEOF}
				}
				return nil
			}
			return retry.New(mem, retry.Policy{Base: time.Microsecond})
		})
	})
}

// script is a source of 100,000 bytes whose requests fail in the given ways,
// one after the other, and then succeed.
func script(faults ...*memblob.Fault) (src *memblob.Source, ref blob.Ref, data []byte, calls *[]int64) {
	data = bytes.Repeat([]byte("0123456789"), 10000)
	src, calls = memblob.New(nil), new([]int64)
	ref = src.Put(data)
	src.Fault = func(_ context.Context, _ blob.Ref, off, _ int64) *memblob.Fault {
		*calls = append(*calls, off)
		if i := len(*calls) - 1; i < len(faults) {
			return faults[i]
		}
		return nil
	}
	return src, ref, data, calls
}

func TestResumesWhereItStopped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src, ref, data, calls := script(
			&memblob.Fault{After: -1, Err: blob.ErrUnavailable},
			&memblob.Fault{After: 1000, Err: io.ErrUnexpectedEOF},
			&memblob.Fault{After: -1, Err: syscall.ECONNRESET},
			&memblob.Fault{After: 0, Err: blob.ErrUnavailable},
			&memblob.Fault{After: 77777, Err: syscall.ECONNRESET},
		)
		got, err := blob.ReadAll(t.Context(), retry.New(src, retry.Policy{}), ref, 10, 99990)
		if err != nil || !bytes.Equal(got, data[10:]) {
			t.Errorf("wrong bytes, or %v", err)
		}
		if want := []int64{10, 10, 1010, 1010, 1010, 78787}; fmt.Sprint(*calls) != fmt.Sprint(want) {
			t.Errorf("requests at %v, expected %v", *calls, want)
		}
	})
}

func TestForGood(t *testing.T) {
	for _, sentinel := range []error{blob.ErrNotFound, blob.ErrUnauthorized, blob.ErrRange, context.Canceled, errors.New("other")} {
		src, ref, _, calls := script(&memblob.Fault{After: -1, Err: fmt.Errorf("%w", sentinel)})
		if _, err := blob.ReadAll(t.Context(), retry.New(src, retry.Policy{}), ref, 0, 1); !errors.Is(err, sentinel) || len(*calls) != 1 {
			t.Errorf("%v after %d requests", err, len(*calls))
		}
		src, ref, _, calls = script(&memblob.Fault{After: 5, Err: sentinel})
		if _, err := blob.ReadAll(t.Context(), retry.New(src, retry.Policy{}), ref, 0, 10); !errors.Is(err, sentinel) || len(*calls) != 1 {
			t.Errorf("in the body: %v after %d requests", err, len(*calls))
		}
	}
}

func TestBudget(t *testing.T) {
	always := func(after int64) *memblob.Source {
		src, _, _, _ := script()
		src.Fault = func(context.Context, blob.Ref, int64, int64) *memblob.Fault {
			return &memblob.Fault{After: after, Err: blob.ErrUnavailable}
		}
		return src
	}
	_, ref, _, _ := script()
	synctest.Test(t, func(t *testing.T) {
		for _, after := range []int64{-1, 0, 1} { // also with a byte of progress each time
			src, n := always(after), 0
			fault := src.Fault
			src.Fault = func(ctx context.Context, ref blob.Ref, off, size int64) *memblob.Fault {
				n++
				return fault(ctx, ref, off, size)
			}
			_, err := blob.ReadAll(t.Context(), retry.New(src, retry.Policy{Attempts: 4}), ref, 0, 1000)
			if !errors.Is(err, blob.ErrUnavailable) || n != 4 {
				t.Errorf("after %d bytes each: %v after %d requests, expected 4", after, err, n)
			}
		}
	})
	synctest.Test(t, func(t *testing.T) { // the pauses double, and Total ends it, not before
		start := time.Now()
		_, err := blob.ReadAll(t.Context(), retry.New(always(-1), retry.Policy{Attempts: 1000, Total: time.Minute}), ref, 0, 1)
		if took := time.Since(start); !errors.Is(err, blob.ErrUnavailable) || took != time.Minute {
			t.Errorf("%v after %v", err, took)
		}
	})
	synctest.Test(t, func(t *testing.T) { // a long body may break more often than Attempts
		src := memblob.New(nil)
		data := bytes.Repeat([]byte("0123456789abcdef"), 1<<20)
		ref, n := src.Put(data), 0
		src.Fault = func(context.Context, blob.Ref, int64, int64) *memblob.Fault {
			n++
			return &memblob.Fault{After: 1 << 20, Err: io.ErrUnexpectedEOF}
		}
		got, err := blob.ReadAll(t.Context(), retry.New(src, retry.Policy{Attempts: 3}), ref, 0, ref.Size)
		if err != nil || !bytes.Equal(got, data) || n != 16 {
			t.Errorf("%v after %d requests", err, n)
		}
	})
}

type busy time.Duration

func (b busy) Error() string       { return "busy" }
func (b busy) Unwrap() error       { return blob.ErrUnavailable }
func (b busy) Wait() time.Duration { return time.Duration(b) }

func TestHonoursWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src, ref, _, _ := script(&memblob.Fault{After: -1, Err: busy(20 * time.Second)})
		start := time.Now()
		if _, err := blob.ReadAll(t.Context(), retry.New(src, retry.Policy{}), ref, 0, 1); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took != 20*time.Second {
			t.Errorf("waited %v", took)
		}
		// Longer than the whole budget: it is no use to wait at all.
		src, ref, _, calls := script(&memblob.Fault{After: -1, Err: busy(time.Hour)})
		start = time.Now()
		_, err := blob.ReadAll(t.Context(), retry.New(src, retry.Policy{}), ref, 0, 1)
		if !errors.Is(err, blob.ErrUnavailable) || len(*calls) != 1 || time.Since(start) != 0 {
			t.Errorf("%v after %d requests and %v", err, len(*calls), time.Since(start))
		}
	})
}

func TestCancelWhileWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src, ref, _, _ := script(&memblob.Fault{After: -1, Err: busy(30 * time.Second)})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start := time.Now()
		_, err := blob.ReadAll(ctx, retry.New(src, retry.Policy{}), ref, 0, 1)
		if !errors.Is(err, context.DeadlineExceeded) || time.Since(start) != time.Second {
			t.Errorf("%v after %v", err, time.Since(start))
		}
	})
}

func TestDo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := 0
		err := retry.Do(t.Context(), retry.Policy{}, func(context.Context) error {
			if n++; n < 3 {
				return blob.ErrUnavailable
			}
			return nil
		})
		if err != nil || n != 3 {
			t.Errorf("%v after %d calls", err, n)
		}
	})
}

// A body that breaks off again and again, and brings something each time, is not waited
// for longer and longer.
func TestProgress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := memblob.New(nil)
		data := bytes.Repeat([]byte("0123456789abcdef"), 3<<16)
		ref := src.Put(data)
		src.Fault = func(context.Context, blob.Ref, int64, int64) *memblob.Fault {
			return &memblob.Fault{After: 50e3, Err: io.ErrUnexpectedEOF}
		}
		got, err := blob.ReadAll(t.Context(), retry.New(src, retry.Policy{Attempts: 3, Total: 10 * time.Second}), ref, 0, ref.Size)
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
	})
}
