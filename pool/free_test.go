package pool

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/chunk"
)

func punch(fd int, off, n int64) error {
	return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

func TestFree(t *testing.T) {
	dir := t.TempDir()
	p := open(t, dir)
	const n = 40
	es, lone := entries(0, n), entries(n, n+3)
	s, gone := create(t, p, es), create(t, p, lone)
	for i, e := range es {
		store(t, s, e.Off, content(i))
	}
	store(t, gone, lone[0].Off, content(n))
	if err := os.MkdirAll(s.dir+badSuffix+"/x", 0o700); err != nil {
		t.Fatal(err)
	}
	var keep References
	for i := 0; i < n; i += 3 {
		if err := keep.Add(s.ID, es[i].Off, int64(es[i].Size)); err != nil {
			t.Fatal(err)
		}
	}
	if err := keep.Add(0x1234, 1<<30, 1); err != nil { // of a segment that is not here
		t.Fatal(err)
	}
	before := p.Usage()
	freed, err := p.Free(&keep)
	if err != nil {
		t.Fatal(err)
	}
	after := p.Usage()
	if freed.Segments != 1 || freed.Disk != before.Disk-after.Disk || freed.Disk < before.Disk/2 {
		t.Errorf("freed %+v of %d bytes, %d are left", freed, before.Disk, after.Disk)
	}
	if got := names(t, p); len(got) != 1 {
		t.Errorf("still there: %q", got)
	}
	if err := gone.Store(lone[1].Off, content(n+1)); !errors.Is(err, os.ErrClosed) {
		t.Errorf("a late store into a deleted segment: %v", err)
	}
	only := func(p *Pool) {
		t.Helper()
		got := check(t, p, 0, n)
		for i := range n {
			if got[i] != (i%3 == 0) {
				t.Errorf("chunk %d: present %v", i, got[i])
			}
		}
	}
	only(p)
	// It was durable at once: neither a kill nor a power cut brings back what
	// is a hole now.
	only(open(t, dir))
	if again, err := p.Free(&keep); err != nil || again != (Freed{}) {
		t.Errorf("a second time: %+v, %v", again, err)
	}
	// What was freed can be fetched again.
	store(t, s, es[1].Off, content(1))
	if !check(t, p, 0, n)[1] {
		t.Error("a chunk does not come back")
	}
	if err := p.Sync(); err != nil {
		t.Fatal(err)
	}
	reboot(t)
	q := open(t, dir)
	if len(check(t, q, 0, n)) != (n+2)/3+1 {
		t.Error("chunks are missing after a reboot")
	}
	if freed, err := q.Free(&References{}); err != nil || freed.Segments != 1 || len(names(t, q)) != 0 {
		t.Errorf("without references: %+v, %v", freed, err)
	}
}

// A power cut between the record and the holes: the bytes are only forgotten.
// A store that never got into the record is found by its data.
func TestFreeUnrecorded(t *testing.T) {
	p := open(t, t.TempDir())
	es := entries(0, 3)
	s := create(t, p, es)
	if _, err := s.data.Load().WriteAt(content(1), es[1].Off); err != nil {
		t.Fatal(err)
	}
	store(t, s, es[2].Off, content(2))
	var keep References
	if err := keep.Add(s.ID, es[2].Off, 1); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Free(&keep); err != nil {
		t.Fatal(err)
	}
	if !s.hole(0, es[2].Off) {
		t.Error("bytes that nobody believes take space")
	}
	if !s.Present(es[2].Off, 1) {
		t.Error("the first granule is in use")
	}
}

// If it cannot be recorded that bytes are gone, they stay.
func TestFreeUnwritable(t *testing.T) {
	p := open(t, t.TempDir())
	es := entries(0, 2)
	s := create(t, p, es)
	for i, e := range es {
		store(t, s, e.Off, content(i))
	}
	var keep References
	if err := keep.Add(s.ID, es[0].Off, 1); err != nil {
		t.Fatal(err)
	}
	record := s.presence.file
	ro, err := os.Open(file(s, "present"))
	if err != nil {
		t.Fatal(err)
	}
	s.presence.file = ro
	_, err = p.Free(&keep)
	s.presence.file = record
	ro.Close()
	if err == nil || len(check(t, p, 0, 2)) != 2 {
		t.Errorf("freed although it could not be recorded: %v", err)
	}
}

func TestReferencesRefuse(t *testing.T) {
	var r References
	for _, b := range [][2]int64{{-1, 1}, {0, 0}, {0, -1}, {MaxSegment, 1}, {1 << 62, 1 << 62}, {1, MaxSegment}} {
		if err := r.Add(1, b[0], b[1]); !errors.Is(err, chunk.ErrCorrupt) {
			t.Errorf("%d bytes at %d: %v", b[1], b[0], err)
		}
	}
	if err := r.Add(1, MaxSegment-1, 1); err != nil || len(r.segments[1]) != MaxSegment/chunk.Block/64 {
		t.Error(err)
	}
}

func TestBitmap(t *testing.T) {
	for _, runs := range [][][2]int64{{}, {{0, 1}}, {{5, 200}}, {{0, 64}, {65, 66}, {127, 129}}, {{0, 256}}, {{192, 200}}} {
		b := make(bitmap, 4)
		for _, r := range runs {
			if !b.take(r[0], r[1]) || b.take(r[0], r[1]) {
				t.Fatal("take")
			}
		}
		var got [][2]int64
		for g := b.next(0, 300, true); g < 300; {
			end := b.next(g, 300, false)
			got = append(got, [2]int64{g, end})
			g = b.next(end, 300, true)
		}
		if len(got) != len(runs) {
			t.Errorf("%v, want %v", got, runs)
		}
		for i := range got {
			if got[i] != runs[i] {
				t.Errorf("%v, want %v", got, runs)
			}
		}
		if b.empty() != (len(runs) == 0) {
			t.Error("empty")
		}
	}
}

// TestSyncWhileRemoved syncs all the time while segments go.
func TestSyncWhileRemoved(t *testing.T) {
	p := open(t, quickDir(t))
	done, failed := make(chan struct{}), make(chan error, 1)
	go func() {
		for {
			select {
			case <-done:
				failed <- nil
				return
			default:
			}
			if err := p.Sync(); err != nil {
				failed <- err
				return
			}
		}
	}()
	for i := range 300 {
		es := entries(i, i+1)
		s := create(t, p, es)
		store(t, s, 0, content(i))
		if err := p.Remove(s); err != nil {
			t.Fatal(err)
		}
	}
	close(done)
	if err := <-failed; err != nil {
		t.Fatalf("a segment was removed while the pool was synced: %v", err)
	}
}
