package mount

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/mount/fusedev"
)

// around has all of c but what missing says, as one file.
type around struct {
	c       *memContent
	missing func(off int64, n int) bool
	peeked  atomic.Int64 // bytes
}

func (a *around) Extent(_, from, to int64) (int64, int64) { return from, to }

func (a *around) Peek(p []byte, off int64) bool {
	a.peeked.Add(int64(len(p)))
	if a.missing(off, len(p)) {
		return false
	}
	copy(p, a.c.data[off:])
	return true
}

// pushing mounts c with what is around, and opens the file big of it for random
// access.
func pushing(t *testing.T, a *around) (*os.File, *Mounted) {
	t.Helper()
	dir, m := mounted(t, a.c, Options{Backing: File, Buffered: true, ReadAheadKiB: 4, Options: fusedev.Options{Around: a}})
	f, err := os.Open(filepath.Join(dir, "big"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_RANDOM); err != nil {
		t.Fatal(err)
	}
	return f, m
}

// What lies around a READ is read without another one, if it is at hand.
func TestPush(t *testing.T) {
	tree, c := image(t)
	want, err := os.ReadFile(filepath.Join(tree, "big"))
	if err != nil {
		t.Fatal(err)
	}
	big := int64(bytes.Index(c.data, want[:4096]))
	hole := big + 2<<20 // from here on nothing is at hand but when it is asked for
	a := &around{c: c, missing: func(off int64, n int) bool { return off+int64(n) > hole }}
	f, m := pushing(t, a)
	const window = 128 << 10
	read := func(off, n int64) {
		t.Helper()
		p := make([]byte, n)
		for at := off; at < off+n; at += 4096 {
			if _, err := f.ReadAt(p[at-off:at-off+4096], at); err != nil {
				t.Fatal(err)
			}
		}
		if !bytes.Equal(p, want[off:off+n]) {
			t.Errorf("wrong bytes at %d+%d", off, n)
		}
	}
	first := (big+window-1)&^(window-1) - big // of the windows that lie in the file
	deadline := time.Now().Add(20 * time.Second)
	settle := func() { // until what was pushed is in the page cache
		for last := int64(-1); time.Now().Before(deadline) && (last != a.peeked.Load() || last == 0); {
			last = a.peeked.Load()
			time.Sleep(20 * time.Millisecond)
		}
	}
	served := false
	for at := first; at+window <= 2<<20 && !served; at += window {
		read(at, 4096)
		settle()
		before := m.Stats()
		read(at, window)
		served = m.Stats().Hits == before.Hits && m.Stats().Misses == before.Misses
	}
	if !served {
		t.Errorf("no window of %d bytes was read by one READ: %+v", window, m.Stats())
	}
	before := m.Stats().Hits
	read(2<<20, window)
	if n := m.Stats().Hits - before; n != window/4096 {
		t.Errorf("%d READs of what is not at hand, want %d", n, window/4096)
	}
	read(0, int64(len(want))&^4095)
}

// After a start pages are pushed for who reads one after the other, and for nobody else.
func TestPushSteady(t *testing.T) {
	tree, c := image(t)
	want, err := os.ReadFile(filepath.Join(tree, "big"))
	if err != nil {
		t.Fatal(err)
	}
	big := int64(bytes.Index(c.data, want[:4096]))
	a := &around{c: c, missing: func(int64, int) bool { return false }}
	f, m := pushing(t, a)
	ahead, err := os.ReadFile(filepath.Join(bdiDir, m.conn.bdi(), "read_ahead_kb"))
	if err != nil || strings.TrimSpace(string(ahead)) != "0" {
		t.Errorf("the kernel reads %q KiB ahead in the served file, want 0; %v", ahead, err)
	}
	m.Steady()
	for last := int64(-1); last != a.peeked.Load(); { // until what was pushed before is
		last = a.peeked.Load()
		time.Sleep(50 * time.Millisecond)
	}
	a.peeked.Store(0)
	reads := func(offs ...int64) (n int64) { // how many READs that takes
		t.Helper()
		before := m.Stats().Hits
		p := make([]byte, 4096)
		for _, off := range offs {
			if _, err := f.ReadAt(p, off); err != nil || !bytes.Equal(p, want[off:off+4096]) {
				t.Errorf("at %d: %v", off, err)
			}
			time.Sleep(20 * time.Millisecond)
		}
		return m.Stats().Hits - before
	}
	reads(1<<20, 512<<10, 768<<10, 256<<10)
	if n := a.peeked.Load(); n != 0 {
		t.Errorf("%d bytes were pushed for who reads here and there", n)
	}
	unit := (big+16<<10-1)&^(16<<10-1) - big // of the units that lie in the file
	var pages []int64
	for off := unit; off < unit+200<<10; off += 4096 {
		pages = append(pages, off)
	}
	if n := reads(pages...); n > int64(len(pages)/3) {
		t.Errorf("%d READs of %d pages", n, len(pages))
	}
}

// Pages that are pushed while somebody waits to read them make nobody else wait,
// and those who do not wait for ever.
func TestPushMeetsMiss(t *testing.T) {
	tree, c := image(t)
	want, err := os.ReadFile(filepath.Join(tree, "big"))
	if err != nil {
		t.Fatal(err)
	}
	big := int64(bytes.Index(c.data, want[:4096]))
	release := make(chan struct{})
	var waiting atomic.Int64
	slow := func(off int64) bool { return (off-big)/4096%32 == 5 } // a page of each window
	var all atomic.Bool
	f, _ := pushing(t, &around{c: c, missing: func(off int64, n int) bool { return off < big || !all.Load() }})
	c.onTry(func(off int64, n int) bool { return !slow(off) })
	c.onRead(func(ctx context.Context, off int64, n int) error {
		waiting.Add(1)
		select {
		case <-release:
		case <-ctx.Done():
		}
		return ctx.Err()
	})
	const windows = 20
	var readers sync.WaitGroup
	check := func(at int64) {
		p := make([]byte, 4096)
		if _, err := f.ReadAt(p, at); err != nil {
			t.Error(err)
		} else if !bytes.Equal(p, want[at:at+4096]) {
			t.Errorf("wrong bytes at %d", at)
		}
	}
	for i := range int64(windows) {
		readers.Go(func() { check((i*32 + 5) * 4096) })
	}
	within(t, "misses", func() {
		for waiting.Load() < windows {
			time.Sleep(time.Millisecond)
		}
	})
	all.Store(true)
	within(t, "what is at hand beside pages that are waited for", func() {
		var hits sync.WaitGroup
		for k := range int64(4) {
			hits.Go(func() {
				for i := range int64(windows) {
					check((i*32 + 6 + k*6) * 4096)
				}
			})
		}
		hits.Wait()
	})
	close(release)
	within(t, "the misses", readers.Wait)
}
