package pool

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// refsOf names contents [from, to) of a segment that has contents from 0 on.
func refsOf(t *testing.T, es []Entry, s *Segment, from, to int) *References {
	t.Helper()
	refs := &References{}
	for _, e := range es[from:to] {
		if err := refs.Add(s.ID, e.Off, int64(e.Size)); err != nil {
			t.Fatal(err)
		}
	}
	return refs
}

func blocks(t *testing.T, s *Segment) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(s.Path(), &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

func sizeOf(es []Entry) (n int64) {
	for _, e := range es {
		n += pages(int64(e.Size))
	}
	return n
}

// TestAllocate: what is set aside can be stored on a full disk, counts, and is given
// back when nobody names it.
func TestAllocate(t *testing.T) {
	const disk = 16 << 20
	dir := tmpfs(t, disk)
	p := open(t, dir)
	es := entries(0, 60)
	s := create(t, p, es)
	store(t, s, es[0].Off, content(0))
	empty := blocks(t, s)
	refs := refsOf(t, es, s, 0, 40)
	for range 2 { // again is nothing
		if err := p.Allocate(refs); err != nil {
			t.Fatal(err)
		}
		if got, want := blocks(t, s), empty+sizeOf(es[1:40]); got != want {
			t.Fatalf("%d bytes on disk, want %d", got, want)
		}
		if got := p.quota.used.Load(); got != blocks(t, s)+s.overhead() {
			t.Errorf("counted %d, there are %d", got, blocks(t, s)+s.overhead())
		}
	}
	if s.Present(es[1].Off, 1) || len(check(t, p, 0, 60)) != 1 {
		t.Error("what is set aside is taken for present")
	}
	// Somebody takes all the rest.
	f, err := os.Create(dir + "/rest")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for b := make([]byte, 1<<16); err == nil; {
		_, err = f.Write(b)
	}
	for i := range 40 {
		store(t, s, es[i].Off, content(i))
	}
	if err := s.Store(es[50].Off, content(50)); !errors.Is(err, ErrNoSpace) {
		t.Errorf("%v, want ErrNoSpace", err)
	}
	if err := p.Allocate(refsOf(t, es, s, 0, 60)); !errors.Is(err, ErrNoSpace) {
		t.Errorf("more than there is: %v, want ErrNoSpace", err)
	}
	if got := p.quota.used.Load(); got != blocks(t, s)+s.overhead() {
		t.Errorf("counted %d, there are %d", got, blocks(t, s)+s.overhead())
	}
	if err := p.Allocate(&References{}); err != nil {
		t.Fatal(err)
	}
	if got, want := blocks(t, s), sizeOf(es[:40]); got != want {
		t.Errorf("%d bytes on disk, want %d", got, want)
	}
	if len(check(t, p, 0, 60)) != 40 {
		t.Error("what is present was given back")
	}
}

// TestAllocateQuota: what is set aside is of the quota, once.
func TestAllocateQuota(t *testing.T) {
	p := open(t, quickDir(t))
	es := entries(0, 40)
	s := create(t, p, es)
	limit := s.overhead() + sizeOf(es[:20])
	none := func(int64) error { return errors.New("nothing may go") }
	if err := p.SetQuota(limit, none); err != nil {
		t.Fatal(err)
	}
	if err := p.Allocate(refsOf(t, es, s, 0, 21)); !errors.Is(err, ErrNoSpace) {
		t.Fatalf("%v, want ErrNoSpace", err)
	}
	if err := p.Allocate(refsOf(t, es, s, 0, 20)); err != nil {
		t.Fatal(err)
	}
	if err := s.Store(es[30].Off, content(30)); !errors.Is(err, ErrNoSpace) {
		t.Errorf("%v, want ErrNoSpace", err)
	}
	for i := range 20 {
		store(t, s, es[i].Off, content(i))
	}
	if got := p.quota.used.Load(); got != limit {
		t.Errorf("counted %d, want %d", got, limit)
	}
}

// TestAllocateAgain: a process that comes after one that was killed asks for the same
// without paying twice, and gives back what it does not ask for.
func TestAllocateAgain(t *testing.T) {
	dir := quickDir(t)
	p := open(t, dir)
	es := entries(0, 100)
	s := create(t, p, es)
	if err := p.Allocate(refsOf(t, es, s, 0, 100)); err != nil {
		t.Fatal(err)
	}
	full := blocks(t, s)
	store(t, s, es[3].Off, content(3))
	if err := p.Close(); err != nil { // what is set aside is left, as by one that is killed
		t.Fatal(err)
	}
	// With the descriptor of the first: who reads the file may be asked by us.
	f, err := os.OpenFile(file(s, "data"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p, err = OpenWith(dir, map[uint32]*os.File{s.ID: f})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	s, _ = p.Segment(s.ID)
	if flags, err := unix.FcntlInt(f.Fd(), unix.F_SETFL, unix.O_APPEND); err != nil {
		t.Fatal(flags, err)
	}
	if flags, err := unix.FcntlInt(s.File().Fd(), unix.F_GETFL, 0); err != nil || flags&unix.O_APPEND == 0 {
		t.Errorf("it has a descriptor of its own: flags %#x, %v", flags, err)
	}
	unix.FcntlInt(f.Fd(), unix.F_SETFL, 0)
	limit := full + s.overhead()
	if err := p.SetQuota(limit, func(int64) error { return errors.New("nothing may go") }); err != nil {
		t.Fatal(err)
	}
	if err := p.Allocate(refsOf(t, es, s, 0, 100)); err != nil {
		t.Fatal(err)
	}
	if got := p.quota.used.Load(); blocks(t, s) != full || got != limit {
		t.Errorf("%d bytes on disk, want %d; counted %d, want %d", blocks(t, s), full, got, limit)
	}
	if err := p.Allocate(refsOf(t, es, s, 10, 20)); err != nil {
		t.Fatal(err)
	}
	if got, want := blocks(t, s), sizeOf(es[10:20])+sizeOf(es[3:4]); got != want {
		t.Errorf("%d bytes on disk, want %d", got, want)
	}
	// Another file is not taken for it.
	other, err := os.Create(dir + "/other")
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	p.Close()
	if _, err := OpenWith(dir, map[uint32]*os.File{s.ID: other}); err == nil {
		t.Error("another file is taken for a segment's")
	}
}
