package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/bench/debian"
	"github.com/shale-image/shale/bench/netmodel"
	"github.com/shale-image/shale/bench/oci"
	"github.com/shale-image/shale/bench/plain"
	"github.com/shale-image/shale/bench/registry"
	"github.com/shale-image/shale/daemon"
)

// world is what all tests share: made once, removed by TestMain.
type world struct {
	shale    string // the program
	dir      string
	registry *registry.Registry
	truth    string // the image's tree as GNU tar extracts it
	manifest manifest
}

const (
	plainName = "e2e/debian:plain" // beside it lies its index
	name      = "e2e/debian:shale"
)

var shared struct {
	once sync.Once
	w    *world
	err  error
	skip string
}

func TestMain(m *testing.M) {
	code := func() int {
		// Reads that fail in these tests need not wait for the default minute.
		dir, err := os.MkdirTemp("", "shale-e2e-config-")
		if err != nil {
			panic(err)
		}
		defer os.RemoveAll(dir)
		if path := filepath.Join(dir, "config.json"); os.Getenv("SHALE_CONFIG") == "" {
			if err := os.WriteFile(path, []byte(`{"read_timeout": "5s"}`), 0o600); err != nil {
				panic(err)
			}
			os.Setenv("SHALE_CONFIG", path)
		}
		return m.Run()
	}()
	if w := shared.w; w != nil {
		if w.registry != nil {
			w.registry.Stop()
		}
		os.RemoveAll(w.dir)
	}
	os.Exit(code)
}

// setup gives the shared world, or skips the test with what is missing.
func setup(t *testing.T) *world {
	t.Helper()
	if testing.Short() {
		t.Skip("builds a Debian image: not in short mode")
	}
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	for _, tool := range []string{"mmdebstrap", "docker-registry", "tar", "setfattr"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("%s is not installed", tool)
		}
	}
	shared.once.Do(func() { shared.w, shared.err = makeWorld(context.Background()) })
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	return shared.w
}

func makeWorld(ctx context.Context) (*world, error) {
	w := &world{shale: os.Getenv("SHALE")}
	var err error
	if w.dir, err = os.MkdirTemp("", "shale-e2e-"); err != nil {
		return nil, err
	}
	shared.w = w // for TestMain, also if the rest fails
	if w.shale == "" {
		w.shale = filepath.Join(w.dir, "shale")
		if out, err := exec.Command("go", "build", "-o", w.shale, "../cmd/shale").CombinedOutput(); err != nil {
			return nil, fmt.Errorf("%w\n%s", err, out)
		}
	}
	image, err := debian.Build(ctx, debian.Python, "../build/images", os.Stderr)
	if err != nil {
		return nil, err
	}
	image, err = addLayer(image, filepath.Join(w.dir, "image"))
	if err != nil {
		return nil, err
	}
	w.truth = filepath.Join(w.dir, "truth")
	if err := extract(ctx, image, w.truth); err != nil {
		return nil, err
	}
	if w.registry, err = registry.Start(ctx, filepath.Join(w.dir, "registry")); err != nil {
		return nil, err
	}
	if err := registry.Push(ctx, w.registry.URL(), image, plainName); err != nil {
		return nil, err
	}
	out, err := exec.Command(w.shale, "convert", "-q", w.registry.Host()+"/"+plainName, w.registry.Host()+"/"+name).CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("convert: %w\n%s", err, out)
	}
	out, err = exec.Command(w.shale, "index", "-q", "--push", w.registry.Host()+"/"+plainName).CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("index: %w\n%s", err, out)
	}
	return w, w.readManifest()
}

// extract unpacks all layers of a layout as tar does.
func extract(ctx context.Context, layout, dir string) error {
	m, _, err := oci.Layout(layout).Manifest()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, d := range m.Layers {
		f, err := os.Open(blobPath(layout, d.Digest))
		if err != nil {
			return err
		}
		err = plain.Unpack(ctx, f, dir)
		f.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

func blobPath(layout, digest string) string {
	return filepath.Join(layout, "blobs", strings.Replace(digest, ":", "/", 1))
}

// node is a root directory of its own, with its service, if any, and where it
// is mounted. All ends with the test.
type node struct {
	t    *testing.T
	w    *world
	root string
	mnt  string
}

func (w *world) node(t *testing.T) *node {
	t.Helper()
	n := &node{t: t, w: w, root: t.TempDir(), mnt: t.TempDir()}
	t.Cleanup(func() {
		unix.Unmount(n.mnt, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		n.stop()
		if b, err := os.ReadFile("/proc/self/mountinfo"); err == nil && bytes.Contains(b, []byte(n.mnt)) {
			t.Errorf("a mount was left behind:\n%s", b)
		}
	})
	return n
}

// in is the node in a part of its test.
func (n *node) in(t *testing.T) *node {
	part := *n
	part.t = t
	return &part
}

// stop ends the service and waits for it.
func (n *node) stop() {
	deadline := time.Now().Add(time.Minute)
	for {
		err := (&daemon.Client{Root: n.root}).Stop(context.Background())
		if n.ended() {
			return
		}
		if time.Now().After(deadline) {
			n.t.Errorf("the service does not end: %v", err)
			for _, p := range n.asked().Processes {
				unix.Kill(p.PID, unix.SIGKILL)
			}
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// ended tells whether no service holds the root directory: one that answers no more
// may still write what it keeps.
func (n *node) ended() bool {
	f, err := os.Open(filepath.Join(n.root, "daemon.lock"))
	if err != nil {
		return true // there never was one
	}
	defer f.Close()
	return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil
}

// shale runs the program and returns its standard output; it must exit with
// the code want.
func (n *node) shale(want int, args ...string) string {
	n.t.Helper()
	out, errout, code := n.try(args...)
	if code != want {
		n.t.Fatalf("shale %s: exit code %d, want %d\n%s%s", strings.Join(args, " "), code, want, out, errout)
	}
	return out
}

func (n *node) try(args ...string) (stdout, stderr string, code int) {
	n.t.Helper()
	var out, errout bytes.Buffer
	cmd := exec.Command(n.w.shale, args...)
	cmd.Env = append(os.Environ(), "SHALE_ROOT="+n.root)
	cmd.Stdout, cmd.Stderr = &out, &errout
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		n.t.Fatal(err)
	}
	return out.String(), errout.String(), cmd.ProcessState.ExitCode()
}

// status is what the worker says, which may be slow; what the keeper says if it is up
// for 20 s, and does not.
func (n *node) status() *daemon.Status {
	n.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if st := n.asked(); st.Pool != nil || time.Now().After(deadline) {
			return st
		}
	}
}

// asked is what the service says, whoever of it answers.
func (n *node) asked() *daemon.Status {
	n.t.Helper()
	var st daemon.Status
	if err := json.Unmarshal([]byte(n.shale(0, "status", "--json")), &st); err != nil {
		n.t.Fatal(err)
	}
	return &st
}

// proxy puts a fast network in front of the registry, to count and to break.
func (w *world) proxy(t *testing.T) *netmodel.Proxy {
	t.Helper()
	p, err := netmodel.Start(w.registry.URL(), netmodel.Model{Bandwidth: 1e11})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}
