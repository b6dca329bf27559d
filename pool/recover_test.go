package pool

import (
	"bytes"
	"errors"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/shale-image/shale/chunk"

	"golang.org/x/sys/unix"
)

// Within one boot a process that ends without Close loses nothing.
func TestSameBoot(t *testing.T) {
	dir := t.TempDir()
	p := open(t, dir)
	es := entries(0, 30)
	s := create(t, p, es)
	for i := range 20 {
		store(t, s, es[i].Off, content(i))
	}
	q := open(t, dir) // p is never asked again, as if it had been killed
	if n := len(check(t, q, 0, 30)); n != 20 {
		t.Errorf("%d chunks are present, want 20", n)
	}
	// And what it had not synced is synced.
	if err := q.Close(); err != nil {
		t.Fatal(err)
	}
	reboot(t)
	scribble(t, s, func(int64) bool { return true }) // nobody reads what is durable
	if q = open(t, dir); q.Usage().Present != s.presence.count()*chunk.Block {
		t.Errorf("%d bytes are durable", q.Usage().Present)
	}
}

// scribble overwrites those 4 KiB blocks of the data that fn chooses.
func scribble(t *testing.T, s *Segment, fn func(off int64) bool) {
	t.Helper()
	f, err := os.OpenFile(file(s, "data"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for off := int64(0); off < s.Size; off += pageSize {
		if fn(off) {
			if _, err := f.WriteAt(bytes.Repeat([]byte{0xee}, pageSize), off); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// A power cut: of what was written since the last sync any page may be on the
// disk or not, in data and in the presence record alike. What is believed
// afterwards is right, and what was synced is there.
func TestPowerCut(t *testing.T) {
	base := quickDir(t)
	for seed := range uint64(60) {
		r := rand.New(rand.NewPCG(7, seed))
		dir := filepath.Join(base, "pool")
		p := open(t, dir)
		const n = 40
		es := entries(0, n)
		s := create(t, p, es)
		order := r.Perm(n)
		synced, stored := r.IntN(n/2), n/2+r.IntN(n/2)
		var data, present []byte
		for k, i := range order[:stored] {
			if k == synced {
				if err := p.Sync(); err != nil {
					t.Fatal(err)
				}
				data, present = read(t, s, "data"), read(t, s, "present")
			}
			store(t, s, es[i].Off, content(i))
		}
		if r.IntN(2) == 0 { // in the midst of a sync: the data were not synced, the record is
			s.presence.promote(bitmap(make([]uint64, len(s.presence.live))))
		}
		mix(t, r, s, "data", data, pageSize)
		mix(t, r, s, "present", present, 512)
		before := bootID
		reboot(t)
		q := open(t, dir)
		got := check(t, q, 0, n)
		for _, i := range order[:synced] {
			if !got[i] {
				t.Errorf("seed %d: chunk %d was synced and is gone", seed, i)
			}
		}
		// What was lost comes back, and this time stays.
		qs := q.all()[0]
		for i := range n {
			store(t, qs, es[i].Off, content(i))
		}
		if err := q.Close(); err != nil {
			t.Fatal(err)
		}
		reboot(t)
		if n := len(check(t, open(t, dir), 0, n)); n != len(es) {
			t.Errorf("seed %d: %d chunks after a clean reboot", seed, n)
		}
		bootID = before
		os.RemoveAll(dir)
	}
}

func read(t testing.TB, s *Segment, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(file(s, name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// mix puts back the old bytes of some pieces of a file.
func mix(t *testing.T, r *rand.Rand, s *Segment, name string, old []byte, piece int) {
	t.Helper()
	b := read(t, s, name)
	odds := r.IntN(5)
	for off := 0; off < len(b); off += piece {
		if end := min(off+piece, len(b)); r.IntN(4) < odds {
			copy(b[off:end], old[off:end])
		}
	}
	if err := os.WriteFile(file(s, name), b, 0); err != nil {
		t.Fatal(err)
	}
}

// A store that was torn, bytes that never came, and a chunk that is whole.
func TestTorn(t *testing.T) {
	dir := t.TempDir()
	p := open(t, dir)
	big := func(b byte) []byte { return bytes.Repeat([]byte{b}, 3*chunk.Block) }
	var es []Entry
	for b := range byte(4) {
		es = append(es, Entry{Digest: chunk.Sum(chunk.BLAKE3, big(b+1)), Size: 3 * chunk.Block})
	}
	// Of this one nothing says what it should be.
	es = append(es, Entry{Digest: chunk.Digest{Algorithm: chunk.Origin, Sum: es[0].Digest.Sum}, Size: 3 * chunk.Block})
	s := create(t, p, es)
	for i, e := range es {
		store(t, s, e.Off, big(byte(i+1)))
	}
	scribble(t, s, func(off int64) bool { return off == es[1].Off+5*pageSize }) // torn
	if err := s.descriptor(func(fd int) error { return punch(fd, es[2].Off, 3*chunk.Block) }); err != nil {
		t.Skipf("the file system makes no holes: %v", err)
	}
	reboot(t)
	q := open(t, dir)
	for i, want := range []bool{true, false, false, true, false} {
		if got := q.all()[0].Present(es[i].Off, int64(es[i].Size)); got != want {
			t.Errorf("chunk %d: present %v, want %v", i, got, want)
		}
	}
	if q.all()[0].Present(es[1].Off, 1) {
		t.Error("half a chunk is believed")
	}
	// What recover found stays found.
	q = open(t, dir)
	if n := q.Usage().Present; n != 6*chunk.Block {
		t.Errorf("%d bytes are present after another Open", n)
	}
}

// What lay at an address before does not show behind a chunk that is stored
// there.
func TestTail(t *testing.T) {
	p := open(t, t.TempDir())
	es := entries(0, 10)
	s := create(t, p, es)
	scribble(t, s, func(int64) bool { return true })
	for i, e := range es {
		store(t, s, e.Off, content(i))
	}
	if n := len(check(t, p, 0, 10)); n != 10 {
		t.Errorf("%d chunks", n)
	}
	// Nor does recover believe a chunk that something else follows.
	f, err := os.OpenFile(file(s, "data"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte{1}, es[0].Off+int64(es[0].Size)); err != nil {
		t.Fatal(err)
	}
	reboot(t)
	p = open(t, filepath.Dir(p.dir))
	if got := check(t, p, 0, 10); got[0] || len(got) != 9 {
		t.Errorf("present: %v", got)
	}
}

// A chunk of several records, one of which is lost: the chunk is found whole,
// and that is remembered.
func TestLostRecord(t *testing.T) {
	dir := t.TempDir()
	p := open(t, dir)
	b := bytes.Repeat([]byte("many granules"), 200_000)
	s := create(t, p, []Entry{{Digest: chunk.Sum(chunk.SHA256, b), Size: uint32(len(b))}})
	store(t, s, 0, b)
	p.closeFiles()
	record := read(t, s, "present")
	clear(record[pageSize+recSize : pageSize+2*recSize])
	if err := os.WriteFile(file(s, "present"), record, 0); err != nil {
		t.Fatal(err)
	}
	reboot(t)
	for range 2 {
		p := open(t, dir)
		if !p.all()[0].Present(0, int64(len(b))) {
			t.Error("the chunk is not present")
		}
		p.closeFiles()
	}
}

// The kernel reports that bytes could not be written once, then forgets them.
func TestFailedSync(t *testing.T) {
	dir := t.TempDir()
	p := open(t, dir)
	es := entries(0, 10)
	s := create(t, p, es)
	for i := range 5 {
		store(t, s, es[i].Off, content(i))
	}
	if err := p.Sync(); err != nil {
		t.Fatal(err)
	}
	for i := 5; i < 10; i++ {
		store(t, s, es[i].Off, content(i))
	}
	failSync(t, p, s)
	for _, p := range []*Pool{p, open(t, dir)} {
		if n := len(check(t, p, 0, 10)); n != 5 {
			t.Errorf("%d chunks are believed, want 5", n)
		}
	}
	if err := p.Sync(); err != nil {
		t.Errorf("the next one: %v", err)
	}
}

// failSync has the disk lose a write.
func failSync(t *testing.T, p *Pool, s *Segment) {
	t.Helper()
	r, w, err := os.Pipe() // cannot be synced
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	data := s.data.Load()
	s.data.Store(w)
	if err := p.Sync(); err == nil {
		t.Error("no error")
	}
	s.data.Store(data)
}

// TestFailedSyncCounted: what comes again after a write was lost takes the disk that it
// took before, and is counted once; if it is evicted and comes once more, too.
func TestFailedSyncCounted(t *testing.T) {
	p := open(t, quickDir(t))
	es := entries(0, 10)
	s := create(t, p, es)
	for range 2 {
		for i, e := range es {
			if i == 5 {
				if err := p.Sync(); err != nil {
					t.Fatal(err)
				}
			}
			store(t, s, e.Off, content(i))
		}
		failSync(t, p, s)
		for i, e := range es {
			store(t, s, e.Off, content(i))
		}
		if got, want := p.quota.used.Load(), blocks(t, s)+s.overhead(); got != want {
			t.Errorf("counted %d, there are %d", got, want)
		}
		if _, err := p.Evict(&References{}, math.MaxInt64); err != nil {
			t.Fatal(err)
		}
		if got, want := p.quota.used.Load(), blocks(t, s)+s.overhead(); got != want {
			t.Errorf("counted %d when all is evicted, there are %d", got, want)
		}
	}
}

const storeForeverEnv = "SHALE_POOL_TEST_STORE_FOREVER"

// storeForever is the child of TestKilled.
func storeForever(dir string) {
	p, err := Open(dir)
	if err != nil {
		println(err.Error())
		os.Exit(1)
	}
	os.Stdout.WriteString("ready\n")
	for r := rand.New(rand.NewPCG(rand.Uint64(), 1)); ; {
		i := r.IntN(killChunks)
		s, off, ok := lookup(p, digest(i), uint32(len(content(i))))
		if !ok || s.Store(off, content(i)) != nil || i%10 == 0 && p.Sync() != nil {
			os.Exit(2)
		}
	}
}

const killChunks = 300

// kill -9 in the middle of stores and syncs: what is recorded is right, in
// this boot and in the next.
func TestKilled(t *testing.T) {
	dir := t.TempDir()
	p := open(t, dir)
	create(t, p, entries(0, killChunks/2))
	create(t, p, entries(killChunks/2, killChunks))
	p.Close()
	last := 0
	for i := range 8 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), storeForeverEnv+"="+dir)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := out.Read(make([]byte, 1)); err != nil {
			t.Errorf("the child did not start: %v", err)
		}
		time.Sleep(time.Duration(10+rand.IntN(30)) * time.Millisecond)
		cmd.Process.Kill()
		var exit *exec.ExitError
		if err := cmd.Wait(); !errors.As(err, &exit) || exit.Exited() {
			t.Fatalf("the child ended by itself: %v", err)
		}
		if i%3 == 2 {
			reboot(t)
		}
		p := open(t, dir)
		n := len(check(t, p, 0, killChunks))
		if n < last {
			t.Errorf("%d chunks after %d", n, last)
		}
		last = n
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if last == 0 {
		t.Error("nothing was ever stored")
	}
}

// TestMountedAnew: what was not synced is not believed on a file system that was mounted
// again, within the same boot.
func TestMountedAnew(t *testing.T) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, t.TempDir(), 0, unix.STATX_MNT_ID_UNIQUE, &st); err != nil || st.Mask&unix.STATX_MNT_ID_UNIQUE == 0 {
		t.Skip("mounts have unique ids since Linux 6.8")
	}
	mnt := tmpfs(t, 4<<20)
	dir := filepath.Join(mnt, "pool")
	p := open(t, dir)
	const n = 4
	es := entries(0, n)
	s := create(t, p, es)
	for i, e := range es[:n-1] {
		store(t, s, e.Off, content(i))
	}
	if err := p.Sync(); err != nil {
		t.Fatal(err)
	}
	store(t, s, es[n-1].Off, content(n-1))
	p.closeFiles()
	data, err := os.OpenFile(s.Path(), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer data.Close()
	for _, e := range es[n-2:] { // one that was synced, and one that was not, were never written
		if _, err := data.WriteAt(make([]byte, 4096), e.Off); err != nil {
			t.Fatal(err)
		}
	}
	same := open(t, dir)
	if !same.all()[0].Present(es[n-1].Off, 1) {
		t.Error("within one mount it is looked at")
	}
	same.closeFiles()
	again := t.TempDir()
	if err := unix.Mount(mnt, again, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(again, unix.MNT_DETACH) })
	q := open(t, filepath.Join(again, "pool"))
	if q.all()[0].Present(es[n-1].Off, 1) {
		t.Error("on another mount it is believed")
	}
	if !q.all()[0].Present(es[0].Off, 1) {
		t.Error("what was synced is gone")
	}
}

// TestLostTwice: what was durable when a write was lost, and has come again since, is
// believed no more when another one is.
func TestLostTwice(t *testing.T) {
	p := open(t, quickDir(t))
	es := entries(0, 1)
	s := create(t, p, es)
	store(t, s, es[0].Off, content(0))
	if err := p.Sync(); err != nil {
		t.Fatal(err)
	}
	for lost := range 2 {
		store(t, s, es[0].Off, content(0))
		failSync(t, p, s)
		if here := s.Present(es[0].Off, 1); here != (lost == 0) {
			t.Errorf("after %d lost writes: %v", lost+1, here)
		}
		if _, err := p.Evict(&References{}, math.MaxInt64); err != nil {
			t.Fatal(err)
		}
	}
}

// TestLostWrite: after a write was lost nothing of the segment is believed in the next
// session without a look; within this one what was synced before is used on.
func TestLostWrite(t *testing.T) {
	dir := filepath.Join(quickDir(t), "pool")
	p := open(t, dir)
	const n = 4
	es := entries(0, n)
	s := create(t, p, es)
	for i, e := range es {
		if i == n-1 {
			if err := p.Sync(); err != nil {
				t.Fatal(err)
			}
		}
		store(t, s, e.Off, content(i))
	}
	for range 2 { // the second time is no worse
		if _, err := s.presence.distrust(); err != nil {
			t.Fatal(err)
		}
		if len(check(t, p, 0, n)) != n-1 {
			t.Errorf("%d chunks, want what was synced", len(check(t, p, 0, n)))
		}
	}
	store(t, s, es[n-1].Off, content(n-1))
	if err := p.Sync(); err != nil {
		t.Fatal(err)
	}
	data, err := os.OpenFile(s.Path(), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer data.Close()
	if _, err := data.WriteAt(make([]byte, 4096), es[0].Off); err != nil { // what the disk has lost
		t.Fatal(err)
	}
	p.closeFiles()
	reboot(t)
	got := check(t, open(t, dir), 0, n)
	if got[0] || len(got) != n-1 {
		t.Errorf("present: %v, want all but the first", got)
	}
}
