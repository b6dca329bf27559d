package convert

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"go.uber.org/goleak"

	"github.com/shale-image/shale/bench/treecmp"
	"github.com/shale-image/shale/export"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/reader"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var amd64 = image.Platform{OS: "linux", Architecture: "amd64"}

// debianImage finds the image that bench/demo builds.
func debianImage(t testing.TB) string {
	t.Helper()
	dirs, _ := filepath.Glob("../build/images/python-*/index.json")
	if len(dirs) == 0 {
		t.Skip("no image of Debian with python3 in build/images: run `make demo` once")
	}
	return filepath.Dir(dirs[0])
}

func open(t testing.TB, ref string) *image.Repository {
	t.Helper()
	r, err := image.ParseRef(ref)
	if err != nil {
		t.Fatal(err)
	}
	repo, err := image.Open(t.Context(), r, image.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { repo.Close() })
	return repo
}

// testLayer is a layer of a test image.
type testLayer struct {
	raw       []byte // the archive
	stored    []byte // default: raw
	mediaType string // default: that of an archive that is not compressed
	diffID    string // default: that of raw
}

func gz(p []byte) testLayer {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	w.Write(p)
	w.Close()
	return testLayer{raw: p, stored: b.Bytes(), mediaType: "application/vnd.oci.image.layer.v1.tar+gzip"}
}

func zst(p []byte) testLayer {
	w, err := zstd.NewWriter(nil)
	if err != nil {
		panic(err)
	}
	defer w.Close()
	return testLayer{raw: p, stored: w.EncodeAll(p, nil), mediaType: "application/vnd.oci.image.layer.v1.tar+zstd"}
}

func plain(p []byte) testLayer { return testLayer{raw: p} }

// push stores bytes and returns their descriptor.
func push(t testing.TB, repo *image.Repository, mediaType string, p []byte) image.Descriptor {
	t.Helper()
	d := image.Descriptor{MediaType: mediaType, Digest: digestOf(p), Size: int64(len(p))}
	if err := repo.PushBlob(t.Context(), d, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(p)), nil }); err != nil {
		t.Fatal(err)
	}
	return d
}

// pushImage stores an image and returns its manifest's descriptor.
func pushImage(t testing.TB, repo *image.Repository, tag string, p image.Platform, layers ...testLayer) image.Descriptor {
	t.Helper()
	diffIDs, descriptors := []string{}, []image.Descriptor{}
	for _, l := range layers {
		if l.stored == nil {
			l.stored = l.raw
		}
		if l.mediaType == "" {
			l.mediaType = "application/vnd.oci.image.layer.v1.tar"
		}
		if l.diffID == "" {
			l.diffID = digestOf(l.raw)
		}
		diffIDs = append(diffIDs, l.diffID)
		descriptors = append(descriptors, push(t, repo, l.mediaType, l.stored))
	}
	config, err := json.Marshal(map[string]any{
		"os": p.OS, "architecture": p.Architecture, "created": "2026-01-02T03:04:05Z",
		"config":  map[string]any{"Cmd": []string{"/bin/true"}, "Env": []string{"A=b"}},
		"rootfs":  map[string]any{"type": "layers", "diff_ids": diffIDs},
		"history": []any{}, "x-unknown": map[string]int{"kept": 1},
	})
	if err != nil {
		t.Fatal(err)
	}
	m, err := json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": image.MediaTypeManifest,
		"config": push(t, repo, image.MediaTypeConfig, config), "layers": descriptors, "annotations": map[string]string{"from": "test"},
	})
	if err != nil {
		t.Fatal(err)
	}
	d, err := repo.PushManifest(t.Context(), image.MediaTypeManifest, m, tag)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// makeImage makes a layout with an image of some layers.
func makeImage(t testing.TB, layers ...testLayer) *image.Repository {
	t.Helper()
	repo := open(t, "oci:"+t.TempDir()+":src")
	pushImage(t, repo, "src", amd64, layers...)
	return repo
}

// file is an entry of a test archive.
type file struct {
	name, data, link string
	kind             byte // default: a file, or a directory if name ends in a slash
}

func archive(t testing.TB, files ...file) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		h := &tar.Header{Name: f.name, Typeflag: f.kind, Linkname: f.link, Size: int64(len(f.data)), Mode: 0o644, ModTime: time.Unix(1700000000, 5), Format: tar.FormatPAX}
		if strings.HasSuffix(f.name, "/") {
			h.Typeflag, h.Mode = tar.TypeDir, 0o755
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		io.WriteString(w, f.data)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// text makes n bytes that compress as text does and differ with the seed.
func text(seed, n int) string {
	var b strings.Builder
	b.Grow(n + 32)
	for x := uint32(seed)*2654435761 + 1; b.Len() < n; {
		x = x*1664525 + 1013904223
		fmt.Fprintf(&b, "word%d ", x>>20)
	}
	return b.String()[:n]
}

// target makes a layout to convert to.
func target(t testing.TB) *image.Repository { return open(t, "oci:"+t.TempDir()+"/dst:dst") }

func mustConvert(t testing.TB, src, dst *image.Repository, o Options) *Result {
	t.Helper()
	if o.Platform.OS == "" {
		o.Platform = amd64
	}
	res, err := Convert(t.Context(), src, dst, o)
	if err != nil {
		t.Fatal(err)
	}
	return res
}

// tree reads a converted image back.
func tree(t testing.TB, repo *image.Repository) *index.Tree {
	t.Helper()
	img, err := repo.Resolve(t.Context(), amd64)
	if err != nil {
		t.Fatal(err)
	}
	tr, err := reader.Tree(t.Context(), repo, img, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return tr
}

// exported writes a converted image to a directory.
func exported(t testing.TB, repo *image.Repository) string {
	t.Helper()
	dir := t.TempDir()
	if err := export.Dir(t.Context(), dir, tree(t, repo), repo.Blobs()); err != nil {
		t.Fatal(err)
	}
	return dir
}

// same fails unless two directories have the same trees. The roots' own times
// are those of their making.
func same(t testing.TB, want, got string) {
	t.Helper()
	diffs, err := treecmp.Compare(want, got, treecmp.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range diffs {
		if d.Path != "." {
			t.Error(d)
		}
	}
}

func needRoot(t testing.TB, tools ...string) {
	t.Helper()
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("%s is not installed", tool)
		}
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root: owners, devices and trusted xattrs are part of the test")
	}
}

func run(t testing.TB, name string, args ...string) []byte {
	t.Helper()
	cmd := exec.Command(name, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, &errs)
	}
	return out.Bytes()
}

// empty fails if there is anything in a directory, or the directory itself is
// there and need not be.
func empty(t testing.TB, dir string) {
	t.Helper()
	names, err := os.ReadDir(dir)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	for _, n := range names {
		t.Errorf("left in %s: %s", dir, n.Name())
	}
}
