package pool

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/chunk"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(storeForeverEnv); dir != "" {
		storeForever(dir)
	}
	os.Exit(m.Run())
}

// reboot makes the kernel have another boot id until the test ends.
func reboot(t testing.TB) {
	t.Helper()
	before := bootID
	t.Cleanup(func() { bootID = before })
	id := fmt.Sprintf("%036x", rand.Uint64())
	bootID = func() (string, error) { return id, nil }
}

// tmpfs mounts a tmpfs of so many bytes, whose syncs cost nothing.
func tmpfs(t testing.TB, size int64) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting a tmpfs needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("shale-test", dir, "tmpfs", 0, fmt.Sprintf("size=%d,mode=0700", size)); err != nil {
		t.Skipf("cannot mount a tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount: %v", err)
			unix.Unmount(dir, unix.MNT_DETACH)
		}
	})
	return dir
}

// quickDir is a directory whose syncs cost nothing if there can be one.
func quickDir(t testing.TB) string {
	if os.Geteuid() != 0 {
		return t.TempDir()
	}
	return tmpfs(t, 256<<20)
}

func open(t testing.TB, dir string) *Pool {
	t.Helper()
	p, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() }) // a second Close does nothing
	return p
}

type sample struct {
	bytes  []byte
	digest chunk.Digest
}

var samples sync.Map // int -> sample

func sampleOf(i int) sample {
	if s, ok := samples.Load(i); ok {
		return s.(sample)
	}
	var seed [32]byte
	binary.LittleEndian.PutUint64(seed[:], uint64(i))
	r := rand.NewChaCha8(seed)
	b := make([]byte, 1+r.Uint64()%100_000)
	r.Read(b)
	s := sample{b, chunk.Sum(chunk.Algorithm(1+i%2), b)}
	samples.Store(i, s)
	return s
}

// content returns bytes that depend on i alone. Their number is 1 to 100,000.
func content(i int) []byte { return sampleOf(i).bytes }

func digest(i int) chunk.Digest { return sampleOf(i).digest }

// entries returns the chunks with the given contents.
func entries(from, to int) (es []Entry) {
	for i := from; i < to; i++ {
		es = append(es, Entry{Digest: digest(i), Size: uint32(len(content(i)))})
	}
	return es
}

func create(t testing.TB, p *Pool, es []Entry) *Segment {
	t.Helper()
	s, err := p.Create(es)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func store(t testing.TB, s *Segment, off int64, b []byte) {
	t.Helper()
	if err := s.Store(off, b); err != nil {
		t.Fatal(err)
	}
}

func lookup(p *Pool, d chunk.Digest, size uint32) (*Segment, int64, bool) {
	e := []Entry{{Digest: d, Size: size}}
	s := p.Lookup(e)[0]
	return s, e[0].Off, s != nil
}

// check finds contents [from, to) in the pool, fails the test if what is
// present is wrong, and returns which are present.
func check(t testing.TB, p *Pool, from, to int) (present map[int]bool) {
	t.Helper()
	present = map[int]bool{}
	for i := from; i < to; i++ {
		want := content(i)
		s, off, ok := lookup(p, digest(i), uint32(len(want)))
		if !ok || !s.Present(off, int64(len(want))) {
			continue
		}
		got := make([]byte, (len(want)+pageSize-1)&^(pageSize-1))
		if err := s.ReadAt(got, off); err != nil {
			continue // no bytes are not wrong ones
		}
		if string(got[:len(want)]) != string(want) {
			t.Fatalf("chunk %d at offset %d of segment %08x is present and wrong", i, off, s.ID)
		}
		if strings.Trim(string(got[len(want):]), "\x00") != "" {
			t.Fatalf("chunk %d at offset %d of segment %08x is followed by something else than zeros", i, off, s.ID)
		}
		present[i] = true
	}
	return present
}

// file returns the path of a file of a segment.
func file(s *Segment, name string) string { return filepath.Join(s.dir, name) }

// names lists a pool's segment directory.
func names(t testing.TB, p *Pool) (names []string) {
	t.Helper()
	des, err := os.ReadDir(p.dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, de := range des {
		names = append(names, de.Name())
	}
	return names
}
