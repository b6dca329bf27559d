package pool

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/shale-image/shale/chunk"
)

// limited is a pool with a quota, from which all may go that keep does not have.
func limited(t testing.TB, dir string, quota int64, keep *References) *Pool {
	p := open(t, dir)
	err := p.SetQuota(quota, func(need int64) error {
		_, err := p.Evict(keep, need)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// disk is what the file system has to say, which is what a quota is about.
func disk(p *Pool) (n int64) {
	for _, s := range p.all() {
		n += s.disk() + s.overhead()
	}
	return n
}

// TestQuota: the pool stays within its quota, what is in use stays, and of the rest
// it is what was used longest ago that goes.
func TestQuota(t *testing.T) {
	const quota, n = 4 << 20, 400 // 20 MB
	var keep References
	p := limited(t, filepath.Join(quickDir(t), "pool"), quota, &keep)
	es := entries(0, n)
	s := create(t, p, es)
	for i := range 5 {
		if err := keep.Add(s.ID, es[i].Off, int64(es[i].Size)); err != nil {
			t.Fatal(err)
		}
	}
	for i, e := range es {
		store(t, s, e.Off, content(i))
		if d := disk(p); d > quota+chunk.MaxSize/16 {
			t.Fatalf("%d bytes on disk after %d chunks, the quota is %d", d, i, quota)
		}
		if u := p.Usage(); u.Disk != p.quota.used.Load() {
			t.Fatalf("%d bytes are counted after %d chunks, and %d on disk", p.quota.used.Load(), i, u.Disk)
		}
	}
	got := check(t, p, 0, n)
	for i := range 5 {
		if !got[i] {
			t.Errorf("chunk %d is in use and was evicted", i)
		}
	}
	if !got[n-1] || len(got) > n/2 {
		t.Errorf("%d chunks are here; the last: %v", len(got), got[n-1])
	}
	if u := p.Usage(); u.Evicted == 0 || u.Quota != quota {
		t.Errorf("%+v", u)
	}
}

// TestQuotaOnce: what two stores write at the same time, having both found it missing, takes
// room once; and what was evicted while it was stored again does, too.
func TestQuotaOnce(t *testing.T) {
	p := open(t, filepath.Join(quickDir(t), "pool"))
	es := entries(0, 20)
	s := create(t, p, es)
	counted := func(what string) {
		t.Helper()
		if u := p.Usage(); u.Disk != p.quota.used.Load() {
			t.Errorf("%s: %d bytes are counted, and %d on disk", what, p.quota.used.Load(), u.Disk)
		}
	}
	for i, e := range es {
		// The store waits for room while another one comes before it.
		err := p.SetQuota(p.quota.used.Load()+1, func(int64) error {
			p.quota.limit.Store(0)
			p.quota.evicted.Add(1)
			if i%2 == 0 {
				return s.Store(e.Off, content(i))
			}
			return s.Store(e.Off, content(i)[:min(len(content(i)), chunk.Block)])
		})
		if err != nil {
			t.Fatal(err)
		}
		store(t, s, e.Off, content(i))
		counted(fmt.Sprint("chunk ", i, " twice"))
	}
	var stores sync.WaitGroup
	for range 4 {
		stores.Go(func() {
			for i, e := range es {
				if err := s.Store(e.Off, content(i)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for range 10 {
		if _, err := p.Evict(&References{}, 100_000); err != nil {
			t.Error(err)
		}
	}
	stores.Wait()
	counted("stored while others are evicted")
}

// TestQuotaInUse: where nothing may go a store fails, and later stores do not once
// there is room.
func TestQuotaInUse(t *testing.T) {
	var keep References
	p := limited(t, filepath.Join(quickDir(t), "pool"), 1<<20, &keep)
	es := entries(0, 60)
	s := create(t, p, es)
	if err := keep.Add(s.ID, 0, s.Size); err != nil {
		t.Fatal(err)
	}
	full := 0
	for i, e := range es {
		if err := s.Store(e.Off, content(i)); errors.Is(err, ErrNoSpace) {
			full++
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if got := check(t, p, 0, 60); full == 0 || len(got)+full != 60 || disk(p) > 1<<20 {
		t.Errorf("%d refused, %d here, %d bytes on disk", full, len(got), disk(p))
	}
	keep = References{}
	if err := p.SetQuota(1<<20, p.quota.evict); err != nil {
		t.Fatal(err)
	}
	for i, e := range es {
		store(t, s, e.Off, content(i))
	}
}

// TestEvictOldest: recency decides, and outlives the process.
func TestEvictOldest(t *testing.T) {
	dir := filepath.Join(quickDir(t), "pool")
	p := open(t, dir)
	const n = 200
	es := entries(0, n)
	s := create(t, p, es)
	for i, e := range es {
		store(t, s, e.Off, content(i))
	}
	for i := range s.use.last {
		s.use.last[i].Store(1) // long ago
	}
	ok, err := s.Read(make([]byte, 10), es[0].Off)
	if !ok || err != nil {
		t.Fatal(ok, err)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	p = open(t, dir)
	before := disk(p)
	freed, err := p.Evict(&References{}, before/2)
	if err != nil || freed < before/2 || before-disk(p) != freed {
		t.Fatalf("freed %d of %d, %d gone: %v", freed, before, before-disk(p), err)
	}
	got := check(t, p, 0, n)
	if !got[0] || len(got) == n {
		t.Errorf("%d chunks are here; the one that was read: %v", len(got), got[0])
	}
	// What was evicted is not here after a power cut either.
	reboot(t)
	p.Close()
	p = open(t, dir)
	if again := check(t, p, 0, n); len(again) != len(got) {
		t.Errorf("%d chunks after a reboot, want %d", len(again), len(got))
	}
	if _, err := p.Evict(&References{}, before); err != nil || p.all()[0].disk() != 0 {
		t.Errorf("%d bytes are left of all: %v", p.all()[0].disk(), err)
	}
}

// TestEvictReaders: who reads while all is evicted and stored again, over and over,
// sees right bytes or none.
func TestEvictReaders(t *testing.T) {
	p := open(t, filepath.Join(quickDir(t), "pool"))
	const n = 40
	es := entries(0, n)
	s := create(t, p, es)
	for i := range es { // made before the clock runs
		content(i)
	}
	var (
		stop         atomic.Bool
		hits, misses atomic.Int64
		all          sync.WaitGroup
	)
	for k := range 4 {
		all.Go(func() {
			r := rand.New(rand.NewPCG(uint64(k), 1))
			buf := make([]byte, 100_000)
			for !stop.Load() {
				i := r.IntN(n)
				got := buf[:len(content(i))]
				switch ok, err := s.Read(got, es[i].Off); {
				case err != nil:
					t.Error(err)
					return
				case !ok:
					misses.Add(1)
				case !bytes.Equal(got, content(i)):
					t.Errorf("wrong bytes of chunk %d", i)
					return
				default:
					hits.Add(1)
				}
			}
		})
	}
	all.Go(func() {
		for !stop.Load() {
			for i, e := range es {
				if err := s.Store(e.Off, content(i)); err != nil {
					t.Error(err)
				}
			}
		}
	})
	all.Go(func() {
		for !stop.Load() {
			if _, err := p.Evict(&References{}, 1<<20); err != nil {
				t.Error(err)
			}
		}
	})
	time.Sleep(2 * time.Second)
	stop.Store(true)
	all.Wait()
	if hits.Load() < 100 || misses.Load() < 100 {
		t.Errorf("%d hits and %d misses: nothing was tried", hits.Load(), misses.Load())
	}
}

// TestReserve: what somebody else is to write counts as written.
func TestReserve(t *testing.T) {
	p := limited(t, filepath.Join(quickDir(t), "pool"), 1<<20, &References{})
	s := create(t, p, entries(0, 40))
	got, release := p.Reserve(3 << 20)
	if got == 0 || got > 1<<20 {
		t.Fatalf("%d bytes of a quota of 1 MiB", got)
	}
	if err := s.Store(0, content(0)); got == 1<<20 && !errors.Is(err, ErrNoSpace) {
		t.Errorf("store where all is taken: %v", err)
	}
	release()
	store(t, s, 0, content(0))
}

// TestBuilderLimit: what does not fit is addressable and absent.
func TestBuilderLimit(t *testing.T) {
	p := open(t, filepath.Join(quickDir(t), "pool"))
	b, err := p.Build()
	if err != nil {
		t.Fatal(err)
	}
	b.Limit(1 << 20)
	const n = 60
	for i := range n {
		if err := b.Add(digest(i), content(i)); err != nil {
			t.Fatal(err)
		}
	}
	s, err := b.Commit()
	if err != nil {
		t.Fatal(err)
	}
	got := check(t, p, 0, n)
	if len(got) == 0 || len(got) == n || s.disk() > 1<<20 {
		t.Fatalf("%d of %d chunks are here, %d bytes on disk", len(got), n, s.disk())
	}
	for i, e := range entries(0, n) {
		if _, off, ok := lookup(p, e.Digest, e.Size); !ok {
			t.Errorf("chunk %d has no place", i)
		} else if !got[i] {
			store(t, s, off, content(i))
		}
	}
	if got := check(t, p, 0, n); len(got) != n {
		t.Errorf("%d chunks are here, want %d", len(got), n)
	}
}
