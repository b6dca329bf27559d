package pool

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/shale-image/shale/chunk"
)

func TestBuilder(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pool")
	p, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	content := func(i int) []byte { return bytes.Repeat([]byte{byte(i), byte(i >> 8), 7}, 1+i*311) }
	old := []Entry{{Digest: chunk.Sum(chunk.BLAKE3, content(3)), Size: uint32(len(content(3)))}}
	if _, err := p.Create(old); err != nil {
		t.Fatal(err)
	}
	b, err := p.Build()
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 4 { // each chunk from several at once
		wg.Go(func() {
			for i := range 200 {
				if err := b.Add(chunk.Sum(chunk.BLAKE3, content(i)), content(i)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if err := b.Add(chunk.Digest{}, nil); !errors.Is(err, chunk.ErrCorrupt) {
		t.Errorf("an empty chunk: %v", err)
	}
	s, err := b.Commit()
	if err != nil {
		t.Fatal(err)
	}
	check := func(p *Pool, id uint32) {
		t.Helper()
		for i := range 200 {
			e := []Entry{{Digest: chunk.Sum(chunk.BLAKE3, content(i)), Size: uint32(len(content(i)))}}
			s := p.Lookup(e)[0]
			if s == nil || s.ID != id { // the older place of chunk 3 has nothing
				t.Fatalf("chunk %d is in %v", i, s)
			}
			got := make([]byte, e[0].Size)
			if err := s.ReadAt(got, e[0].Off); err != nil || !s.Present(e[0].Off, int64(e[0].Size)) || !bytes.Equal(got, content(i)) {
				t.Fatalf("chunk %d: %v", i, err)
			}
		}
	}
	check(p, s.ID)
	left, err := p.Build() // a process that dies
	if err != nil {
		t.Fatal(err)
	}
	if err := left.Add(chunk.Sum(chunk.BLAKE3, []byte("x")), []byte("x")); err != nil {
		t.Fatal(err)
	}
	gone, err := p.Build()
	if err != nil {
		t.Fatal(err)
	}
	if err := gone.Abort(); err != nil {
		t.Fatal(err)
	}
	none, err := p.Build()
	if err != nil {
		t.Fatal(err)
	}
	if s, err := none.Commit(); s != nil || err != nil {
		t.Fatalf("a segment of nothing: %v, %v", s, err)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if p, err = Open(dir); err != nil || len(p.Damage()) > 0 {
		t.Fatal(err, p.Damage())
	}
	defer p.Close()
	check(p, s.ID)
	if names, err := os.ReadDir(filepath.Join(dir, "segments")); err != nil || len(names) != 2 {
		t.Errorf("%d segments, %v", len(names), err)
	}
}

// What was written before a power cut and did not reach the disk is not
// believed.
func TestBuilderAfterPowerCut(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pool")
	p, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	b, err := p.Build()
	if err != nil {
		t.Fatal(err)
	}
	one, two := bytes.Repeat([]byte("one"), 30000), bytes.Repeat([]byte("two"), 30000)
	for _, c := range [][]byte{one, two} {
		if err := b.Add(chunk.Sum(chunk.BLAKE3, c), c); err != nil {
			t.Fatal(err)
		}
	}
	s, err := b.Commit()
	if err != nil {
		t.Fatal(err)
	}
	e := []Entry{{Digest: chunk.Sum(chunk.BLAKE3, two), Size: uint32(len(two))}}
	p.Lookup(e)
	// Without Close, which would sync: another boot finds zeros in the second.
	if _, err := s.data.Load().WriteAt(make([]byte, 4096), e[0].Off); err != nil {
		t.Fatal(err)
	}
	if _, err := s.presence.file.WriteAt([]byte("00000000-0000-0000-0000-000000000000"), bootOff); err != nil {
		t.Fatal(err)
	}
	again, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	for i, c := range [][]byte{one, two} {
		e := []Entry{{Digest: chunk.Sum(chunk.BLAKE3, c), Size: uint32(len(c))}}
		s := again.Lookup(e)[0]
		if got := s.Present(e[0].Off, int64(len(c))); got != (i == 0) {
			t.Errorf("chunk %d present: %v", i, got)
		}
	}
	_ = p.Close()
}
