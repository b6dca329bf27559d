package registry

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/shale-image/shale/bench/oci"
)

// startOrSkip runs a registry in dir for the duration of the test.
func startOrSkip(t *testing.T, dir string) *Registry {
	t.Helper()
	r, err := Start(t.Context(), dir)
	if errors.Is(err, exec.ErrNotFound) {
		t.Skip(err)
	} else if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Stop() })
	return r
}

// image makes a layout with two layers of random-looking bytes.
func image(t *testing.T) (oci.Layout, oci.Manifest, oci.Descriptor) {
	t.Helper()
	l, err := oci.Create(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	var layers []oci.Descriptor
	for _, content := range []string{"one", strings.Repeat("two", 1<<20)} {
		d := oci.Descriptor{MediaType: oci.TypeGzip, Digest: oci.Digest([]byte(content)), Size: int64(len(content))}
		name, err := l.Blob(d.Digest)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		layers = append(layers, d)
	}
	if err := l.Finish(oci.Image{Architecture: "amd64", OS: "linux"}, layers); err != nil {
		t.Fatal(err)
	}
	m, d, err := l.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	return l, m, d
}

// fetch returns what the registry has at a path below the repository.
func fetch(t *testing.T, r *Registry, path, accept string) []byte {
	t.Helper()
	req, err := http.NewRequest(http.MethodGet, r.URL()+"/v2/a/b/"+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept", accept)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	p, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s: %v", path, resp.Status, err)
	}
	return p
}

func TestPush(t *testing.T) {
	dir := t.TempDir()
	r := startOrSkip(t, dir)
	l, m, desc := image(t)
	for range 2 { // the second sends nothing new
		if err := Push(t.Context(), r.URL(), string(l), "a/b:1"); err != nil {
			t.Fatal(err)
		}
	}
	for _, d := range append(m.Layers, m.Config) {
		if got := oci.Digest(fetch(t, r, "blobs/"+d.Digest, "")); got != d.Digest {
			t.Errorf("blob %s came back as %s", d.Digest, got)
		}
	}
	if got := oci.Digest(fetch(t, r, "manifests/1", oci.TypeManifest)); got != desc.Digest {
		t.Errorf("manifest %s came back as %s", desc.Digest, got)
	}

	// The content is there for the next registry.
	if err := r.Stop(); err != nil {
		t.Fatal(err)
	}
	r = startOrSkip(t, dir)
	if got := oci.Digest(fetch(t, r, "manifests/1", oci.TypeManifest)); got != desc.Digest {
		t.Errorf("after a restart the manifest is %s, want %s", got, desc.Digest)
	}
}

func TestPushTellsWhatFailed(t *testing.T) {
	r := startOrSkip(t, t.TempDir())
	l, m, _ := image(t)
	name, err := l.Blob(m.Layers[1].Digest)
	if err != nil {
		t.Fatal(err)
	}
	p, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	p[5] ^= 1
	if err := os.WriteFile(name, p, 0o644); err != nil {
		t.Fatal(err)
	}
	err = Push(t.Context(), r.URL(), string(l), "a/b:1")
	if err == nil || !strings.Contains(err.Error(), m.Layers[1].Digest) || !strings.Contains(err.Error(), "DIGEST_INVALID") {
		t.Errorf("pushing a blob with a flipped bit: %v", err)
	}
	if err := Push(t.Context(), r.URL(), string(l), "untagged"); err == nil {
		t.Error("a name without a tag is pushed")
	}
}

func TestStop(t *testing.T) {
	r := startOrSkip(t, t.TempDir())
	pid := r.PID()
	for range 2 {
		if err := r.Stop(); err != nil {
			t.Fatal(err)
		}
	}
	if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("process %d after Stop: %v, want none", pid, err)
	}
}

func TestStartTellsWhy(t *testing.T) {
	dir := t.TempDir()
	bin := filepath.Join(dir, program)
	if err := os.WriteFile(bin, []byte("#!/bin/sh\necho no luck\nexit 3\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir)
	_, err := Start(t.Context(), filepath.Join(dir, "state"))
	if err == nil || !strings.Contains(err.Error(), "no luck") || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("error %v, want how it ended and what it said", err)
	}
}

// TestRegistryDiesWithItsParent runs this test binary as a parent that starts
// a registry and is killed.
func TestRegistryDiesWithItsParent(t *testing.T) {
	const key = "SHALE_TEST_REGISTRY_DIR"
	if dir := os.Getenv(key); dir != "" {
		r, err := Start(t.Context(), dir)
		if err != nil {
			t.Fatal(err)
		}
		os.Stdout.WriteString("pid " + strconv.Itoa(r.PID()) + "\n")
		select {}
	}
	startOrSkip(t, t.TempDir()).Stop()

	cmd := exec.Command(os.Args[0], "-test.run=^TestRegistryDiesWithItsParent$")
	cmd.Env = append(os.Environ(), key+"="+t.TempDir())
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 32)
	n, err := out.Read(line)
	cmd.Process.Kill()
	cmd.Wait()
	text, ok := bytes.CutPrefix(bytes.TrimSpace(line[:n]), []byte("pid "))
	pid, err2 := strconv.Atoi(string(text))
	if !ok || err2 != nil {
		t.Fatalf("the parent said %q, %v", line[:n], err)
	}
	for range 1000 {
		// An orphan that nobody reaps stays as a zombie: as good as gone.
		stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
		if err != nil || strings.Contains(string(stat), ") Z ") {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("registry %d outlives its parent", pid)
	syscall.Kill(pid, syscall.SIGKILL)
}
