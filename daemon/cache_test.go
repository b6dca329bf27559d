package daemon

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/bench/faults/disk"
)

// configured makes services of the test have this configuration.
func configured(t *testing.T, js string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.json")
	if err := os.WriteFile(path, []byte(js), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SHALE_TEST_CONFIG", path)
}

// smallService is service on a file system of so many bytes.
func smallService(t *testing.T, size int) *Client {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("shale-test", dir, "tmpfs", 0, fmt.Sprintf("size=%d,mode=0700", size)); err != nil {
		t.Skipf("cannot mount a tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if unix.Unmount(dir, 0) != nil {
			if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
				t.Error(err)
			}
		}
	})
	return serviceIn(t, dir)
}

// serviceIn is service with a root directory below dir.
func serviceIn(t *testing.T, dir string) *Client {
	t.Helper()
	c := &Client{Root: filepath.Join(dir, "root"), Start: true}
	t.Cleanup(func() {
		end(t, c)
		if t.Failed() {
			log, _ := os.ReadFile(filepath.Join(c.Root, logName))
			t.Logf("the service's log:\n%s", log)
		}
	})
	return c
}

// ext4Service is service on an ext4 of so many bytes.
func ext4Service(t *testing.T, size int64) *Client {
	t.Helper()
	d, err := disk.New(t.Context(), filepath.Join(t.TempDir(), "disk"), size)
	if errors.Is(err, disk.ErrUnsupported) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return serviceIn(t, d.Dir)
}

const bigFile = 10 << 20

// bigBytes is the content of a file: no block of it is like another, also not in
// another file, and an eighth of it does not compress.
func bigBytes(n int) []byte {
	p := make([]byte, bigFile)
	r := rand.NewChaCha8([32]byte{byte(n)})
	for off := 0; off < len(p); off += 4096 {
		r.Read(p[off : off+512])
	}
	return p
}

// bigLayout is an image of files of 10 MiB; which says the first.
func bigLayout(t *testing.T, first, files int) string {
	t.Helper()
	var layer bytes.Buffer
	tw := tar.NewWriter(&layer)
	for n := first; n < first+files; n++ {
		if err := tw.WriteHeader(&tar.Header{Name: fmt.Sprintf("f%03d", n), Typeflag: tar.TypeReg, Mode: 0o644, Size: bigFile}); err != nil {
			t.Fatal(err)
		}
		tw.Write(bigBytes(n))
	}
	tw.Close()
	return layoutOf(t, layer.Bytes())
}

// readBig reads files, and not what the kernel has of them.
func readBig(t *testing.T, dir string, first, files int) {
	t.Helper()
	for n := first; n < first+files; n++ {
		f, err := os.Open(filepath.Join(dir, fmt.Sprintf("f%03d", n)))
		if err != nil {
			t.Fatal(err)
		}
		err = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
		got, rerr := io.ReadAll(f)
		f.Close()
		if err != nil || rerr != nil || !bytes.Equal(got, bigBytes(n)) {
			t.Errorf("file %d: %d bytes, %v, %v", n, len(got), err, rerr)
		}
	}
}

// TestFullDisk: an image of 300 MiB is read through on a disk that has room for a fifth
// of it.
func TestFullDisk(t *testing.T) {
	ref := bigLayout(t, 0, 30)
	t.Run("tmpfs", func(t *testing.T) {
		c := smallService(t, 64<<20)
		testFullDisk(t, c, ref, func(string) {
			if err := unix.Mount("", filepath.Dir(c.Root), "", unix.MS_REMOUNT, fmt.Sprintf("size=%d", 512<<20)); err != nil {
				t.Fatal(err)
			}
		})
	})
	t.Run("ext4", func(t *testing.T) {
		testFullDisk(t, ext4Service(t, 64<<20), ref, func(pin string) {
			if err := os.Remove(pin); err != nil {
				t.Fatal(err)
			}
		})
	})
}

// testFullDisk reads; more makes room when the image, by a file, is pinned.
func testFullDisk(t *testing.T, c *Client, ref string, more func(pin string)) {
	t.Helper()
	keeper, worker := processes(t, c)
	dir, m := attachAs(t, c, ref, Place{Face: "device"})
	readBig(t, dir, 0, 30)
	readBig(t, dir, 0, 3) // what was evicted first
	st, err := c.Status(background)
	if err != nil || st.Full || st.Pool.Evicted == 0 || len(st.Mounts) != 1 || st.Mounts[0].Fill.Errors != 0 {
		t.Errorf("%+v, pool %+v, %v", st, st.Pool, err)
	}
	// What is here may not go.
	pin := filepath.Join(c.Root, "images", m.ManifestDigest[len("sha256:"):], pinnedFile)
	if err := os.WriteFile(pin, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	readBig(t, dir, 0, 30)
	if st, err = c.Status(background); err != nil || !st.Full || st.Mounts[0].Fill.Errors != 0 {
		t.Errorf("%+v, %v: want that it says the pool is full", st, err)
	}
	more(pin)
	eventually(t, "it has seen that there is room", func() bool {
		st, err := c.Status(background)
		return err == nil && !st.Full
	})
	if k, w := processes(t, c); k != keeper || w != worker {
		t.Errorf("the service is processes %d and %d, and was %d and %d", k, w, keeper, worker)
	}
}

// TestQuota: whatever is read, the pool stays within its quota, and what is pinned
// or lies under a direct mount stays.
func TestQuota(t *testing.T) {
	t.Run("large disk", func(t *testing.T) { testQuota(t, 48<<20, 20, func() *Client { return service(t) }) })
	t.Run("ext4 of 64 MiB", func(t *testing.T) { testQuota(t, 40<<20, 30, func() *Client { return ext4Service(t, 64<<20) }) })
}

// testQuota reads an image of files of 10 MiB.
func testQuota(t *testing.T, quota int64, bigFiles int, start func() *Client) {
	t.Helper()
	configured(t, fmt.Sprintf(`{"cache": {"quota": %d}}`, quota))
	big, under, pin := bigLayout(t, 0, bigFiles), bigLayout(t, 100, 1), bigLayout(t, 200, 1)
	c := start()
	for _, ref := range []string{under, pin} {
		if _, err := c.Pull(background, Source{Ref: ref, Platform: "linux/amd64"}, true, nil); err != nil {
			t.Fatal(err)
		}
	}
	dir, m := attach(t, c, under)
	if m.Face != "direct" {
		t.Skipf("the face of a complete image here is %s", m.Face)
	}
	p, err := c.Pull(background, Source{Ref: pin, Platform: "linux/amd64"}, false, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(c.Root, "images", p.ManifestDigest[len("sha256:"):], pinnedFile), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var most atomic.Int64
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			most.Store(max(most.Load(), du(filepath.Join(c.Root, "pool"))))
			select {
			case <-stop:
				return
			case <-time.After(time.Millisecond):
			}
		}
	}()
	where, _ := attachAs(t, c, big, Place{Face: "device"})
	for range 2 {
		readBig(t, where, 0, bigFiles)
	}
	close(stop)
	<-stopped
	if limit := quota + int64(runtime.NumCPU()*128<<10); most.Load() > limit {
		t.Errorf("the pool had %d bytes, the quota is %d", most.Load(), quota)
	}
	// Also for a service that knows nothing of the mount.
	kill(t, c, syscall.SIGKILL)
	if err := unix.Unmount(where, 0); err != nil {
		t.Fatal(err)
	}
	where, _ = attachAs(t, c, big, Place{Face: "device"})
	readBig(t, where, 0, bigFiles)
	if st, err := c.Status(background); err != nil || st.Pool.Evicted == 0 {
		t.Errorf("%+v, %v", st.Pool, err)
	}
	unix.Unmount(where, 0)
	readBig(t, dir, 100, 1)
	if p, err := c.Pull(background, Source{Ref: pin, Platform: "linux/amd64"}, false, nil); err != nil || p.MissingBytes != 0 {
		t.Errorf("%d bytes of what is pinned are missing: %v", p.MissingBytes, err)
	}
}

// TestEvictUnknown: what is in use cannot be told any more, so nothing goes.
func TestEvictUnknown(t *testing.T) {
	const quota = 24 << 20
	configured(t, fmt.Sprintf(`{"cache": {"quota": %d}}`, quota))
	under, big := bigLayout(t, 100, 1), bigLayout(t, 0, 4)
	c := service(t)
	if _, err := c.Pull(background, Source{Ref: under, Platform: "linux/amd64"}, true, nil); err != nil {
		t.Fatal(err)
	}
	dir, m := attach(t, c, under)
	if m.Face != "direct" {
		t.Skipf("the face of a complete image here is %s", m.Face)
	}
	where, _ := attachAs(t, c, big, Place{Face: "device"})
	images := filepath.Join(c.Root, "images")
	if err := os.Rename(images, images+".away"); err != nil {
		t.Fatal(err)
	}
	readBig(t, where, 0, 4)
	readBig(t, dir, 100, 1)
	if st, err := c.Status(background); err != nil || st.Pool.Evicted != 0 || !st.Full {
		t.Errorf("%+v, %v", st.Pool, err)
	}
	if _, err := c.Prune(background, false); err == nil {
		t.Error("what no image that can be found refers to was freed")
	}
	readBig(t, dir, 100, 1)
	if err := os.Rename(images+".away", images); err != nil {
		t.Fatal(err)
	}
	for start := time.Now(); ; { // it is tried again once in a while
		readBig(t, where, 0, 4)
		readBig(t, dir, 100, 1)
		if st, err := c.Status(background); err != nil || time.Since(start) > 30*time.Second {
			t.Fatalf("%+v, %v", st, err)
		} else if st.Pool.Evicted > 0 {
			break
		}
	}
}

// du is what a directory takes on disk, but for directories.
func du(dir string) (n int64) {
	filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return nil
		}
		if fi, err := d.Info(); err == nil {
			n += fi.Sys().(*syscall.Stat_t).Blocks * 512
		}
		return nil
	})
	return n
}
