package e2e

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/convert"
	"github.com/shale-image/shale/daemon"
	"github.com/shale-image/shale/image"
)

// manyFiles is how many files an image of pushMany has of its own.
const manyFiles = 300

// pushMany pushes images with one layer in common and one of their own, every other one
// converted. It returns their names, and what they have of their own.
func (w *world) pushMany(t *testing.T, count int) (refs []string, own []map[string][]byte) {
	t.Helper()
	r := rand.New(rand.NewPCG(3, 4))
	base := map[string][]byte{}
	for n := range manyFiles {
		base[fmt.Sprintf("base/%03d", n)] = prose(r, 500+r.IntN(20_000))
	}
	bottom := tarball(t, base)
	open := func(name string) *image.Repository {
		ref, err := image.ParseRef(w.registry.Host() + "/" + name)
		if err != nil {
			t.Fatal(err)
		}
		repo, err := image.Open(t.Context(), ref, image.Options{})
		if err != nil {
			t.Fatal(err)
		}
		return repo
	}
	for i := range count {
		files := map[string][]byte{}
		for n := range manyFiles {
			size := 500 + r.IntN(10_000)
			if n%30 == 0 {
				size = 300_000
			}
			files[fmt.Sprintf("own/%d/%03d", n%7, n)] = prose(r, size)
		}
		top := tarball(t, files)
		repository := fmt.Sprintf("many/%d", i)
		s := &small{repo: open(repository + ":plain")}
		js := encode(t, map[string]any{"schemaVersion": 2, "mediaType": image.MediaTypeManifest,
			"config": s.push(t, image.MediaTypeConfig, encode(t, map[string]any{
				"os": "linux", "architecture": runtime.GOARCH,
				"rootfs": map[string]any{"type": "layers", "diff_ids": []string{digest(bottom), digest(top)}},
			})),
			"layers": []image.Descriptor{
				s.push(t, "application/vnd.oci.image.layer.v1.tar+gzip", gzipped(bottom)),
				s.push(t, "application/vnd.oci.image.layer.v1.tar+gzip", gzipped(top)),
			}})
		if _, err := s.repo.PushManifest(t.Context(), image.MediaTypeManifest, js, "plain"); err != nil {
			t.Fatal(err)
		}
		tag := ":plain"
		if i%2 == 0 {
			tag = ":shale"
			to := open(repository + tag)
			_, err := convert.Convert(t.Context(), s.repo, to, convert.Options{Platform: image.Platform{OS: "linux", Architecture: runtime.GOARCH}})
			to.Close()
			if err != nil {
				t.Fatal(err)
			}
		} else {
			(&node{t: t, w: w, root: t.TempDir()}).shale(0, "index", "-q", "--push", w.registry.Host()+"/"+repository+tag)
		}
		s.repo.Close()
		refs, own = append(refs, w.registry.Host()+"/"+repository+tag), append(own, files)
	}
	return refs, own
}

// usage is what a process takes.
type usage struct {
	rss, peak, anon int64 // KiB
	files, threads  int
}

func usageOf(t *testing.T, pid int) (u usage) {
	t.Helper()
	p, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	field := func(name string) int64 {
		_, v, _ := bytes.Cut(p, []byte("\n"+name+":"))
		v, _, _ = bytes.Cut(v, []byte("\n"))
		n, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(string(v)), " kB"), 10, 64)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		return n
	}
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	return usage{field("VmRSS"), field("VmHWM"), field("RssAnon"), len(fds), int(field("Threads"))}
}

func (u usage) String() string {
	return fmt.Sprintf("%.1f MiB resident (%.1f its own, %.1f at its peak), %d files, %d threads",
		float64(u.rss)/1024, float64(u.anon)/1024, float64(u.peak)/1024, u.files, u.threads)
}

func (n *node) usage() (keeper, worker usage) {
	n.t.Helper()
	for _, p := range n.status().Processes {
		switch p.Role {
		case daemon.RoleKeeper:
			keeper = usageOf(n.t, p.PID)
		case daemon.RoleWorker:
			worker = usageOf(n.t, p.PID)
		}
	}
	return keeper, worker
}

// metric asks the service for one of its metrics.
func (n *node) metric(name string) int {
	n.t.Helper()
	c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(n.root, "metrics.sock"))
	}}}
	resp, err := c.Get("http://shale/metrics")
	if err != nil {
		n.t.Fatal(err)
	}
	defer resp.Body.Close()
	p, err := io.ReadAll(resp.Body)
	_, v, _ := strings.Cut(string(p), "\n"+name+" ")
	v, _, _ = strings.Cut(v, "\n")
	value, perr := strconv.Atoi(v)
	if err != nil || perr != nil {
		n.t.Fatalf("%s: %v, %v", name, err, perr)
	}
	return value
}

// patient lets reads of this test wait: all processors are taken.
func patient(t *testing.T) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.json")
	if err := os.WriteFile(path, []byte(`{"read_timeout": "3m"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SHALE_CONFIG", path)
}

// TestManyImages mounts images of different content and reads them all at the same time:
// SHALE_IMAGES of them, 12 by default. What the service takes is bounded.
func TestManyImages(t *testing.T) {
	w := setup(t)
	patient(t)
	count := fromEnvInt(t, "SHALE_IMAGES", 12)
	refs, own := w.pushMany(t, count)
	n := w.node(t)
	dirs := make([]string, count)
	for i, ref := range refs {
		dirs[i] = t.TempDir()
		n.shale(0, "mount", "--face", "device", ref, dirs[i])
		defer n.shale(0, "umount", dirs[i])
	}
	keeper, worker := n.usage()
	t.Logf("mounted: keeper %v; worker %v", keeper, worker)
	read := func() *sync.WaitGroup {
		var wg sync.WaitGroup
		for i, dir := range dirs {
			wg.Go(func() {
				for name, want := range own[i] {
					f, err := os.Open(filepath.Join(dir, name))
					if err == nil {
						_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
						f.Close()
					}
					if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !bytes.Equal(got, want) {
						t.Errorf("image %d: %s: %d bytes, want %d: %v", i, name, len(got), len(want), err)
					}
				}
			})
		}
		return &wg
	}
	check := func(what string) {
		t.Helper()
		keeper, worker := n.usage()
		t.Logf("%d images %s: keeper %v; worker %v", count, what, keeper, worker)
		const mib = 1024
		if worker.peak > 128*mib {
			t.Errorf("the worker has taken %d KiB", worker.peak)
		}
		if keeper.peak > 16*mib {
			t.Errorf("the keeper has taken %d KiB", keeper.peak)
		}
	}
	read().Wait()
	check("read")
	// All of them are taken over, too.
	wg := read()
	for _, p := range n.status().Processes {
		if p.Role == daemon.RoleWorker {
			if err := unix.Kill(p.PID, unix.SIGKILL); err != nil {
				t.Error(err)
			}
		}
	}
	wg.Wait()
	check("taken over and read again")
	t.Logf("nobody served for %v", n.takeovers())
}

// TestNothingLeaks mounts, reads and unmounts SHALE_MOUNTS times, 200 by default, and
// compares what the service has then with what it had after the first tenth.
func TestNothingLeaks(t *testing.T) {
	w := setup(t)
	patient(t)
	count := fromEnvInt(t, "SHALE_MOUNTS", 200)
	const different = 4
	refs, own := w.pushMany(t, different)
	n := w.node(t)
	n.shale(0, "mount", "--face", "device", refs[0], n.mnt) // so that there is a service, and stays
	c := &daemon.Client{Root: n.root}
	round := func(i int) {
		ref, files := refs[i%different], own[i%different]
		face := "device"
		m, err := c.Mount(t.Context(), daemon.Source{Ref: ref}, daemon.Place{Where: "nowhere", Face: face}, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer m.FS.Close()
		k := i % manyFiles
		name := fmt.Sprintf("own/%d/%03d", k%7, k)
		got, err := os.ReadFile(fmt.Sprintf("/proc/self/fd/%d/%s", m.FS.Fd(), name))
		if err != nil || !bytes.Equal(got, files[name]) {
			t.Fatalf("%s: %d bytes, %v", name, len(got), err)
		}
	}
	settled := func() {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
			if n.metric("shale_mounts") == 1 {
				time.Sleep(2 * time.Second) // what is done once a second
				return
			}
			if time.Now().After(deadline) {
				t.Fatal("mounts do not end")
			}
		}
	}
	var before [2]usage
	var goroutines int
	began := time.Now()
	for i := range count {
		if i == count/10 {
			settled()
			before[0], before[1] = n.usage()
			goroutines = n.metric("shale_goroutines")
		}
		round(i)
	}
	took := time.Since(began)
	settled()
	keeper, worker := n.usage()
	after := n.metric("shale_goroutines")
	t.Logf("%d mounts in %v", count, took)
	t.Logf("keeper: %v, before %v", keeper, before[0])
	t.Logf("worker: %v, %d goroutines, before %v, %d goroutines", worker, after, before[1], goroutines)
	// Connections to the registry come and go.
	if keeper.files > before[0].files || worker.files > before[1].files+4 || after > goroutines+8 || n.metric("shale_chunks_in_flight") != 0 {
		t.Error("something is left of mounts that have ended")
	}
	if grown := worker.anon - before[1].anon; grown > 16<<10 {
		t.Errorf("the worker has grown by %d KiB", grown)
	}
	if grown := keeper.anon - before[0].anon; grown > 2<<10 {
		t.Errorf("the keeper has grown by %d KiB", grown)
	}
}
