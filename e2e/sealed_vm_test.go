package e2e

import (
	"archive/tar"
	"bytes"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/shale-image/shale/bench/oci"
)

// sealedParts is how many parts e2e/sealed shows.
const sealedParts = 7

// TestSealed has a machine whose kernel and file system have fs-verity (e2e/sealed) seal a
// complete image. What is then changed on its disk, below the file system, is EIO below a
// direct mount, never a wrong byte; a reader of another face is served; scrub and
// fsck mend it, and it can be removed. It was run with Debian's kernel of 6.1, where direct
// mounts are on loop devices.
func TestSealed(t *testing.T) {
	if testing.Short() {
		t.Skip("emulates a machine: not in short mode")
	}
	if os.Geteuid() != 0 {
		t.Skip("files of root's on the machine's disk need root")
	}
	m := newMachine(t, "./sealed")
	top := t.TempDir()
	build := exec.Command("go", "build", "-o", filepath.Join(top, "shale"), "../cmd/shale")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	r := rand.NewChaCha8([32]byte{1})
	var layer bytes.Buffer
	tw := tar.NewWriter(&layer)
	for _, f := range []struct {
		name string
		size int
	}{{"a", 3 << 20}, {"dir/b", 700_001}, {"dir/c", 5000}, {"dir/d", 1}, {"e", 300_000}} {
		content := make([]byte, f.size)
		r.Read(content)
		path := filepath.Join(top, "files", f.name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.AddFS(os.DirFS(filepath.Join(top, "files"))); err != nil {
		t.Fatal(err)
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	layout, err := oci.Create(filepath.Join(top, "image"))
	if err != nil {
		t.Fatal(err)
	}
	d := oci.Descriptor{MediaType: "application/vnd.oci.image.layer.v1.tar", Digest: oci.Digest(layer.Bytes()), Size: int64(layer.Len())}
	path, err := layout.Blob(d.Digest)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, layer.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	config := oci.Image{Architecture: "amd64", OS: "linux", RootFS: oci.RootFS{Type: "layers", DiffIDs: []string{d.Digest}}}
	if err := layout.Finish(config, []oci.Descriptor{d}); err != nil {
		t.Fatal(err)
	}
	v := m.boot(t, 0, "driver=raw,node-name=disk,file.driver=file,file.filename="+m.newDisk(t, "-d", top))
	hangs := time.AfterFunc(15*time.Minute, v.kill)
	defer hangs.Stop()
	passed := 0
	var console []string
	for line := range v.lines {
		console = append(console, line)
		said, ok := strings.CutPrefix(line, "sealed: ")
		switch {
		case !ok:
			continue
		case strings.HasPrefix(said, "ok "):
			passed++
		case strings.HasPrefix(said, "FAIL"):
			t.Error(said)
		}
		t.Log(said)
		if said == "end" {
			v.kill()
		}
	}
	if passed != sealedParts {
		t.Errorf("%d of %d parts passed; the console's last lines:\n%s", passed, sealedParts, strings.Join(console[max(0, len(console)-40):], "\n"))
	}
}
