package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/image"
)

// killWorker kills the worker, and waits for the next to serve.
func killWorker(t *testing.T, c *Client) {
	t.Helper()
	old := pid(t, c)
	if err := syscall.Kill(old, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "another worker serves", func() bool {
		st, err := (&Client{Root: c.Root}).Status(background)
		return err == nil && st.Pool != nil && st.Processes[len(st.Processes)-1].PID != old
	})
}

// readFiles reads the test image and compares.
func readFiles(t *testing.T, dir string) {
	t.Helper()
	for name, want := range files {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, want %d: %v", name, len(got), len(want), err)
		}
	}
}

// TestWorkerDies: mounts outlive workers, with what is told of them, and end as
// ever.
func TestWorkerDies(t *testing.T) {
	c, ref := service(t), layout(t)
	dir, m := attach(t, c, ref)
	before, err := c.Status(background)
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		killWorker(t, c)
	}
	readFiles(t, dir) // nothing of it was read before
	after, err := c.Status(background)
	if err != nil || len(after.Mounts) != 1 {
		t.Fatalf("%+v, %v", after, err)
	}
	a, b := before.Mounts[0], after.Mounts[0]
	if a.ID != b.ID || a.ID != m.ID || a.Dev != b.Dev || a.Where != b.Where || a.Ref != b.Ref || a.Face != b.Face || !a.Since.Equal(b.Since) || a.ManifestDigest != b.ManifestDigest {
		t.Errorf("before %+v\nafter %+v", a, b)
	}
	if b.Fill.Requests == 0 || b.MissingBytes != 0 {
		t.Errorf("read by the next worker: %+v", b)
	}
	if _, err := c.Remove(background, ref); !errors.Is(err, ErrBusy) {
		t.Errorf("remove: %v, want ErrBusy", err)
	}
	if err := c.Stop(background); !errors.Is(err, ErrBusy) {
		t.Errorf("stop: %v, want ErrBusy", err)
	}
	unmount(t, c, dir)
	killWorker(t, c) // and the keeper has forgotten it
	st, err := c.Status(background)
	if err != nil || len(st.Mounts) != 0 {
		t.Errorf("%+v, %v", st.Mounts, err)
	}
}

// guarded is a registry with the image of a layout that wants a password, and once
// it is shut serves nothing until it is opened.
func guarded(t *testing.T, layout string) (src Source, shut, open func(), asked *atomic.Int64) {
	t.Helper()
	p := newPacks(t, layout, false)
	var closed atomic.Bool
	asked = new(atomic.Int64)
	gate := make(chan struct{})
	open = sync.OnceFunc(func() { close(gate) })
	t.Cleanup(open)
	p.mu.Lock()
	p.spoil = func(w http.ResponseWriter, r *http.Request) bool {
		if user, pw, _ := r.BasicAuth(); user != "me" || pw != "secret" {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}
		if closed.Load() && strings.Contains(r.URL.Path, "/blobs/") {
			asked.Add(1)
			select {
			case <-gate:
			case <-r.Context().Done():
			}
		}
		return false
	}
	p.mu.Unlock()
	src = Source{Ref: p.ref, Platform: "linux/amd64", Credentials: image.Credentials{Username: "me", Password: "secret"}}
	return src, func() { closed.Store(true) }, open, asked
}

// bigReader reads the file big, for which it may have to wait.
type bigReader struct {
	done chan struct{} // closed when it has
	p    []byte
	err  error
}

func startBig(path string) *bigReader {
	r := &bigReader{done: make(chan struct{})}
	go func() {
		defer close(r.done)
		r.p, r.err = os.ReadFile(path)
	}()
	return r
}

// waits fails the test if the reader does not wait.
func (r *bigReader) waits(t *testing.T) {
	t.Helper()
	select {
	case <-r.done:
		t.Fatalf("%d bytes from nowhere, %v", len(r.p), r.err)
	default:
	}
}

// ends fails the test if the reader does not get all of the file.
func (r *bigReader) ends(t *testing.T) {
	t.Helper()
	select {
	case <-r.done:
	case <-time.After(30 * time.Second):
		t.Fatal("the reader hangs")
	}
	if r.err != nil || !bytes.Equal(r.p, files["big"]) {
		t.Errorf("%d bytes, %v", len(r.p), r.err)
	}
}

// TestReaderWaits: a reader that waits for the registry while the worker dies gets
// its bytes of the next one, which has the credentials. They are nowhere on disk.
func TestReaderWaits(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	c := service(t)
	src, shut, open, asked := guarded(t, layout(t))
	dir := t.TempDir()
	m, err := c.Mount(background, src, Place{Where: dir, Face: "device"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer m.FS.Close()
	shut()
	path := fmt.Sprintf("/proc/self/fd/%d/big", m.FS.Fd())
	r := startBig(path)
	for range 3 {
		eventually(t, "a worker asks for the reader", func() bool { return asked.Swap(0) > 0 })
		killWorker(t, c)
	}
	r.waits(t)
	open()
	r.ends(t)
	nowhere(t, c, "secret")
}

// nowhere fails the test if something is on disk, in a log, or told.
func nowhere(t *testing.T, c *Client, secrets ...string) {
	t.Helper()
	st, err := c.Status(background)
	must(t, err)
	for _, secret := range secrets {
		must(t, filepath.Walk(c.Root, func(path string, st os.FileInfo, err error) error {
			if err != nil || !st.Mode().IsRegular() {
				return err
			}
			p, err := os.ReadFile(path)
			if bytes.Contains(p, []byte(secret)) {
				t.Errorf("%s has %s", path, secret)
			}
			return err
		}))
		if strings.Contains(fmt.Sprintf("%+v", st), secret) {
			t.Errorf("status has %s: %+v", secret, st)
		}
	}
}

// TestCallGoesOn: a call that waits while the worker dies is answered by the next.
func TestCallGoesOn(t *testing.T) {
	c := service(t)
	dir, _ := attach(t, c, layout(t))
	st, err := c.Status(background)
	if err != nil {
		t.Fatal(err)
	}
	gone := make(chan error, 1)
	go func() { gone <- c.WaitGone(background, st.Mounts[0].Dev) }()
	killWorker(t, c)
	select {
	case err := <-gone:
		t.Fatalf("it is not gone: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	if err := <-gone; err != nil && !errors.Is(err, blob.ErrNotFound) {
		t.Error(err)
	}
}

// TestUpgrade exchanges the worker under a reader, and refuses a program that is
// none.
func TestUpgrade(t *testing.T) {
	c, ref := service(t), layout(t)
	dir, _ := attach(t, c, ref)
	keeper, old := processes(t, c)
	bad := filepath.Join(t.TempDir(), "bad")
	if err := os.WriteFile(bad, []byte("#!/bin/sh\nexit 1\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(bad)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if st, err := c.Upgrade(background, f); err == nil {
		t.Errorf("upgraded to nothing: %+v", st)
	}
	if k, w := processes(t, c); k != keeper || w != old {
		t.Errorf("%d and %d, want %d and %d as before", k, w, keeper, old)
	}
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer self.Close()
	st, err := c.Upgrade(background, self)
	if err != nil {
		t.Fatal(err)
	}
	k, w := processes(t, c)
	if k != keeper || w == old || !slices.Equal(st.Processes, []Process{{RoleKeeper, k}, {RoleWorker, w}}) {
		t.Errorf("%d and %d, before %d and %d; told %+v", k, w, keeper, old, st.Processes)
	}
	if errors.Is(syscall.Kill(old, 0), nil) {
		t.Errorf("the old worker lives")
	}
	readFiles(t, dir)
	killWorker(t, c) // the next one is of the new program, too
	readFiles(t, dir)
	if _, err := (&Client{Root: t.TempDir()}).Upgrade(background, self); !errors.Is(err, ErrNotRunning) {
		t.Errorf("%v, want ErrNotRunning", err)
	}
}

// TestKeeperDies: the worker serves on alone, and when it dies, too, reads fail.
func TestKeeperDies(t *testing.T) {
	c, ref := service(t), layout(t)
	dir, _ := attach(t, c, ref)
	keeper, worker := processes(t, c)
	if err := syscall.Kill(keeper, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the worker is alone", func() bool {
		st, err := c.Status(background)
		return err == nil && slices.Equal(st.Processes, []Process{{RoleWorker, worker}})
	})
	if got, err := os.ReadFile(filepath.Join(dir, "etc/hello")); err != nil || !bytes.Equal(got, files["etc/hello"]) {
		t.Errorf("%q, %v", got, err)
	}
	if err := syscall.Kill(worker, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the service is dead", func() bool {
		_, err := (&Client{Root: c.Root}).Status(background)
		return errors.Is(err, ErrNotRunning)
	})
	if p, err := os.ReadFile(filepath.Join(dir, "big")); err == nil && !bytes.Equal(p, files["big"]) {
		t.Errorf("%d wrong bytes", len(p))
	} else if err == nil {
		t.Log("the kernel had it all")
	}
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	dir, _ = attach(t, c, ref)
	readFiles(t, dir)
}

// TestRecoveryFails: a mount whose image is gone fails, others go on.
func TestRecoveryFails(t *testing.T) {
	c := service(t)
	good, bad := layout(t), windowed(t)
	dir, _ := attach(t, c, good)
	lost, m := attach(t, c, bad)
	if err := os.Remove(filepath.Join(imageDir(c, m.ManifestDigest), "linked", "meta")); err != nil {
		t.Fatal(err)
	}
	killWorker(t, c)
	if p, err := os.ReadFile(filepath.Join(lost, "text")); !errors.Is(err, syscall.EIO) {
		t.Errorf("%d bytes of what is lost, %v", len(p), err)
	}
	readFiles(t, dir)
	if st, err := c.Status(background); err != nil || len(st.Mounts) != 1 || st.Mounts[0].Where != dir {
		t.Errorf("%+v, %v", st, err)
	}
}

// TestMountsUnderKills mounts, reads and unmounts while workers are killed at all
// moments. No call may fail, and nobody hang.
func TestMountsUnderKills(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	c, ref := service(t), layout(t)
	pid(t, c)
	ctx, cancel := context.WithCancel(background)
	var wg sync.WaitGroup
	var mounts [2]atomic.Int64
	for k := range mounts {
		wg.Go(func() {
			for ctx.Err() == nil {
				m, err := c.Mount(background, Source{Ref: ref, Platform: "linux/amd64"}, Place{Where: "nowhere", Face: "device"}, nil)
				if err != nil {
					t.Error(err)
					return
				}
				readFiles(t, fmt.Sprintf("/proc/self/fd/%d", m.FS.Fd()))
				m.FS.Close()
				mounts[k].Add(1)
			}
		})
	}
	for i := range 25 {
		p := pid(t, c)
		time.Sleep(time.Duration(37*i%200) * time.Millisecond)
		syscall.Kill(p, syscall.SIGKILL)
		if i%(callTries-1) != callTries-2 {
			continue
		}
		// A call is made so many times: let each come to its end, however slow this is.
		for k := range mounts {
			before := mounts[k].Load()
			eventually(t, "a mount", func() bool { return mounts[k].Load() > before || t.Failed() })
		}
	}
	cancel()
	wg.Wait()
	t.Logf("%d mounts", mounts[0].Load()+mounts[1].Load())
	eventually(t, "nothing is left", func() bool {
		st, err := c.Status(background)
		return err == nil && len(st.Mounts) == 0
	})
}
