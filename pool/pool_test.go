package pool

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

func TestRoundTrip(t *testing.T) {
	dir := t.TempDir()
	p := open(t, dir)
	es := entries(0, 50)
	s := create(t, p, es)
	if len(check(t, p, 0, 50)) != 0 {
		t.Fatal("a new segment has chunks")
	}
	for i, e := range es {
		if found, off, ok := lookup(p, e.Digest, e.Size); !ok || found != s || off != e.Off {
			t.Fatalf("chunk %d is at %d, not where Create said", i, off)
		}
		store(t, s, e.Off, content(i))
	}
	if len(check(t, p, 0, 50)) != 50 {
		t.Fatal("chunks are missing")
	}
	u := p.Usage()
	if u.Segments != 1 || u.Address != s.Size || u.Present != s.Size || u.Disk == 0 {
		t.Errorf("usage %+v", u)
	}
	if got, ok := p.Segment(s.ID); !ok || got != s {
		t.Error("no segment by id")
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	p = open(t, dir)
	if len(check(t, p, 0, 50)) != 50 {
		t.Fatal("chunks are missing after another Open")
	}
}

func TestLookup(t *testing.T) {
	p := open(t, quickDir(t))
	const segments, each = 30, 40
	for i := range segments {
		create(t, p, entries(i*each, (i+1)*each))
	}
	seen := map[string]bool{}
	all := entries(0, (segments+1)*each) // the last ones nobody has
	for i, s := range p.Lookup(all) {
		want, off, ok := lookup(p, all[i].Digest, all[i].Size)
		if s != want || off != all[i].Off || ok != (i < segments*each) {
			t.Fatalf("chunk %d: %v at %d, alone %v at %d", i, s, all[i].Off, want, off)
		}
	}
	for i := range segments * each {
		d, size := digest(i), uint32(len(content(i)))
		s, off, ok := lookup(p, d, size)
		if !ok || seen[fmt.Sprint(s.ID, off)] {
			t.Fatalf("chunk %d is not found at a place of its own", i)
		}
		seen[fmt.Sprint(s.ID, off)] = true
		if _, _, ok := lookup(p, d, size+1); ok {
			t.Fatal("a chunk is found by another size")
		}
		d.Algorithm = 3 - d.Algorithm
		if _, _, ok := lookup(p, d, size); ok {
			t.Fatal("a chunk is found by another algorithm")
		}
	}
	// The same digest with another size, as a lying index has it, hides nothing.
	lie := entries(0, 1)
	lie[0].Size++
	create(t, p, lie)
	for _, size := range []uint32{lie[0].Size, lie[0].Size - 1} {
		if s, off, ok := lookup(p, lie[0].Digest, size); !ok || !hasEntry(s, off, size) {
			t.Errorf("size %d is not found", size)
		}
	}
	if _, _, ok := lookup(p, digest(1<<40), 1); ok {
		t.Error("an unknown chunk is found")
	}
}

func hasEntry(s *Segment, off int64, size uint32) bool {
	for i := range s.table.count {
		if e := s.table.entry(i); e.Off == off && e.Size == size {
			return true
		}
	}
	return false
}

// Digests that were made to cluster are found all the same, one by one and as a
// sorted list.
func TestFindAdversarial(t *testing.T) {
	mean := func(sums ...[32]byte) []Entry {
		var es []Entry
		for _, sum := range sums {
			for _, a := range []chunk.Algorithm{chunk.BLAKE3, chunk.SHA256} { // one sum, two digests
				es = append(es, Entry{Digest: chunk.Digest{Algorithm: a, Sum: sum}, Size: 1})
			}
		}
		return es
	}
	var powers, tail, ends [][32]byte
	for i := range 256 {
		var a, b, c [32]byte
		a[i/8] = 1 << (i % 8) // exponential: interpolation always guesses too low
		b[31] = byte(i)       // the same first 8 bytes
		c[0], c[31] = byte(i/255)*255, byte(i)
		powers, tail, ends = append(powers, a), append(tail, b), append(ends, c)
	}
	for _, es := range [][]Entry{mean(powers...), mean(tail...), mean(ends...), mean([32]byte{})} {
		size, err := place(es)
		if err != nil {
			t.Fatal(err)
		}
		b, err := encodeTable(es, size, 0)
		if err != nil {
			t.Fatal(err)
		}
		tab, err := parseTable(b)
		if err != nil {
			t.Fatal(err)
		}
		from := 0
		for _, x := range byDigest(es) {
			var ok bool
			if _, ok, from = tab.find(&es[x], from); !ok {
				t.Fatalf("find %s after those before it", es[x].Digest)
			}
		}
		for _, e := range es {
			if got, ok, _ := tab.find(&e, 0); !ok || got != e {
				t.Fatalf("find %s: %+v, want %+v", e.Digest, got, e)
			}
			e.Digest.Sum[15] ^= 0x81
			if got, ok, _ := tab.find(&e, 0); ok && got.Digest != e.Digest {
				t.Fatalf("find %s: %+v", e.Digest, got)
			}
		}
	}
}

func TestCreateRefuses(t *testing.T) {
	p := open(t, t.TempDir())
	one := entries(0, 1)[0]
	with := func(fn func(*Entry)) []Entry {
		e := one
		fn(&e)
		return []Entry{e}
	}
	big := make([]Entry, MaxSegment/chunk.MaxSize+1)
	for i := range big {
		big[i] = Entry{Digest: chunk.Digest{Algorithm: chunk.BLAKE3, Sum: [32]byte{byte(i), byte(i >> 8), byte(i >> 16)}}, Size: chunk.MaxSize}
	}
	for name, test := range map[string]struct {
		es   []Entry
		want error
	}{
		"nothing":   {nil, nil},
		"twice":     {[]Entry{one, one}, nil},
		"empty":     {with(func(e *Entry) { e.Size = 0 }), chunk.ErrCorrupt},
		"huge":      {with(func(e *Entry) { e.Size = chunk.MaxSize + 1 }), chunk.ErrCorrupt},
		"algorithm": {with(func(e *Entry) { e.Digest.Algorithm = 9 }), chunk.ErrCorrupt},
		"too many":  {big, index.ErrLimit},
	} {
		if _, err := p.Create(test.es); err == nil || test.want != nil && !errors.Is(err, test.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if n := names(t, p); len(n) != 0 {
		t.Errorf("left behind: %q", n)
	}
}

// An ID is a name for a table: it never refers to another one, not even in
// another pool, and two tables whose IDs would be equal get different ones.
func TestID(t *testing.T) {
	a, b := open(t, t.TempDir()), open(t, t.TempDir())
	create(t, b, entries(5, 6))
	s, other := create(t, a, entries(0, 3)), create(t, b, entries(0, 3))
	if s.ID != other.ID {
		t.Error("the same table has two IDs")
	}
	again := create(t, a, entries(0, 3)) // nobody does this; the salt tells them apart
	if again.ID == s.ID {
		t.Error("two segments have one ID")
	}
	if _, ok := a.Segment(s.ID); !ok || len(a.all()) != 2 {
		t.Error("a segment was replaced")
	}
	if err := os.Rename(again.dir, filepath.Join(a.dir, "0badcafe")); err != nil {
		t.Fatal(err)
	}
	a.Close()
	a = open(t, filepath.Dir(a.dir))
	if d := a.Damage(); len(d) != 1 || !strings.Contains(d[0].Error(), "0badcafe") {
		t.Errorf("a segment under a wrong name: %v", d)
	}
}

func TestBounds(t *testing.T) {
	p := open(t, t.TempDir())
	s := create(t, p, []Entry{{Digest: digest(0), Size: 3 * chunk.Block}})
	for _, b := range [][2]int64{{-1, 1}, {-chunk.Block, chunk.Block}, {0, 3*chunk.Block + 1}, {3 * chunk.Block, 1}, {1 << 62, 1 << 62}, {0, 1 << 62}, {0, -5}, {s.Size + 1, 0}} {
		if s.Present(b[0], b[1]) {
			t.Errorf("%d bytes at %d are present", b[1], b[0])
		}
	}
	for _, off := range []int64{-chunk.Block, -1, 1, 4096, 3 * chunk.Block, 1 << 62} {
		if err := s.Store(off, []byte("x")); !errors.Is(err, chunk.ErrCorrupt) {
			t.Errorf("store at %d: %v", off, err)
		}
	}
	if err := s.Store(2*chunk.Block, make([]byte, chunk.Block+1)); !errors.Is(err, chunk.ErrCorrupt) {
		t.Errorf("store beyond the end: %v", err)
	}
	if err := s.Store(0, nil); err == nil {
		t.Error("nothing was stored")
	}
	if st, err := os.Stat(s.Path()); err != nil || st.Size() != s.Size || s.presence.count() != 0 {
		t.Error("the segment changed")
	}
}

// Everything at once, for the race detector. Readers must not see a chunk that
// is present and wrong.
func TestConcurrent(t *testing.T) {
	p := open(t, quickDir(t))
	const n = 120
	es := entries(0, n)
	s := create(t, p, es)
	var writers, others sync.WaitGroup
	for g := range 4 {
		writers.Go(func() {
			r := rand.New(rand.NewPCG(1, uint64(g)))
			for _, i := range r.Perm(n) {
				if err := s.Store(es[i].Off, content(i)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	done := make(chan struct{})
	loop := func(fn func()) {
		others.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
					fn()
				}
			}
		})
	}
	loop(func() { check(t, p, 0, n) })
	loop(func() {
		if err := p.Sync(); err != nil {
			t.Error(err)
		}
	})
	loop(func() { p.Usage() })
	k := 0
	loop(func() {
		defer p.Exclusive()()
		k++
		extra, err := p.Create([]Entry{{Digest: chunk.Sum(chunk.BLAKE3, fmt.Append(nil, k)), Size: 1}})
		if err == nil {
			err = p.Remove(extra)
		}
		if err != nil {
			t.Error(err)
		}
	})
	writers.Wait()
	close(done)
	others.Wait()
	if len(check(t, p, 0, n)) != n {
		t.Error("chunks are missing")
	}
	if err := p.Sync(); err != nil {
		t.Fatal(err)
	}
	for i := range s.presence.live {
		if s.presence.live[i].Load() != s.presence.durable[i] {
			t.Error("not all is durable after Sync")
		}
	}
}

// Whoever still uses a segment of a closed pool gets errors, not a crash.
func TestClosed(t *testing.T) {
	p := open(t, t.TempDir())
	es := entries(0, 2)
	s := create(t, p, es)
	store(t, s, es[0].Off, content(0))
	if err := errors.Join(p.Close(), p.Close()); err != nil {
		t.Fatal(err)
	}
	s.Present(0, s.Size)
	for _, err := range []error{s.Store(0, content(0)), s.ReadAt(make([]byte, 1), 0)} {
		if !errors.Is(err, os.ErrClosed) {
			t.Errorf("%v, want %v", err, os.ErrClosed)
		}
	}
	if _, _, ok := lookup(p, es[0].Digest, es[0].Size); ok {
		t.Error("a closed pool has chunks")
	}
}

func TestLeftovers(t *testing.T) {
	dir := t.TempDir()
	p := open(t, dir)
	s := create(t, p, entries(0, 3))
	p.Close()
	for _, name := range []string{"00000007.new", "00000008.del", "0000000A", "note", "7", segmentName(s.ID) + ".new"} {
		if err := os.MkdirAll(filepath.Join(p.dir, name, "sub"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	p = open(t, dir)
	want := []string{"0000000A", "7", "note", segmentName(s.ID)} // what we did not make is not ours to delete
	slices.Sort(want)
	if got := names(t, p); !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	if len(p.Damage()) != 0 || len(p.all()) != 1 {
		t.Errorf("%d segments, damage %v", len(p.all()), p.Damage())
	}
}

func TestFormat(t *testing.T) {
	dir := t.TempDir()
	p := open(t, dir)
	create(t, p, entries(0, 1))
	p.Close()
	name := filepath.Join(dir, "format")
	for text, want := range map[string]error{
		`{"format":"shale-pool","version":3,"more":[]}`: index.ErrUnsupported,
		`{"format":"shale-pool","version":0}`:           chunk.ErrCorrupt,
		`{"format":"other","version":1}`:                chunk.ErrCorrupt,
		``:                                              chunk.ErrCorrupt,
		"gone":                                          chunk.ErrCorrupt,
	} {
		err := os.WriteFile(name, []byte(text), 0o600)
		if text == "gone" {
			err = os.Remove(name)
		}
		if err != nil {
			t.Fatal(err)
		}
		_, err = Open(dir)
		if !errors.Is(err, want) || !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), "remove the pool's directory") {
			t.Errorf("format %q: %v", text, err)
		}
	}
	if n := names(t, p); len(n) != 1 {
		t.Errorf("a refused pool was changed: %q", n)
	}
	if err := os.WriteFile(name, []byte(`{"format":"shale-pool","version":1}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if p := open(t, dir); len(p.all()) != 1 {
		t.Error("the segment is gone")
	}
}
