package pool

import (
	"context"
	"os"
	"path/filepath"
	"testing"
)

// rot changes a byte of the data of a segment, as a disk might.
func rot(t *testing.T, s *Segment, off int64) {
	t.Helper()
	f, err := os.OpenFile(file(s, "data"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, off); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1
	if _, err := f.WriteAt(b, off); err != nil {
		t.Fatal(err)
	}
}

func TestVerify(t *testing.T) {
	dir := filepath.Join(quickDir(t), "pool")
	p := open(t, dir)
	const n = 30
	es := entries(0, n)
	s := create(t, p, es)
	for i, e := range es[:n-1] { // the last is not here
		store(t, s, e.Off, content(i))
	}
	var found []Problem
	tell := func(x Problem) { found = append(found, x) }
	v, err := p.Verify(context.Background(), KeepNone, nil, tell)
	if err != nil || len(found) != 0 || v.Chunks != n-1 || v.Segments != 1 {
		t.Fatalf("%+v, %v, %v", v, found, err)
	}
	for _, i := range []int{3, 7} {
		rot(t, s, es[i].Off+int64(es[i].Size)/2)
	}
	var keep References
	if err := keep.Add(s.ID, es[7].Off, 1); err != nil {
		t.Fatal(err)
	}
	// Without a service: nothing is changed.
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if v, err = Check(context.Background(), dir, tell); err != nil || len(found) != 2 || v.Chunks != n-1 {
		t.Fatalf("%+v, %+v, %v", v, found, err)
	}
	found = nil
	p = open(t, dir)
	if _, err := p.Verify(context.Background(), func() (*References, func(), error) { return &keep, func() {}, nil }, nil, tell); err != nil {
		t.Fatal(err)
	}
	if len(found) != 2 || found[0].Offset != es[3].Off || !found[0].Dropped || found[0].Chunk != es[3].Digest.String() || found[1].Offset != es[7].Off || found[1].Dropped {
		t.Errorf("%+v", found)
	}
	s = p.all()[0]
	if s.Present(es[3].Off, 1) || !s.Present(es[7].Off, 1) {
		t.Error("the one that is kept is dropped, or the other is not")
	}
	store(t, s, es[3].Off, content(3))
	store(t, s, es[7].Off, content(7))
	found = nil
	if v, err = p.Verify(context.Background(), KeepNone, nil, tell); err != nil || len(found) != 0 || v.Chunks != n-1 {
		t.Errorf("after both were stored again: %+v, %+v, %v", v, found, err)
	}
	// A table that is damaged.
	p.Close()
	if err := os.Truncate(file(s, "table"), 100); err != nil {
		t.Fatal(err)
	}
	if _, err := Check(context.Background(), dir, tell); err != nil || len(found) != 1 || found[0].Offset != -1 {
		t.Errorf("%+v, %v", found, err)
	}
}
