package mount

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/mount/fusedev"
)

func TestTree(t *testing.T) {
	tree, c := image(t)
	for _, test := range []struct {
		name string
		o    Options
	}{
		{"default", Options{}},
		{"file", Options{Backing: File, ReadAheadKiB: 1024}},
		{"buffered", Options{Backing: File, Buffered: true}},
		{"open-direct", Options{Buffered: true, Options: fusedev.Options{DirectIO: true}}},
		{"loop", Options{Backing: Loop}},
		{"one-thread", Options{Options: fusedev.Options{Threads: 1, Name: "sha256-abc"}}},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir, _ := mounted(t, c, test.o)
			sameTree(t, tree, dir)
		})
	}
}

func TestMountTable(t *testing.T) {
	_, c := image(t)
	dir, _ := mounted(t, c, Options{Options: fusedev.Options{Name: "sha256-abc"}})
	p, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(p)) {
		if strings.Contains(line, " "+dir+" ") {
			t.Log(line)
			if !strings.Contains(line, " ro") || !strings.Contains(line, "/sha256-abc ") {
				t.Errorf("mount table line %q", line)
			}
		} else if strings.Contains(line, " fuse shale ") {
			t.Errorf("the FUSE mount is to be seen: %q", line)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "x"), nil, 0o600); !errors.Is(err, unix.EROFS) {
		t.Errorf("write: %v, want EROFS", err)
	}
}

func TestReadAhead(t *testing.T) {
	_, c := image(t)
	if unix.Access(bdiDir, unix.W_OK) != nil {
		t.Skip("needs a writable /sys")
	}
	const kib = 772 // nobody else's
	count := func(pattern string) (n int) {
		files, err := filepath.Glob(filepath.Join(bdiDir, pattern, "read_ahead_kb"))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			if p, err := os.ReadFile(f); err == nil && string(p) == fmt.Sprintln(kib) {
				n++
			}
		}
		return n
	}
	for range 20 { // if others mount EROFS at the same moment, it is not set
		_, m := mounted(t, c, Options{Backing: File, ReadAheadKiB: kib})
		fuse, erofs := count("0:*"), count("erofs-*")
		if fuse != 1 || erofs > 1 {
			t.Fatalf("%d FUSE and %d EROFS devices have the readahead asked for", fuse, erofs)
		}
		if erofs == 1 {
			return
		}
		m.Abort()
		wait(t, "Done", m.Done())
	}
	t.Error("the readahead of EROFS was never set")
}

// Mounts that are made at the same time get the readahead they ask for, each.
func TestReadAheadTogether(t *testing.T) {
	_, c := image(t)
	if unix.Access(bdiDir, unix.W_OK) != nil {
		t.Skip("needs a writable /sys")
	}
	const kib = 776
	var unset int
	for range 5 { // somebody else may have mounted EROFS
		var wg sync.WaitGroup
		mounts := make([]*Mounted, 12)
		for i := range mounts {
			wg.Go(func() {
				o := Options{Backing: File, Options: fusedev.Options{Logger: quiet}}
				if i%2 == 0 {
					o.ReadAheadKiB = kib
				}
				m, err := Device(t.Context(), c, o)
				if err != nil {
					t.Error(err)
					return
				}
				mounts[i] = m
			})
		}
		wg.Wait()
		unset = 0
		for i, m := range mounts {
			if m == nil {
				continue
			}
			p, _ := os.ReadFile(filepath.Join(bdiDir, m.BDI(), "read_ahead_kb"))
			if set := m.BDI() != "" && string(p) == fmt.Sprintln(kib); !set && i%2 == 0 {
				unset++
			} else if set && i%2 != 0 {
				t.Errorf("mount %d has a readahead that it did not ask for", i)
			}
			m.Close()
			m.Abort()
			wait(t, "Done", m.Done())
		}
		if unset == 0 {
			return
		}
	}
	t.Errorf("%d mounts of 6 have not the readahead they asked for", unset)
}

// Many readers, and a good part of the reads are misses that take a while.
func TestConcurrentReaders(t *testing.T) {
	for _, inflight := range []int{2, 64} {
		t.Run(fmt.Sprint("inflight-", inflight), func(t *testing.T) {
			tree, c := image(t)
			want, err := os.ReadFile(filepath.Join(tree, "big"))
			if err != nil {
				t.Fatal(err)
			}
			c.onTry(func(off int64, n int) bool { return rand.IntN(3) > 0 })
			c.onRead(func(ctx context.Context, off int64, n int) error {
				time.Sleep(time.Duration(rand.IntN(1000)) * time.Microsecond)
				return nil
			})
			dir, m := mounted(t, c, Options{Options: fusedev.Options{MaxInflight: inflight}})
			var wg sync.WaitGroup
			for i := range 8 {
				wg.Go(func() {
					f, err := os.Open(filepath.Join(dir, "big"))
					if err != nil {
						t.Error(err)
						return
					}
					defer f.Close()
					if i == 0 { // keeps the page cache cold for the others
						for range 100 {
							unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
							time.Sleep(time.Millisecond)
						}
						return
					}
					p := make([]byte, 300<<10)
					for range 60 {
						off, n := rand.IntN(len(want)), 1+rand.IntN(len(p))
						n = min(n, len(want)-off)
						if _, err := f.ReadAt(p[:n], int64(off)); err != nil {
							t.Error(err)
							return
						}
						if !bytes.Equal(p[:n], want[off:off+n]) {
							t.Errorf("wrong bytes at %d+%d", off, n)
							return
						}
					}
				})
			}
			wg.Wait()
			if s := m.Stats(); s.Misses == 0 || s.Hits == 0 || s.Errors != 0 {
				t.Errorf("stats %+v", s)
			}
		})
	}
}

// Hits are served while every place for misses is taken and more misses wait.
func TestHitsPassMisses(t *testing.T) {
	tree, c := image(t)
	release := make(chan struct{})
	var started atomic.Int64
	dir, m := mounted(t, c, Options{Options: fusedev.Options{MaxInflight: 2}})
	sameTree(t, tree, dir) // caches the metadata
	dropCache(t, filepath.Join(dir, "big"))
	dropCache(t, filepath.Join(dir, "odd"))
	big := int64(bytes.Index(c.data, fileHead(t, tree, "big")))
	c.onTry(func(off int64, n int) bool { return off+int64(n) <= big || off >= big+8<<20 })
	c.onRead(func(ctx context.Context, off int64, n int) error {
		started.Add(1)
		select {
		case <-release:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	before := m.Stats().Misses
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			f, err := os.Open(filepath.Join(dir, "big"))
			if err != nil {
				t.Error(err)
				return
			}
			defer f.Close()
			p := make([]byte, 4096)
			if _, err := f.ReadAt(p, int64(i)<<20); err != nil {
				t.Error(err)
			}
		})
	}
	within(t, "misses to wait", func() {
		for m.Stats().Misses < before+8 || started.Load() < 2 {
			time.Sleep(time.Millisecond)
		}
	})
	within(t, "hits", func() {
		want, _ := os.ReadFile(filepath.Join(tree, "odd"))
		got, err := os.ReadFile(filepath.Join(dir, "odd"))
		if err != nil || !bytes.Equal(want, got) {
			t.Errorf("hits while misses wait: %v", err)
		}
	})
	if n := started.Load(); n != 2 {
		t.Errorf("%d misses run, want 2", n)
	}
	close(release)
	within(t, "misses", wg.Wait)
}

func fileHead(t *testing.T, tree, name string) []byte {
	p, err := os.ReadFile(filepath.Join(tree, name))
	if err != nil {
		t.Fatal(err)
	}
	return p[:4096]
}

// An error is an error for its range only, and is over when it is over.
func TestErrorRange(t *testing.T) {
	for _, o := range []Options{{Backing: File}, {Backing: File, Buffered: true}, {Backing: Loop}} {
		t.Run(fmt.Sprintf("backing-%d-buffered-%v", o.Backing, o.Buffered), func(t *testing.T) {
			tree, c := image(t)
			dir, m := mounted(t, c, o)
			path := filepath.Join(dir, "big")
			want, err := os.ReadFile(filepath.Join(tree, "big"))
			if err != nil {
				t.Fatal(err)
			}
			bad := int64(bytes.Index(c.data, want[:4096])) + 3<<20
			c.onTry(func(off int64, n int) bool { return off+int64(n) <= bad || off >= bad+64<<10 })
			c.onRead(func(ctx context.Context, off int64, n int) error { return errors.New("injected") })
			f, err := os.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			// Random access: readahead over the bad range must not hide it.
			unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_RANDOM)
			p := make([]byte, 4096)
			for off := int64(2 << 20); off < 4<<20; off += 4096 {
				_, err := f.ReadAt(p, off)
				if isBad := off >= 3<<20 && off < 3<<20+64<<10; isBad != (err != nil) {
					t.Fatalf("at %d: %v", off, err)
				}
				if err != nil && !errors.Is(err, unix.EIO) {
					t.Fatalf("at %d: %v, want EIO", off, err)
				}
				if err == nil && !bytes.Equal(p, want[off:off+4096]) {
					t.Fatalf("wrong bytes at %d", off)
				}
			}
			if m.Stats().Errors == 0 {
				t.Error("no error was counted")
			}
			if out := child(t, "mmap", path); out != "fault\n" {
				t.Errorf("mmap over the bad range: %s", out)
			}
			c.onRead(func(ctx context.Context, off int64, n int) error { return nil })
			got, err := os.ReadFile(path)
			if err != nil || !bytes.Equal(want, got) {
				t.Fatalf("after the error is gone: %v, same bytes %v", err, bytes.Equal(want, got))
			}
			if out := child(t, "mmap", path); out != fmt.Sprintf("%x\n", sha256.Sum256(want)) {
				t.Errorf("mmap afterwards: %s", out)
			}
		})
	}
}

func TestMmapAndExec(t *testing.T) {
	tree, c := image(t)
	c.onTry(func(off int64, n int) bool { return rand.IntN(2) > 0 })
	dir, _ := mounted(t, c, Options{})
	want, err := os.ReadFile(filepath.Join(tree, "big"))
	if err != nil {
		t.Fatal(err)
	}
	if out := child(t, "mmap", filepath.Join(dir, "big")); out != fmt.Sprintf("%x\n", sha256.Sum256(want)) {
		t.Errorf("mmap: %s", out)
	}
	cmd := exec.Command(filepath.Join(dir, "prog"))
	cmd.Env = append(os.Environ(), roleEnv+"=hello")
	if out, err := cmd.CombinedOutput(); err != nil || string(out) != "hello\n" {
		t.Errorf("exec: %v %s", err, out)
	}
}

func child(t *testing.T, role string, args ...string) string {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), roleEnv+"="+role)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", role, err, out)
	}
	return string(out)
}

// The deadline of a miss holds even if Content forgets its context.
func TestReadTimeout(t *testing.T) {
	_, c := image(t)
	stuck := make(chan struct{})
	dir, m := mounted(t, c, Options{Options: fusedev.Options{ReadTimeout: 50 * time.Millisecond, MaxInflight: 1}})
	t.Cleanup(func() { close(stuck) }) // before the one of mounted, which waits
	c.onTry(func(off int64, n int) bool { return false })
	c.onRead(func(ctx context.Context, off int64, n int) error { <-stuck; return nil })
	within(t, "reads that time out", func() {
		for _, name := range []string{"big", "odd"} { // the second never gets the place
			if _, err := os.ReadFile(filepath.Join(dir, name)); !errors.Is(err, unix.EIO) {
				t.Errorf("%s: %v, want EIO", name, err)
			}
		}
	})
	if m.Stats().Errors < 2 {
		t.Errorf("stats %+v", m.Stats())
	}
}
