package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/blob"
)

var background = context.Background()

func TestMountReadUnmount(t *testing.T) {
	c, ref := service(t), layout(t)
	dir, m := attach(t, c, ref)
	for name, want := range files {
		got, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, want %d: %v", name, len(got), len(want), err)
		}
	}
	st, err := c.Status(background)
	if err != nil {
		t.Fatal(err)
	}
	if len(st.Mounts) != 1 || st.Mounts[0].ID != m.ID || st.Mounts[0].Where != dir || st.Mounts[0].Fill.Requests == 0 {
		t.Errorf("status: %+v", st.Mounts)
	}
	if len(st.Images) != 1 || st.Images[0].ManifestDigest != m.ManifestDigest {
		t.Errorf("images: %+v", st.Images)
	}
	if err := c.Stop(background); !errors.Is(err, ErrBusy) {
		t.Errorf("stop with a mount: %v, want ErrBusy", err)
	}
	// The service learns of a plain umount.
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the mount is forgotten", func() bool {
		st, err := c.Status(background)
		return err == nil && len(st.Mounts) == 0
	})
}

func TestAbort(t *testing.T) {
	c, ref := service(t), layout(t)
	dir, _ := attach(t, c, ref)
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		t.Fatal(err)
	}
	if err := c.Abort(background, st.Dev+12345); !errors.Is(err, blob.ErrNotFound) {
		t.Errorf("unknown device: %v, want ErrNotFound", err)
	}
	if err := c.Abort(background, st.Dev); err != nil {
		t.Fatal(err)
	}
	if _, err := os.ReadFile(filepath.Join(dir, "big")); !errors.Is(err, syscall.EIO) {
		t.Errorf("read after abort: %v, want EIO", err)
	}
	if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(background, 10*time.Second)
	defer cancel()
	if err := c.WaitGone(ctx, st.Dev); err != nil && !errors.Is(err, blob.ErrNotFound) {
		t.Error(err)
	}
}

// TestClientDies: a mount that nobody took goes away.
func TestClientDies(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	c, ref := service(t), layout(t)
	m, err := c.Mount(background, Source{Ref: ref, Platform: "linux/amd64"}, Place{Where: "nowhere"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	m.FS.Close()
	eventually(t, "the mount is gone", func() bool {
		st, err := c.Status(background)
		return err == nil && len(st.Mounts) == 0
	})
}

func TestPullComplete(t *testing.T) {
	c, ref := service(t), layout(t)
	src := Source{Ref: ref, Platform: "linux/amd64"}
	p, err := c.Pull(background, src, false, nil)
	if err != nil {
		t.Fatal(err)
	}
	if p.MissingBytes == 0 {
		t.Error("nothing is missing after a pull of the index")
	}
	var last Progress
	if p, err = c.Pull(background, src, true, func(x Progress) { last = x }); err != nil {
		t.Fatal(err)
	}
	if p.MissingBytes != 0 || last.Done != last.Total || last.Total == 0 {
		t.Errorf("missing %d bytes, progress %+v", p.MissingBytes, last)
	}
	// With the source gone what is complete still works, in a new service too.
	if err := os.RemoveAll(strings.TrimSuffix(strings.TrimPrefix(ref, "oci:"), ":shale")); err != nil {
		t.Fatal(err)
	}
	end(t, c)
	if p, err = c.Pull(background, src, false, nil); err != nil || p.MissingBytes != 0 {
		t.Errorf("after a restart: %+v, %v", p, err)
	}
	dir, _ := attach(t, c, ref)
	if got, err := os.ReadFile(filepath.Join(dir, "big")); err != nil || !bytes.Equal(got, files["big"]) {
		t.Errorf("without the source: %d bytes, %v", len(got), err)
	}
}

// TestUnconverted mounts an ordinary image that has no index: all of it is read,
// into the pool.
func TestUnconverted(t *testing.T) {
	c, ref := service(t), strings.TrimSuffix(layout(t), "shale")+"plain"
	var notes []string
	src := Source{Ref: ref, Platform: "linux/amd64"}
	p, err := c.Pull(background, src, false, func(p Progress) {
		if p.Note != "" {
			notes = append(notes, p.Note)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if p.MissingBytes != 0 || len(notes) != 1 || !strings.Contains(notes[0], "no index") {
		t.Errorf("missing %d bytes, notes %q", p.MissingBytes, notes)
	}
	if err := os.RemoveAll(strings.TrimSuffix(strings.TrimPrefix(ref, "oci:"), ":plain")); err != nil {
		t.Fatal(err)
	}
	dir, _ := attach(t, c, ref)
	for name, want := range files {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
}

func TestErrorsKeepTheirKind(t *testing.T) {
	c, ref := service(t), layout(t)
	for _, x := range []struct {
		ref  string
		want error
	}{
		{"oci:/does/not/exist:x", os.ErrNotExist},
		{ref + "-not-there", blob.ErrNotFound},
	} {
		_, err := c.Pull(background, Source{Ref: x.ref, Platform: "linux/amd64"}, false, nil)
		if !errors.Is(err, x.want) && (!errors.Is(err, blob.ErrNotFound) || x.want != os.ErrNotExist) {
			t.Errorf("%s: %v, want %v", x.ref, err, x.want)
		}
	}
}

func TestManyClientsStartOneService(t *testing.T) {
	c := service(t)
	var wg sync.WaitGroup
	pids := make([]int, 8)
	for i := range pids {
		wg.Go(func() {
			st, err := c.Status(background)
			if err != nil {
				t.Error(err)
				return
			}
			pids[i] = st.Processes[0].PID
		})
	}
	wg.Wait()
	for _, pid := range pids {
		if pid != pids[0] {
			t.Errorf("several services: %v", pids)
		}
	}
	if err := Run(background, Config{Root: c.Root}); !errors.Is(err, ErrBusy) {
		t.Errorf("a second service: %v, want ErrBusy", err)
	}
}

func TestMetrics(t *testing.T) {
	c, ref := service(t), layout(t)
	dir, _ := attach(t, c, ref)
	if _, err := os.ReadFile(filepath.Join(dir, "big")); err != nil {
		t.Fatal(err)
	}
	at, err := os.Open(c.Root)
	if err != nil {
		t.Fatal(err)
	}
	defer at.Close()
	tr := &http.Transport{DisableKeepAlives: true, DialContext: func(context.Context, string, string) (net.Conn, error) {
		return net.Dial("unix", fmt.Sprintf("/proc/self/fd/%d/%s", at.Fd(), metricsName))
	}}
	resp, err := (&http.Client{Transport: tr}).Get("http://shale/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"\nshale_mounts 1\n", "# TYPE shale_fetch_requests_total counter\n"} {
		if !strings.Contains(string(b), want) {
			t.Errorf("no %q in\n%s", want, b)
		}
	}
	if strings.Contains(string(b), "\nshale_fetch_bytes_total 0\n") {
		t.Errorf("nothing was counted:\n%s", b)
	}
}

// TestOwnSessionAndCgroup: the service does not stay where its caller is.
func TestOwnSessionAndCgroup(t *testing.T) {
	enterCgroup(t)
	c := service(t)
	st, err := c.Status(background)
	if err != nil {
		t.Fatal(err)
	}
	sid, err := unix.Getsid(st.Processes[0].PID)
	if err != nil || sid != st.Processes[0].PID {
		t.Errorf("session %d of process %d: %v", sid, st.Processes[0].PID, err)
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", st.Processes[0].PID))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.SplitN(strings.TrimSpace(line), ":", 3); f[2] != "/" {
			t.Errorf("the service is in cgroup %s", line)
		}
	}
}

// enterCgroup puts the test process into a new cgroup until the test ends.
func enterCgroup(t *testing.T) {
	t.Helper()
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		t.Fatal(err)
	}
	enter := func(dir string) error {
		return os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(fmt.Sprint(os.Getpid())), 0)
	}
	for _, m := range mounts {
		dir := filepath.Join(m.Mountpoint, fmt.Sprintf("shale-test-%d", os.Getpid()))
		if m.Root != "/" || os.Mkdir(dir, 0o755) != nil {
			continue
		}
		if enter(dir) != nil {
			os.Remove(dir)
			continue
		}
		t.Cleanup(func() {
			if err := errors.Join(enter(m.Mountpoint), os.Remove(dir)); err != nil {
				t.Error(err)
			}
		})
		return
	}
	t.Skip("no cgroup can be made here")
}

func TestNotRunning(t *testing.T) {
	c := &Client{Root: t.TempDir()}
	if _, err := c.Status(background); !errors.Is(err, ErrNotRunning) {
		t.Errorf("%v, want ErrNotRunning", err)
	}
	if left, _ := os.ReadDir(c.Root); len(left) != 0 {
		t.Errorf("asking left %v", left)
	}
}

func TestIdle(t *testing.T) {
	t.Setenv("SHALE_TEST_IDLE", "1s")
	c := service(t)
	if _, err := c.Status(background); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the service ends by itself", func() bool {
		_, err := os.Stat(filepath.Join(c.Root, socketName))
		return errors.Is(err, os.ErrNotExist)
	})
}

func TestRootVanishes(t *testing.T) {
	c := service(t)
	st, err := c.Status(background)
	if err != nil {
		t.Fatal(err)
	}
	// It still writes what a service does that has just begun.
	eventually(t, "the directory is gone", func() bool { return os.RemoveAll(c.Root) == nil })
	eventually(t, "the service ends", func() bool {
		return errors.Is(syscall.Kill(st.Processes[0].PID, 0), syscall.ESRCH)
	})
}

// TestHostileClient sends what no client of ours does.
func TestHostileClient(t *testing.T) {
	c := service(t)
	if _, err := c.Status(background); err != nil {
		t.Fatal(err)
	}
	for _, packet := range []string{"", "q", "q{", `q{"op":"mount","args":7}`, `q{"op":"?"}`, `x{}`, `q{"op":"mount"}`} {
		conn, _, err := dial(background, c.Root)
		if err != nil {
			t.Fatal(err)
		}
		conn.Write([]byte(packet))
		conn.SetReadDeadline(time.Now().Add(5 * time.Second))
		conn.Read(make([]byte, maxPacket))
		conn.Close()
	}
	if _, err := c.Status(background); err != nil {
		t.Errorf("the service did not survive: %v", err)
	}
}

// eventually waits for something that another process does.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", what)
		}
	}
}
