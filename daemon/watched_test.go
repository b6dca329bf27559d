package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/mount"
	"github.com/shale-image/shale/pool"
)

// attachWatched mounts an image with the face fanotify, or skips the test.
func attachWatched(t *testing.T, c *Client, ref string, p Place) (string, *Mounted) {
	t.Helper()
	if able := mount.Probe(); !able.Fanotify {
		t.Skip(able.Why["Fanotify"])
	}
	p.Face = fanotifyFace
	dir, m := attachAs(t, c, ref, p)
	if m.Face != fanotifyFace {
		t.Fatalf("the face is %s", m.Face)
	}
	return dir, m
}

// ended waits for the end of both processes.
func ended(t *testing.T, c *Client) {
	t.Helper()
	eventually(t, "the service is dead", func() bool {
		_, err := (&Client{Root: c.Root}).Status(background)
		return errors.Is(err, ErrNotRunning)
	})
}

// TestWatched: mounts of the face fanotify outlive workers; when all is here no process
// is needed.
func TestWatched(t *testing.T) {
	c, ref := service(t), layout(t)
	dir, m := attachWatched(t, c, ref, Place{})
	for range 3 {
		killWorker(t, c)
	}
	st := mountStatus(t, c, m.ID)
	if st.Face != fanotifyFace || st.MissingChunks == 0 || st.Detached {
		t.Errorf("before it is read: %+v", st)
	}
	if err := c.Stop(background); !errors.Is(err, ErrBusy) {
		t.Errorf("stop: %v, want ErrBusy", err)
	}
	readFiles(t, dir) // nothing of it was read before
	eventually(t, "it is detached", func() bool { return mountStatus(t, c, m.ID).Detached })
	if st := mountStatus(t, c, m.ID); !st.Survives || st.Fill.Requests == 0 {
		t.Errorf("%+v", st)
	}
	if _, err := c.Remove(background, ref); !errors.Is(err, ErrBusy) {
		t.Errorf("remove: %v, want ErrBusy", err)
	}
	if err := c.Stop(background); err != nil {
		t.Fatal(err)
	}
	ended(t, c)
	dropCaches(t, dir)
	readFiles(t, dir)
	if _, m := attachAs(t, c, ref, Place{Face: fanotifyFace}); m.Face != directFace {
		t.Errorf("the face of a complete image is %s", m.Face)
	}
	if _, err := c.Remove(background, ref); !errors.Is(err, ErrBusy) {
		t.Errorf("remove: %v, want ErrBusy", err)
	}
}

// dropCaches has the kernel forget what it has read of a mount, and of the segments.
func dropCaches(t *testing.T, dir string) {
	t.Helper()
	err := filepath.Walk(dir, func(path string, st os.FileInfo, err error) error {
		if err != nil || !st.Mode().IsRegular() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestWatchedEnds: a mount that nobody has any more is forgotten, also if it ends while
// no worker looks, and the room that was set aside for it is given back.
func TestWatchedEnds(t *testing.T) {
	c := service(t)
	big := bigLayout(t, 0, 4)
	one, m := attachWatched(t, c, big, Place{NoComplete: true})
	two, _ := attachWatched(t, c, big, Place{NoComplete: true})
	want := mountStatus(t, c, m.ID).ContentBytes
	if u := usage(t, c); u.Disk < want || want < 4*bigFile {
		t.Errorf("%d bytes are set aside for %d", u.Disk, want)
	}
	if err := unix.Unmount(one, 0); err != nil {
		t.Fatal(err)
	}
	eventually(t, "one is forgotten", func() bool {
		st, err := c.Status(background)
		return err == nil && len(st.Mounts) == 1 && st.Mounts[0].Where == two
	})
	killWorker(t, c)
	readBig(t, two, 0, 1)
	worker := pid(t, c)
	if err := syscall.Kill(worker, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if err := unix.Unmount(two, 0); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(worker, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "nothing is mounted", func() bool {
		st, err := (&Client{Root: c.Root}).Status(background)
		return err == nil && st.Pool != nil && len(st.Mounts) == 0
	})
	eventually(t, "the room is given back", func() bool { u := usage(t, c); return u.Disk < u.Present+1<<20 })
	if err := c.Stop(background); err != nil {
		t.Error(err)
	}
}

func usage(t *testing.T, c *Client) *pool.Usage {
	t.Helper()
	st, err := c.Status(background)
	if err != nil {
		t.Fatal(err)
	}
	return st.Pool
}

// TestWatchedWaits: readers who wait for the registry, as well as the service that is
// asked to end, wait until all is well.
func TestWatchedWaits(t *testing.T) {
	c := service(t)
	src, shut, open, asked := guarded(t, layout(t))
	if able := mount.Probe(); !able.Fanotify {
		t.Skip(able.Why["Fanotify"])
	}
	m, err := c.Mount(background, src, Place{Where: t.TempDir(), Face: fanotifyFace, NoComplete: true}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer m.FS.Close()
	shut()
	r := startBig(fmt.Sprintf("/proc/self/fd/%d/big", m.FS.Fd()))
	for range 3 {
		eventually(t, "a worker asks for the reader", func() bool { return asked.Swap(0) > 0 })
		killWorker(t, c)
	}
	keeper, _ := processes(t, c)
	if err := syscall.Kill(keeper, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	time.Sleep(300 * time.Millisecond)
	if k, _ := processes(t, c); k != keeper {
		t.Error("the keeper has ended")
	}
	r.waits(t)
	open()
	r.ends(t)
	readFiles(t, fmt.Sprintf("/proc/self/fd/%d", m.FS.Fd()))
	ended(t, c) // all of it is here: now it does
	readFiles(t, fmt.Sprintf("/proc/self/fd/%d", m.FS.Fd()))
}

// TestWatchedBothKilled shows what is promised when keeper and worker are killed at
// once, and nobody else holds what readers wait for: nobody hangs, what was here is
// right, and what was not is zeros. The image is as good as ever when it is mounted
// again.
func TestWatchedBothKilled(t *testing.T) {
	c := service(t)
	src, shut, open, asked := guarded(t, bigLayout(t, 0, 4))
	if able := mount.Probe(); !able.Fanotify {
		t.Skip(able.Why["Fanotify"])
	}
	m, err := c.Mount(background, src, Place{Where: t.TempDir(), Face: fanotifyFace, NoComplete: true}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer m.FS.Close()
	at := fmt.Sprintf("/proc/self/fd/%d", m.FS.Fd())
	readBig(t, at, 0, 1)
	shut()
	asked.Store(0)
	done := make(chan []byte, 1)
	go func() {
		p, _ := os.ReadFile(at + "/f003")
		done <- p
	}()
	eventually(t, "a reader waits", func() bool { return asked.Load() > 0 })
	kill(t, c, syscall.SIGKILL)
	var pending []byte
	select {
	case pending = <-done:
	case <-time.After(30 * time.Second):
		t.Fatal("the reader hangs")
	}
	dropCaches(t, at)
	readBig(t, at, 0, 1)
	zeros := 0
	for n, p := range map[int][]byte{3: pending, 2: nil} {
		if p == nil {
			if p, err = os.ReadFile(fmt.Sprintf("%s/f%03d", at, n)); err != nil {
				t.Errorf("f%03d: %v", n, err)
			}
		}
		for want := bigBytes(n); len(p) > 0; {
			k := min(4096, len(p))
			if bytes.Equal(p[:k], make([]byte, k)) {
				zeros++
			} else if !bytes.Equal(p[:k], want[:k]) {
				t.Errorf("f%03d: neither right nor zeros", n)
			}
			p, want = p[k:], want[k:]
		}
	}
	t.Logf("%d blocks are zeros", zeros)
	open()
	m.FS.Close()
	m, err = c.Mount(background, src, Place{Where: t.TempDir(), Face: fanotifyFace, NoComplete: true}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer m.FS.Close()
	readBig(t, fmt.Sprintf("/proc/self/fd/%d", m.FS.Fd()), 0, 4)
}

// TestWatchedLost: a mount whose image is gone gives EIO for what is not here, never
// zeros; others in the same segment go on.
func TestWatchedLost(t *testing.T) {
	t.Run("no metadata", func(t *testing.T) {
		testWatchedLost(t, func(c *Client, digest string) error {
			return os.Remove(filepath.Join(c.Root, "images", digest, "linked", "meta"))
		})
	})
	// The pool sets the segment aside, and knows it no more.
	t.Run("damaged segment", func(t *testing.T) {
		testWatchedLost(t, func(c *Client, _ string) error {
			segments, err := filepath.Glob(filepath.Join(c.Root, "pool", "segments", "*", "data"))
			for _, data := range segments {
				if st, serr := os.Stat(data); serr == nil && st.Size() > 4<<20 {
					f, oerr := os.OpenFile(filepath.Join(filepath.Dir(data), "table"), os.O_WRONLY, 0)
					if oerr != nil {
						return oerr
					}
					_, werr := f.WriteAt([]byte("ruin"), 4096)
					return errors.Join(werr, f.Close())
				}
			}
			return fmt.Errorf("no large segment: %v", err)
		})
	})
}

func testWatchedLost(t *testing.T, ruin func(c *Client, digest string) error) {
	c := service(t)
	good, bad := layout(t), bigLayout(t, 0, 4)
	lost, m := attachWatched(t, c, bad, Place{NoComplete: true})
	dir, _ := attachWatched(t, c, good, Place{NoComplete: true})
	if err := ruin(c, strings.TrimPrefix(m.ManifestDigest, "sha256:")); err != nil {
		t.Fatal(err)
	}
	killWorker(t, c)
	if p, err := os.ReadFile(filepath.Join(lost, "f003")); !errors.Is(err, syscall.EIO) {
		t.Errorf("%d bytes of what is lost, %v", len(p), err)
	}
	readFiles(t, dir)
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the good one is forgotten", func() bool {
		st, err := c.Status(background)
		return err == nil && len(st.Mounts) == 0
	})
	if err := c.Stop(background); !errors.Is(err, ErrBusy) {
		t.Errorf("stop with a lost mount: %v, want ErrBusy", err)
	}
	if err := unix.Unmount(lost, 0); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it can end", func() bool { return c.Stop(background) == nil })
}

// TestWatchedAlone: when the keeper is dead an image whose mount would show zeros after the
// death of the worker, too, is fetched, also if it was to be left as it is.
func TestWatchedAlone(t *testing.T) {
	c := service(t)
	ref := bigLayout(t, 0, 4)
	dir, m := attachWatched(t, c, ref, Place{NoComplete: true})
	readBig(t, dir, 0, 1)
	keeper, worker := processes(t, c)
	if err := syscall.Kill(keeper, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "all of it is here, and the mount detached", func() bool {
		st, err := c.Status(background)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range st.Mounts {
			if s.ID == m.ID {
				return s.Detached
			}
		}
		return false
	})
	if err := syscall.Kill(worker, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the service is dead", func() bool {
		_, err := (&Client{Root: c.Root}).Status(background)
		return errors.Is(err, ErrNotRunning)
	})
	readBig(t, dir, 0, 4)
	dir, _ = attach(t, c, ref) // by another service, which the test can end
	readBig(t, dir, 0, 4)
}

// TestWatchedRefused: where there is no room for all of it, or no such events, or no
// keeper, there is no mount, and it says why.
func TestWatchedRefused(t *testing.T) {
	ref := bigLayout(t, 0, 4)
	refused := func(c *Client, want error, text string) {
		t.Helper()
		m, err := c.Mount(background, Source{Ref: ref, Platform: "linux/amd64"}, Place{Where: "nowhere", Face: fanotifyFace}, nil)
		if err == nil {
			m.FS.Close()
		}
		if want != nil && !errors.Is(err, want) || err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("%v, want %q", err, text)
		}
	}
	if able := mount.Probe(); !able.Fanotify {
		refused(service(t), nil, "fanotify")
		return
	}
	t.Run("file system", func(t *testing.T) { refused(smallService(t, 64<<20), nil, "no pre-access events") })
	t.Run("keeper", func(t *testing.T) {
		c := service(t)
		keeper, _ := processes(t, c)
		if err := syscall.Kill(keeper, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the worker is alone", func() bool { st, err := c.Status(background); return err == nil && len(st.Processes) == 1 })
		refused(c, nil, "the keeper is dead")
	})
	t.Run("quota", func(t *testing.T) {
		configured(t, `{"cache": {"quota": "1M"}}`)
		refused(service(t), pool.ErrNoSpace, "needs room for all of the image")
	})
}

// TestWatchedShared: of two images in one segment the one whose source hangs delays no
// reader of the other, though nobody tells whose a read is.
func TestWatchedShared(t *testing.T) {
	c := service(t)
	ref := layout(t)
	src, shut, open, _ := guarded(t, ref)
	if able := mount.Probe(); !able.Fanotify {
		t.Skip(able.Why["Fanotify"])
	}
	m, err := c.Mount(background, src, Place{Where: t.TempDir(), Face: fanotifyFace, NoComplete: true}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer m.FS.Close()
	shut()
	defer open()
	// Nothing of it is here, and its place is that of the other's.
	dir, _ := attachWatched(t, c, ref, Place{NoComplete: true})
	done := make(chan struct{})
	go func() { readFiles(t, dir); close(done) }()
	select {
	case <-done:
	case <-time.After(20 * time.Second): // its own source would fail after a minute
		t.Fatal("a reader waits for the source of another image")
	}
	st, err := c.Status(background)
	if err != nil || len(st.Mounts) != 2 || st.Mounts[1].Fill.Requests == 0 {
		t.Errorf("%+v, %v", st, err)
	}
	// What one has brought is the other's, too: both need nobody.
	eventually(t, "both are detached", func() bool {
		st, err := c.Status(background)
		return err == nil && st.Mounts[0].Detached && st.Mounts[1].Detached
	})
	readFiles(t, fmt.Sprintf("/proc/self/fd/%d", m.FS.Fd()))
}

// TestWatchedFileSystems: the same where the pool is on one of the others that raise
// such events.
func TestWatchedFileSystems(t *testing.T) {
	if able := mount.Probe(); !able.Fanotify {
		t.Skip(able.Why["Fanotify"])
	}
	ref := bigLayout(t, 0, 4)
	for _, fs := range []string{"xfs", "btrfs"} {
		t.Run(fs, func(t *testing.T) {
			mkfs, err := exec.LookPath("mkfs." + fs)
			if err != nil {
				t.Skip(err)
			}
			disk, at := filepath.Join(t.TempDir(), "disk"), t.TempDir()
			if err := errors.Join(os.WriteFile(disk, nil, 0o600), os.Truncate(disk, 512<<20)); err != nil {
				t.Fatal(err)
			}
			if out, err := exec.Command(mkfs, disk).CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			if out, err := exec.Command("mount", "-o", "loop", disk, at).CombinedOutput(); err != nil {
				t.Skipf("%v: %s", err, out)
			}
			t.Cleanup(func() { unix.Unmount(at, unix.MNT_DETACH) })
			c := &Client{Root: filepath.Join(at, "root"), Start: true}
			t.Cleanup(func() { end(t, c) })
			dir, m := attachWatched(t, c, ref, Place{NoComplete: true})
			want := mountStatus(t, c, m.ID).ContentBytes
			if u := usage(t, c); u.Disk < want || want < 4*bigFile {
				t.Errorf("%d bytes are set aside for %d", u.Disk, want)
			}
			readBig(t, dir, 0, 1)
			killWorker(t, c)
			readBig(t, dir, 0, 4)
			eventually(t, "it is detached", func() bool { return mountStatus(t, c, m.ID).Detached })
			if u := usage(t, c); u.Disk > want+1<<20 {
				t.Errorf("%d bytes on disk for %d", u.Disk, want)
			}
			if err := c.Stop(background); err != nil {
				t.Fatal(err)
			}
			readBig(t, dir, 0, 4)
		})
	}
}

// TestWatchedQuota: nothing of what the kernel reads itself is evicted, whether it came
// before or after another image wanted the room, and what is set aside stays so.
func TestWatchedQuota(t *testing.T) {
	configured(t, `{"cache": {"quota": "60M"}}`)
	c := service(t)
	other, _ := attachAs(t, c, bigLayout(t, 10, 3), Place{Face: "device", NoComplete: true})
	readBig(t, other, 10, 3)
	dir, m := attachWatched(t, c, bigLayout(t, 0, 4), Place{NoComplete: true}) // evicts some of it
	readBig(t, dir, 0, 2)
	readBig(t, other, 10, 3) // what does not fit is read all the same
	readBig(t, dir, 2, 2)
	eventually(t, "it is detached", func() bool { return mountStatus(t, c, m.ID).Detached })
	readBig(t, other, 10, 3)
	if u := usage(t, c); u.Disk > 61<<20 || u.Evicted == 0 {
		t.Errorf("%d bytes on disk, %d evicted", u.Disk, u.Evicted)
	}
	readBig(t, dir, 0, 4) // nobody is asked: zeros would be seen
}

// TestWatchedUnderKills mounts, reads and unmounts while workers are killed at all
// moments. Nobody reads what is wrong, or hangs, and nothing is left behind.
func TestWatchedUnderKills(t *testing.T) {
	if able := mount.Probe(); !able.Fanotify {
		t.Skip(able.Why["Fanotify"])
	}
	c, ref := service(t), bigLayout(t, 0, 2)
	pid(t, c)
	ctx, cancel := context.WithCancel(background)
	var wg sync.WaitGroup
	var mounts atomic.Int64
	for range 2 {
		wg.Go(func() {
			for ctx.Err() == nil {
				m, err := c.Mount(background, Source{Ref: ref, Platform: "linux/amd64"}, Place{Where: "nowhere", Face: fanotifyFace, NoComplete: true}, nil)
				if err != nil {
					t.Log(err) // it has met three workers that died
					continue
				}
				readBig(t, fmt.Sprintf("/proc/self/fd/%d", m.FS.Fd()), 0, 1)
				m.FS.Close()
				mounts.Add(1)
			}
		})
	}
	for i := range 25 {
		p := pid(t, c)
		time.Sleep(time.Duration(37*i%400) * time.Millisecond)
		syscall.Kill(p, syscall.SIGKILL)
	}
	cancel()
	wg.Wait()
	if mounts.Load() == 0 {
		t.Error("nothing was ever mounted")
	}
	t.Logf("%d mounts", mounts.Load())
	eventually(t, "nothing is left", func() bool {
		st, err := c.Status(background)
		return err == nil && len(st.Mounts) == 0
	})
	eventually(t, "the room is given back", func() bool { u := usage(t, c); return u.Disk < u.Present+1<<20 })
}
