package pool

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/chunk"
)

// seals is a file system with fs-verity as far as a pool sees one, until the test ends.
// It knows files by their inodes, and when these were made.
type seals struct{ sealed sync.Map }

func inode(path string) (id [3]uint64) {
	var st unix.Statx_t
	if unix.Statx(unix.AT_FDCWD, path, 0, unix.STATX_INO|unix.STATX_BTIME, &st) == nil {
		id = [3]uint64{st.Ino, uint64(st.Btime.Sec), uint64(st.Btime.Nsec)}
	}
	return id
}

func newSeals(t *testing.T) *seals {
	t.Helper()
	f := &seals{}
	before := isSealed
	t.Cleanup(func() { isSealed = before })
	isSealed = func(path string) bool {
		_, ok := f.sealed.Load(inode(path))
		return ok
	}
	return f
}

func (f *seals) enable(_ context.Context, file *os.File) error {
	if _, err := file.Write([]byte("x")); !errors.Is(err, unix.EBADF) {
		return unix.ETXTBSY
	}
	f.sealed.Store(inode(file.Name()), true)
	return nil
}

// sealedSegment is a pool with one, of n chunks.
func sealedSegment(t *testing.T, f *seals, n int) (*Pool, *Segment, []Entry) {
	t.Helper()
	p := open(t, filepath.Join(quickDir(t), "pool"))
	es := entries(0, n)
	s := create(t, p, es)
	for i, e := range es {
		if err := p.Seal(context.Background(), s, f.enable); err != nil || s.Sealed() {
			t.Fatalf("an incomplete segment is sealed: %v", err)
		}
		store(t, s, e.Off, content(i))
	}
	if err := p.Seal(context.Background(), s, f.enable); err != nil || !s.Sealed() {
		t.Fatalf("sealed: %v, %v", s.Sealed(), err)
	}
	return p, s, es
}

// settled fails the test if the quota's account is not what the disk says, or files are
// left beside the segment's.
func settled(t *testing.T, p *Pool) {
	t.Helper()
	var want int64
	for _, s := range p.all() {
		want += s.disk() + s.overhead()
		if _, err := os.Stat(file(s, newData)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("left beside: %v", err)
		}
	}
	if got := p.quota.used.Load(); got != want {
		t.Errorf("%d bytes are accounted for, %d taken", got, want)
	}
}

// unreadable has all reads of a segment fail as those of what has rotted do.
func unreadable(t *testing.T, s *Segment) (mend func()) {
	t.Helper()
	f, err := os.Open("/proc/self/mem") // nothing is mapped at low addresses
	if err != nil {
		t.Fatal(err)
	}
	data := s.data.Swap(f)
	return func() { s.data.Store(data); f.Close() }
}

func TestSeal(t *testing.T) {
	f := newSeals(t)
	p, s, es := sealedSegment(t, f, 20)
	js, err := os.ReadFile(filepath.Join(filepath.Dir(p.dir), "format"))
	if err != nil || !strings.Contains(string(js), `"version":2`) {
		t.Errorf("format: %s, %v", js, err)
	}
	store(t, s, es[1].Off, content(1)) // is there, and stays what it is
	if p.Usage().Sealed != 1 || len(check(t, p, 0, 20)) != 20 {
		t.Errorf("%+v", p.Usage())
	}
	settled(t, p)
	dir := filepath.Dir(p.dir)
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	reboot(t)
	if err := os.WriteFile(filepath.Join(s.dir, newData), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	p = open(t, dir)
	if s = p.all()[0]; !s.Sealed() || len(check(t, p, 0, 20)) != 20 {
		t.Errorf("opened again: sealed %v", s.Sealed())
	}
	settled(t, p)
	if v, err := Check(context.Background(), dir, func(x Problem) { t.Errorf("%+v", x) }); err != nil || v.Chunks != 20 {
		t.Errorf("%+v, %v", v, err)
	}
}

// TestSealRot: what cannot be read is forgotten, the rest is copied, and all can be stored
// and sealed again. Who reads the old file reads on.
func TestSealRot(t *testing.T) {
	f := newSeals(t)
	p, s, es := sealedSegment(t, f, 30)
	var told []Problem
	p.OnRot(func(x Problem) { told = append(told, x) })
	old, err := os.Open(s.Path())
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	mend := unreadable(t, s)
	if ok, err := s.Read(make([]byte, 10), es[0].Off); ok || err != nil {
		t.Fatal(ok, err)
	}
	mend()
	if len(told) != 1 || told[0].Offset != es[0].Off || !told[0].Dropped || told[0].Chunk != es[0].Digest.String() || s.Present(es[0].Off, 1) {
		t.Errorf("%+v", told)
	}
	if err := s.Store(es[0].Off, content(0)); !errors.Is(err, ErrNoSpace) {
		t.Errorf("store in a sealed segment: %v", err)
	}
	// The kernel may show it: then it stays.
	var keep References
	if err := keep.Add(s.ID, es[5].Off, 1); err != nil {
		t.Fatal(err)
	}
	kept := func() (*References, func(), error) { return &keep, func() {}, nil }
	if err := p.Unseal(context.Background(), s, kept); err != nil || !s.Sealed() {
		t.Errorf("unsealed below a direct mount: %v", err)
	}
	// Nor where there is no room for both.
	if err := p.SetQuota(s.disk()*3/2, func(int64) error { return nil }); err != nil {
		t.Fatal(err)
	}
	if err := p.Unseal(context.Background(), s, KeepNone); !errors.Is(err, ErrNoSpace) || !s.Sealed() {
		t.Errorf("unsealed where there is no room: %v", err)
	}
	if err := p.SetQuota(0, nil); err != nil {
		t.Fatal(err)
	}
	before := s.disk()
	if err := p.Unseal(context.Background(), s, KeepNone); err != nil || s.Sealed() {
		t.Fatal(err)
	}
	if s.disk() >= before {
		t.Errorf("it takes %d bytes, %d before", s.disk(), before)
	}
	settled(t, p)
	got := make([]byte, len(content(0)))
	if _, err := old.ReadAt(got, es[0].Off); err != nil || !bytes.Equal(got, content(0)) {
		t.Errorf("the old file: %v", err)
	}
	if here := check(t, p, 0, 30); len(here) != 29 || here[0] {
		t.Errorf("%d chunks are here", len(here))
	}
	store(t, s, es[0].Off, content(0))
	if err := p.Seal(context.Background(), s, f.enable); err != nil || !s.Sealed() {
		t.Errorf("sealed again: %v", err)
	}
	// Scrub finds it too, below a direct mount as well, and unseals where nothing is shown.
	mend = unreadable(t, s)
	var v Verified
	var found []Problem
	if err := p.VerifySegment(context.Background(), &v, s, kept, nil, func(x Problem) { found = append(found, x) }); err != nil {
		t.Fatal(err)
	}
	mend()
	if len(found) != 30 || !found[7].Dropped || s.presence.count() != 0 || !s.Sealed() {
		t.Errorf("%d problems, %d granules left, sealed %v", len(found), s.presence.count(), s.Sealed())
	}
	if _, err := p.Verify(context.Background(), KeepNone, nil, func(x Problem) { t.Errorf("%+v", x) }); err != nil || s.Sealed() {
		t.Errorf("sealed %v: %v", s.Sealed(), err)
	}
	for i, e := range es {
		store(t, s, e.Off, content(i))
	}
	if n := len(check(t, p, 0, 30)); n != 30 {
		t.Errorf("%d chunks are here", n)
	}
	settled(t, p)
}

// TestSealEvict: a sealed segment goes as a whole, and not if something of it is kept.
func TestSealEvict(t *testing.T) {
	f := newSeals(t)
	p, s, es := sealedSegment(t, f, 40)
	var keep References
	if err := keep.Add(s.ID, es[39].Off, 1); err != nil {
		t.Fatal(err)
	}
	if freed, err := p.Evict(&keep, 1); freed != 0 || err != nil || !s.Sealed() {
		t.Errorf("evicted %d bytes of what is kept: %v", freed, err)
	}
	before := s.disk()
	if freed, err := p.Evict(&References{}, 1); freed != before || err != nil || s.Sealed() || s.disk() != 0 {
		t.Errorf("freed %d of %d: %v", freed, before, err)
	}
	settled(t, p)
	for i, e := range es {
		store(t, s, e.Off, content(i))
	}
	if n := len(check(t, p, 0, 40)); n != 40 {
		t.Errorf("%d chunks are here", n)
	}
}

// TestSealFree: what nobody refers to is forgotten at once, and its space comes back.
func TestSealFree(t *testing.T) {
	f := newSeals(t)
	p, s, es := sealedSegment(t, f, 40)
	var used References
	for _, e := range es[:10] {
		if err := used.Add(s.ID, e.Off, int64(e.Size)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := p.Free(&used); err != nil || len(check(t, p, 0, 40)) != 10 {
		t.Fatalf("%d are here: %v", len(check(t, p, 0, 40)), err)
	}
	before := s.disk()
	if err := p.Unseal(context.Background(), s, KeepNone); err != nil || s.disk() >= before/2 || len(check(t, p, 0, 40)) != 10 {
		t.Errorf("%d bytes of %d: %v", s.disk(), before, err)
	}
	settled(t, p)
	for i, e := range es {
		store(t, s, e.Off, content(i))
	}
	if err := p.Seal(context.Background(), s, f.enable); err != nil || !s.Sealed() {
		t.Fatal(err)
	}
	if freed, err := p.Free(&References{}); err != nil || freed.Segments != 1 || len(p.all()) != 0 {
		t.Errorf("%+v, %v", freed, err)
	}
	settled(t, p)
}

// TestSealInterrupted: who wants to change a segment does not wait for its seal, and one
// that failed leaves it as it was.
func TestSealInterrupted(t *testing.T) {
	newSeals(t)
	p := open(t, filepath.Join(quickDir(t), "pool"))
	es := entries(0, 10)
	s := create(t, p, es)
	for i, e := range es {
		store(t, s, e.Off, content(i))
	}
	begun := make(chan bool)
	ended := make(chan error)
	go func() {
		ended <- p.Seal(context.Background(), s, func(ctx context.Context, _ *os.File) error {
			close(begun)
			<-ctx.Done()
			return ctx.Err()
		})
	}()
	<-begun
	store(t, s, es[3].Off, content(3)) // waits for nothing
	if n := len(check(t, p, 0, 10)); n != 10 {
		t.Errorf("%d chunks can be read", n)
	}
	if err := p.Seal(context.Background(), s, nil); err != nil { // another does
		t.Error(err)
	}
	before := s.disk()
	if freed, err := p.Evict(&References{}, 1<<40); err != nil || freed < before {
		t.Errorf("freed %d of %d: %v", freed, before, err)
	}
	if err := <-ended; !errors.Is(err, context.Canceled) || s.Sealed() {
		t.Errorf("sealed %v: %v", s.Sealed(), err)
	}
	settled(t, p)
	for i, e := range es {
		store(t, s, e.Off, content(i))
	}
	if n := len(check(t, p, 0, 10)); n != 10 {
		t.Errorf("%d chunks are here", n)
	}
}

// TestSealReaders: who reads while a segment is sealed, loses chunks, is unsealed and
// filled again, over and over, sees right bytes or none.
func TestSealReaders(t *testing.T) {
	f := newSeals(t)
	p, s, es := sealedSegment(t, f, 20)
	var stop atomic.Bool
	var hits, rounds atomic.Int64
	var all sync.WaitGroup
	for k := range 3 {
		all.Go(func() {
			r := rand.New(rand.NewPCG(uint64(k), 2))
			buf := make([]byte, 100_000)
			for !stop.Load() {
				i := r.IntN(len(es))
				got := buf[:len(content(i))]
				ok, err := s.Read(got, es[i].Off)
				if err != nil || ok && !bytes.Equal(got, content(i)) {
					t.Errorf("chunk %d: wrong bytes, or %v", i, err)
					return
				}
				if ok {
					hits.Add(1)
				}
			}
		})
	}
	all.Go(func() {
		r := rand.New(rand.NewPCG(7, 7))
		for !stop.Load() {
			granules := make(bitmap, words(s.Size/chunk.Block))
			granules.take(es[r.IntN(len(es))].granules())
			if _, err := s.discard(granules); err != nil {
				t.Error(err)
			}
			if r.IntN(4) == 0 {
				if _, err := p.Evict(&References{}, 1); err != nil {
					t.Error(err)
				}
			}
			if err := p.Unseal(context.Background(), s, KeepNone); err != nil {
				t.Error(err)
			}
			for i, e := range es {
				if err := s.Store(e.Off, content(i)); err != nil {
					t.Error(err)
				}
			}
			if err := p.Seal(context.Background(), s, f.enable); err != nil || !s.Sealed() {
				t.Errorf("sealed %v: %v", s.Sealed(), err)
			}
			rounds.Add(1)
		}
	})
	time.Sleep(2 * time.Second)
	stop.Store(true)
	all.Wait()
	if hits.Load() < 100 || rounds.Load() < 3 {
		t.Errorf("%d hits in %d rounds: nothing was tried", hits.Load(), rounds.Load())
	}
	settled(t, p)
}
