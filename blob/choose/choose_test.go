package choose_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/blobtest"
	"github.com/shale-image/shale/blob/choose"
	"github.com/shale-image/shale/blob/count"
	"github.com/shale-image/shale/blob/memblob"
	"github.com/shale-image/shale/blob/retry"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestConformance(t *testing.T) {
	dead := memblob.New(nil)
	dead.Fault = func(context.Context, blob.Ref, int64, int64) *memblob.Fault {
		return &memblob.Fault{After: -1, Err: blob.ErrUnavailable}
	}
	for name, before := range map[string][]choose.Place{"alone": nil, "behind a dead one": {{Name: "dead", Source: dead}}, "behind an empty one": {{Name: "empty", Source: memblob.New(nil)}}} {
		t.Run(name, func(t *testing.T) {
			blobtest.Run(t, func(contents map[string][]byte) blob.Source {
				return choose.New(append(before, choose.Place{Name: "good", Source: memblob.New(contents)})...)
			})
		})
	}
}

var data = bytes.Repeat([]byte("0123456789abcdef"), 1<<14)

// lab is some places, all with data, and what was asked of them.
type lab struct {
	ref    blob.Ref
	places []choose.Place

	mu    sync.Mutex
	log   string
	fault [3]func(ctx context.Context, n int64) *memblob.Fault
}

func newLab(n int) *lab {
	l := &lab{}
	for i := range n {
		m := memblob.New(nil)
		l.ref = m.Put(data)
		m.Fault = func(ctx context.Context, _ blob.Ref, _, size int64) *memblob.Fault {
			l.mu.Lock()
			l.log += fmt.Sprint(i)
			f := l.fault[i]
			l.mu.Unlock()
			if f == nil {
				return nil
			}
			return f(ctx, size)
		}
		l.places = append(l.places, choose.Place{Name: fmt.Sprintf("place %d", i), Source: m})
	}
	return l
}

func (l *lab) set(i int, f func(ctx context.Context, n int64) *memblob.Fault) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.fault[i] = f
}

func (l *lab) asked() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.log
	l.log = ""
	return s
}

// read reads 1000 bytes and fails the test on a wrong one.
func (l *lab) read(t *testing.T, ctx context.Context, s blob.Source) error {
	t.Helper()
	p, err := blob.ReadAll(ctx, s, l.ref, 5, 1000)
	if err == nil && !bytes.Equal(p, data[5:1005]) {
		t.Error("wrong bytes")
	}
	return err
}

func fails(err error) func(context.Context, int64) *memblob.Fault {
	return func(context.Context, int64) *memblob.Fault { return &memblob.Fault{After: -1, Err: err} }
}

func hangs(ctx context.Context, _ int64) *memblob.Fault {
	<-ctx.Done()
	return &memblob.Fault{After: -1, Err: ctx.Err()}
}

func takes(d time.Duration) func(context.Context, int64) *memblob.Fault {
	return func(ctx context.Context, _ int64) *memblob.Fault {
		select {
		case <-time.After(d):
			return nil
		case <-ctx.Done():
			return &memblob.Fault{After: -1, Err: ctx.Err()}
		}
	}
}

// told is an error with a Retry-After.
type told time.Duration

func (told) Error() string         { return "busy" }
func (told) Unwrap() error         { return blob.ErrUnavailable }
func (w told) Wait() time.Duration { return time.Duration(w) }

func TestFallsThrough(t *testing.T) {
	for _, err := range []error{blob.ErrUnavailable, blob.ErrNotFound, blob.ErrRange, blob.ErrUnauthorized, io.ErrUnexpectedEOF, errors.New("other")} {
		synctest.Test(t, func(t *testing.T) {
			l := newLab(3)
			s := choose.New(l.places...)
			l.set(0, fails(err))
			for range 3 {
				if err := l.read(t, t.Context(), s); err != nil {
					t.Error(err)
				}
			}
			if got := l.asked(); got != "0111" { // and then rests
				t.Errorf("%v: asked %s", err, got)
			}
			l.set(0, nil)
			time.Sleep(2 * time.Minute)
			if err := l.read(t, t.Context(), s); err != nil || l.asked() != "0" {
				t.Errorf("%v: is not asked again: %v", err, err)
			}
			// All fail: the last one's word counts.
			l.set(0, fails(err))
			l.set(1, fails(err))
			l.set(2, fails(io.ErrNoProgress))
			if err := l.read(t, t.Context(), s); !errors.Is(err, io.ErrNoProgress) || l.asked() != "012" {
				t.Errorf("%v: all fail: %v", err, err)
			}
		})
	}
}

func TestRetryAfter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(2)
		s := choose.New(l.places...)
		l.set(0, fails(told(20*time.Second)))
		l.set(1, fails(told(10*time.Second)))
		if err := l.read(t, t.Context(), s); !errors.Is(err, blob.ErrUnavailable) || l.asked() != "01" {
			t.Error(err)
		}
		l.set(0, nil)
		l.set(1, nil)
		start := time.Now()
		if err := l.read(t, t.Context(), s); !errors.Is(err, blob.ErrUnavailable) || l.asked() != "" {
			t.Errorf("asked although told not to: %v", err)
		}
		if err := l.read(t, t.Context(), retry.New(s, retry.Policy{})); err != nil || l.asked() != "1" || time.Since(start) != 10*time.Second {
			t.Errorf("%v after %v", err, time.Since(start))
		}
	})
}

// A place that hangs costs its time once.
func TestHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(2)
		s := choose.New(l.places...)
		l.set(0, hangs)
		for i, want := range []time.Duration{3 * time.Second, 0, 0} {
			start := time.Now()
			if err := l.read(t, t.Context(), s); err != nil || time.Since(start) != want {
				t.Errorf("read %d: %v after %v, want %v", i, err, time.Since(start), want)
			}
		}
		if got := l.asked(); got != "0111" {
			t.Errorf("asked %s", got)
		}
		// One that hangs alone is waited for.
		l.set(1, hangs)
		time.Sleep(time.Minute)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := l.read(t, ctx, s); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
	})
}

// stuck delivers half of a body and then nothing.
type stuck struct{ blob.Source }

func (s stuck) Range(ctx context.Context, ref blob.Ref, off, n int64) (io.ReadCloser, error) {
	r, err := s.Source.Range(ctx, ref, off, n)
	if err != nil {
		return nil, err
	}
	return struct {
		io.Reader
		io.Closer
	}{io.MultiReader(io.LimitReader(r, n/2), forever{ctx}), r}, nil
}

type forever struct{ ctx context.Context }

func (f forever) Read([]byte) (int, error) {
	<-f.ctx.Done()
	return 0, f.ctx.Err()
}

func TestStallsInTheBody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(2)
		l.places[0].Source = stuck{l.places[0].Source}
		s := retry.New(choose.New(l.places...), retry.Policy{})
		start := time.Now()
		if err := l.read(t, t.Context(), s); err != nil || l.asked() != "01" {
			t.Error(err)
		}
		if d := time.Since(start); d < 3*time.Second || d > 4*time.Second {
			t.Errorf("took %v", d)
		}
	})
}

func TestHedge(t *testing.T) {
	for places := 1; places <= 2; places++ {
		synctest.Test(t, func(t *testing.T) {
			l := newLab(places)
			s := choose.New(l.places...)
			urgent := blob.WithUrgent(t.Context())
			l.set(0, takes(100*time.Millisecond))
			for range 32 {
				if err := l.read(t, urgent, s); err != nil {
					t.Fatal(err)
				}
			}
			l.asked()
			once := func(n int32) { // the next request hangs
				var left atomic.Int32 // requests are made at the same time
				left.Store(n)
				l.set(0, func(ctx context.Context, size int64) *memblob.Fault {
					if left.Add(-1) == 0 {
						return hangs(ctx, size)
					}
					return takes(100*time.Millisecond)(ctx, size)
				})
			}
			once(1)
			start := time.Now()
			err := l.read(t, urgent, s)
			if d := time.Since(start); err != nil || d > 250*time.Millisecond || d < 100*time.Millisecond {
				t.Errorf("%d places: %v after %v", places, err, d)
			}
			if got, want := l.asked(), []string{"", "00", "01"}[places]; got != want {
				t.Errorf("asked %s, want %s", got, want)
			}
			// Nobody waits for this one.
			once(1)
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			defer cancel()
			if err := l.read(t, ctx, s); !errors.Is(err, context.DeadlineExceeded) || l.asked() != "0" {
				t.Errorf("what is not urgent: %v", err)
			}
		})
	}
}

// However slow a place becomes, few bytes are asked for twice.
func TestHedgeIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mem := memblob.New(nil)
		big := bytes.Repeat([]byte("0123456789abcdef"), 1<<14) // 256 KiB
		ref := mem.Put(big)
		slow := false
		mem.Fault = func(ctx context.Context, _ blob.Ref, _, n int64) *memblob.Fault {
			d := time.Millisecond
			if slow {
				d = time.Second
			}
			return takes(d)(ctx, n)
		}
		made := count.New(mem)
		s := choose.New(choose.Place{Name: "one", Source: made})
		const reads = 200
		for i := range reads {
			slow = i >= 32
			if _, err := blob.ReadAll(blob.WithUrgent(t.Context()), s, ref, 0, ref.Size); err != nil {
				t.Fatal(err)
			}
		}
		// 1 MiB at once, and then each twentieth.
		if extra := made.Stats().Requests - reads; extra == 0 || extra > 4+reads/20 {
			t.Errorf("%d of %d requests were made twice", extra, reads)
		}
	})
}

func TestSlowMirrorIsLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(2)
		s := choose.New(l.places...)
		l.set(1, takes(10*time.Millisecond))
		// What is known of the second one is from when the first one failed.
		for range 20 {
			l.set(0, fails(blob.ErrUnavailable))
			l.read(t, t.Context(), s)
		}
		time.Sleep(2 * time.Second)
		l.set(0, takes(time.Second))
		for range 20 {
			l.read(t, t.Context(), s)
		}
		l.asked()
		l.read(t, t.Context(), s)
		if got := l.asked(); got != "1" {
			t.Errorf("asked %s", got)
		}
	})
}

// Wrong bytes: who reads says so, and is told whom to ask.
func TestReject(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(3)
		made := count.New(choose.New(l.places...))
		s := count.New(retry.New(made, retry.Policy{}))
		l.set(0, func(context.Context, int64) *memblob.Fault { return &memblob.Fault{Flip: 1} })
		r, err := s.Range(t.Context(), l.ref, 0, 10)
		if err != nil {
			t.Fatal(err)
		}
		io.ReadAll(r)
		r.Close()
		others := blob.Reject(r)
		l.asked()
		for i, o := range others {
			if err := l.read(t, t.Context(), o); err != nil || l.asked() != fmt.Sprint(i+1) {
				t.Errorf("alternative %d: %v", i, err)
			}
		}
		if len(others) != 2 || made.Stats().Requests != 3 || s.Stats().Requests != 3 {
			t.Errorf("%d alternatives, %+v, %+v", len(others), made.Stats(), s.Stats())
		}
		// From now on the liar comes last.
		if err := l.read(t, t.Context(), s); err != nil || l.asked() != "1" {
			t.Error(err)
		}
		// Bytes of two places: nobody knows whose were wrong.
		l.set(1, func(_ context.Context, n int64) *memblob.Fault {
			return &memblob.Fault{After: n / 2, Err: io.ErrUnexpectedEOF}
		})
		if r, err = s.Range(t.Context(), l.ref, 0, 10); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadAll(r); err != nil || l.asked() != "12" {
			t.Error(err)
		}
		if others = blob.Reject(r); len(others) != 3 {
			t.Errorf("%d alternatives", len(others))
		}
		// Of those that may all be wrong, who was found out first is asked first, and if
		// that is wrong again, the next one.
		time.Sleep(time.Millisecond)
		if r, err = s.Range(t.Context(), l.ref, 0, 10); err != nil {
			t.Fatal(err)
		}
		io.ReadAll(r)
		r.Close()
		if blob.Reject(r); l.asked() != "0" {
			t.Error("the one that is known was not asked first")
		}
		if err := l.read(t, t.Context(), s); err != nil || l.asked() != "2" {
			t.Error(err)
		}
		if blob.Reject(bytes.NewReader(nil)) != nil {
			t.Error("somebody else to ask, out of nothing")
		}
	})
}

// dribbles delivers 100 bytes each 0.1 s.
type dribbles struct{ blob.Source }

func (d dribbles) Range(ctx context.Context, ref blob.Ref, off, n int64) (io.ReadCloser, error) {
	r, err := d.Source.Range(ctx, ref, off, n)
	if err != nil {
		return nil, err
	}
	return struct {
		io.Reader
		io.Closer
	}{dribble{r}, r}, nil
}

type dribble struct{ io.Reader }

func (d dribble) Read(p []byte) (int, error) {
	time.Sleep(100 * time.Millisecond)
	return d.Reader.Read(p[:min(len(p), 100)])
}

// TestDribbles: what would take minutes is asked of somebody else, unless he is as slow.
func TestDribbles(t *testing.T) {
	for slow, want := range map[string]struct {
		asked       string
		least, most time.Duration
	}{"0": {"011", 3 * time.Second, 4 * time.Second}, "01": {"010", 8 * time.Minute, 9 * time.Minute}} {
		synctest.Test(t, func(t *testing.T) {
			l := newLab(2)
			for i := range slow {
				l.places[i].Source = dribbles{l.places[i].Source}
			}
			s := retry.New(choose.New(l.places...), retry.Policy{Attempts: 1000, Total: time.Hour})
			start := time.Now()
			for range 2 { // the second time it is known
				if got, err := blob.ReadAll(t.Context(), s, l.ref, 0, l.ref.Size); err != nil || !bytes.Equal(got, data) {
					t.Errorf("%d bytes, %v", len(got), err)
				}
			}
			if d := time.Since(start); d < want.least || d > want.most {
				t.Errorf("slow are %s: took %v", slow, d)
			}
			if got := l.asked(); got[:2] != want.asked[:2] || slow == "0" && got != want.asked {
				t.Errorf("slow are %s: asked %s, want %s", slow, got, want.asked)
			}
		})
	}
}
