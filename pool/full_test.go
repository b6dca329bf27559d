package pool

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/chunk"
)

// A full disk: errors say so, what is recorded is right, and goes on when
// there is room again.
func TestFull(t *testing.T) {
	mnt := tmpfs(t, 2<<20)
	dir := filepath.Join(mnt, "pool")
	p := open(t, dir)
	const n = 60 // 3 MB
	es := entries(0, n)
	s := create(t, p, es)
	full := 0
	for i, e := range es {
		switch err := s.Store(e.Off, content(i)); {
		case errors.Is(err, ErrNoSpace):
			full++
		case err != nil:
			t.Fatal(err)
		}
	}
	got := check(t, p, 0, n)
	if full == 0 || len(got)+full != n {
		t.Fatalf("%d present, %d refused, want %d together", len(got), full, n)
	}
	if err := p.Sync(); err != nil {
		t.Errorf("sync: %v", err)
	}
	if free := fillUp(t, mnt); free != 0 {
		t.Fatalf("%d bytes are still free", free)
	}
	before := names(t, p)
	if _, err := p.Create(entries(n, n+1000)); !errors.Is(err, ErrNoSpace) {
		t.Errorf("create: %v", err)
	}
	if after := names(t, p); len(after) != len(before) {
		t.Errorf("left behind: %q", after)
	}
	// Also after a reboot with a disk that is still full.
	reboot(t)
	p.Close()
	p = open(t, dir)
	if again := check(t, p, 0, n); len(again) != len(got) {
		t.Errorf("%d chunks, want %d", len(again), len(got))
	}
	// Room is made where nothing needs room.
	var keep References
	some := es[n/2]
	if err := keep.Add(s.ID, some.Off, int64(some.Size)); err != nil {
		t.Fatal(err)
	}
	freed, err := p.Free(&keep)
	if err != nil || freed.Disk == 0 {
		t.Fatalf("freed %+v, %v", freed, err)
	}
	s = p.all()[0]
	for i := range 10 {
		store(t, s, es[i].Off, content(i))
	}
}

func fillUp(t *testing.T, mnt string) uint64 {
	f, err := os.Create(filepath.Join(mnt, "ballast"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, n := range []int{1 << 16, pageSize} {
		for err == nil {
			_, err = f.Write(make([]byte, n))
		}
		err = nil
	}
	var st unix.Statfs_t
	if err := unix.Statfs(mnt, &st); err != nil {
		t.Fatal(err)
	}
	return st.Bavail
}

// The record's own blocks are missing: the bytes are written, but nobody
// believes them.
func TestFullRecord(t *testing.T) {
	mnt := tmpfs(t, 4<<20)
	p := open(t, filepath.Join(mnt, "pool"))
	const n = 300 // presence of more than the header's page
	var es []Entry
	for i := range n {
		es = append(es, Entry{Digest: chunk.Sum(chunk.BLAKE3, []byte{byte(i), byte(i >> 8)}), Size: chunk.MaxSize})
	}
	s := create(t, p, es)
	at := es[n-1].Off
	big := bytes.Repeat([]byte{1}, chunk.MaxSize)
	if err := s.descriptor(func(fd int) error { return unix.Fallocate(fd, 0, at, pageSize) }); err != nil {
		t.Skipf("no fallocate: %v", err)
	}
	fillUp(t, mnt)
	if err := s.Store(at, big[:pageSize]); !errors.Is(err, ErrNoSpace) {
		t.Errorf("store without room for the record: %v", err)
	}
	if s.Present(at, 1) || s.presence.count() != 0 {
		t.Error("it is believed")
	}
}
