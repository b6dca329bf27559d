package daemon

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/config"
	"github.com/shale-image/shale/convert"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/mount"
)

// TestMain is also the service that clients of the tests start.
func TestMain(m *testing.M) {
	Init()
	if len(os.Args) >= 4 && os.Args[1] == "daemon" && os.Args[2] == "--root" {
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
		defer stop()
		var ready io.WriteCloser
		if len(os.Args) == 6 && os.Args[4] == "--ready-fd" {
			fd, _ := strconv.Atoi(os.Args[5])
			ready = os.NewFile(uintptr(fd), "ready")
		}
		if os.Getenv("LISTEN_FDS") != "" {
			os.Setenv("LISTEN_PID", strconv.Itoa(os.Getpid())) // which manager cannot know
		}
		idle, _ := time.ParseDuration(os.Getenv("SHALE_TEST_IDLE"))
		var cfg *config.Config
		if path := os.Getenv("SHALE_TEST_CONFIG"); path != "" {
			var err error
			if cfg, err = config.Read(path); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
		}
		err := Run(ctx, Config{
			Root: os.Args[3], Version: "test", Registries: cfg, Idle: idle, Ready: ready,
			Logger: slog.New(slog.NewTextHandler(os.Stderr, nil)),
		})
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// imageDir is the node's directory of an image, by the digest of its manifest.
func imageDir(c *Client, digest string) string {
	return (&store{dir: filepath.Join(c.Root, "images")}).path(digest)
}

// service gives a client with a root directory of its own, whose service ends
// with the test.
func service(t testing.TB) *Client {
	t.Helper()
	// Longer than a socket address may be.
	root := filepath.Join(t.TempDir(), "a-directory-with-a-name-that-is-long", "and-another-one-that-is-no-shorter-than-that", "root")
	c := &Client{Root: root, Start: true}
	t.Cleanup(func() {
		end(t, c)
		if t.Failed() {
			log, _ := os.ReadFile(filepath.Join(root, logName))
			t.Logf("the service's log:\n%s", log)
		}
	})
	return c
}

func end(t testing.TB, c *Client) {
	t.Helper()
	c = &Client{Root: c.Root}
	for range 3000 { // a busy machine takes its time
		if _, err := os.Stat(filepath.Join(c.Root, socketName)); err != nil {
			return
		}
		c.Stop(context.Background())
		time.Sleep(10 * time.Millisecond)
	}
	t.Error("the service does not end")
}

// files are the regular files of the test image.
var files = map[string][]byte{
	"etc/hello": []byte("hello\n"),
	"big":       bytes.Repeat([]byte("0123456789abcdef"), 40<<10),
}

// layout makes a converted image in an OCI layout and returns its reference.
func layout(t testing.TB) string {
	t.Helper()
	var layer bytes.Buffer
	tw := tar.NewWriter(&layer)
	for name, b := range files {
		if err := tw.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(b))}); err != nil {
			t.Fatal(err)
		}
		tw.Write(b)
	}
	tw.Close()
	return layoutOf(t, layer.Bytes())
}

// longText is compressed by references to what is before.
func longText() []byte {
	r := rand.New(rand.NewPCG(1, 2))
	var words [500]string
	for i := range words {
		words[i] = fmt.Sprintf("%x ", r.Uint32())
	}
	text := make([]byte, 0, 2<<20)
	for len(text) < 2<<20-20 {
		text = append(text, words[r.IntN(len(words))]...)
	}
	return text
}

// windowed is layout with a file that takes several spans of gzip.
func windowed(t testing.TB) string {
	t.Helper()
	var layer bytes.Buffer
	tw := tar.NewWriter(&layer)
	for _, f := range []struct {
		name string
		data []byte
	}{{"text", longText()}, {"etc/hello", files["etc/hello"]}, {"big", files["big"]}} {
		if err := tw.WriteHeader(&tar.Header{Name: f.name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(f.data))}); err != nil {
			t.Fatal(err)
		}
		tw.Write(f.data)
	}
	tw.Close()
	return layoutOf(t, layer.Bytes())
}

// layoutOf is the same of any layer. The tag "plain" is the image unconverted.
func layoutOf(t testing.TB, layer []byte) string {
	t.Helper()
	src, dir := plainOf(t, layer)
	dst := openRepository(t, "oci:"+dir+":shale")
	if _, err := convert.Convert(context.Background(), src, dst, convert.Options{Platform: image.Platform{OS: "linux", Architecture: "amd64"}}); err != nil {
		t.Fatal(err)
	}
	return "oci:" + dir + ":shale"
}

func openRepository(t testing.TB, name string) *image.Repository {
	t.Helper()
	ref, err := image.ParseRef(name)
	if err != nil {
		t.Fatal(err)
	}
	r, err := image.Open(context.Background(), ref, image.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// plainOf makes an OCI layout in dir, with an image of one layer under the tag "plain".
func plainOf(t testing.TB, layer []byte) (src *image.Repository, dir string) {
	t.Helper()
	dir = t.TempDir()
	ctx := context.Background()
	src = openRepository(t, "oci:"+dir+":plain")
	push := func(mediaType string, b []byte) image.Descriptor {
		d := image.Descriptor{MediaType: mediaType, Digest: sha(b), Size: int64(len(b))}
		if err := src.PushBlob(ctx, d, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }); err != nil {
			t.Fatal(err)
		}
		return d
	}
	config, _ := json.Marshal(map[string]any{
		"os": "linux", "architecture": "amd64", "config": map[string]any{"Cmd": []string{"/etc/hello"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{sha(layer)}},
	})
	manifest, _ := json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
		"config": push("application/vnd.oci.image.config.v1+json", config),
		"layers": []any{push("application/vnd.oci.image.layer.v1.tar+gzip", gzipped(layer))},
	})
	if _, err := src.PushManifest(ctx, "application/vnd.oci.image.manifest.v1+json", manifest, "plain"); err != nil {
		t.Fatal(err)
	}
	return src, dir
}

func gzipped(p []byte) []byte {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	w.Write(p)
	w.Close()
	return b.Bytes()
}

func sha(b []byte) string {
	s := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(s[:])
}

// attach mounts the image on a directory of the test.
func attach(t *testing.T, c *Client, ref string) (dir string, m *Mounted) {
	t.Helper()
	return attachAs(t, c, ref, Place{})
}

// attachAs is attach with more to say about the mount.
func attachAs(t *testing.T, c *Client, ref string, p Place) (dir string, m *Mounted) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	dir = t.TempDir()
	p.Where = dir
	m, err := c.Mount(context.Background(), Source{Ref: ref, Platform: "linux/amd64"}, p, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer m.FS.Close()
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	if err := mount.Attach(m.FS, dir); err != nil {
		t.Fatal(err)
	}
	return dir, m
}

// self is a run of some of these tests as another user.
func self(t *testing.T, uid uint32, tests string) *exec.Cmd {
	t.Helper()
	tmp, err := os.MkdirTemp("", "shale-user-")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(tmp) })
	must(t, os.Chown(tmp, int(uid), int(uid)))
	cmd := exec.Command("/proc/self/exe", "-test.v", "-test.run="+tests)
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp, "HOME="+tmp)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}, Pdeathsig: syscall.SIGKILL}
	return cmd
}
