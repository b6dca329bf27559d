package plain

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/bench/netmodel"
	"github.com/shale-image/shale/bench/oci"
	"github.com/shale-image/shale/bench/treecmp"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var then = time.Unix(1600000000, 123456789)

// entries are tar headers in short: "name/" is a directory, "name>target" a
// symbolic link, "name=target" a hard link, "name" a file that contains its
// own name.
func layer(t *testing.T, entries ...string) []byte {
	t.Helper()
	var buf bytes.Buffer
	z := gzip.NewWriter(&buf)
	w := tar.NewWriter(z)
	for _, e := range entries {
		h := tar.Header{Name: e, Mode: 0o644, ModTime: then, Format: tar.FormatPAX,
			Uid: os.Geteuid(), Gid: os.Getegid()}
		var content string
		if name, target, ok := strings.Cut(e, ">"); ok {
			h.Typeflag, h.Name, h.Linkname = tar.TypeSymlink, name, target
		} else if name, target, ok := strings.Cut(e, "="); ok {
			h.Typeflag, h.Name, h.Linkname = tar.TypeLink, name, target
		} else if strings.HasSuffix(e, "/") {
			h.Typeflag, h.Mode = tar.TypeDir, 0o755
		} else {
			h.Typeflag, h.Size, content = tar.TypeReg, int64(len(e)), e
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(w.Close(), z.Close()); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// tree unpacks layers on each other.
func tree(t *testing.T, layers ...[]byte) string {
	t.Helper()
	dir := t.TempDir()
	for _, l := range layers {
		if err := Unpack(t.Context(), bytes.NewReader(l), dir); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// same fails the test unless the trees are equal, but for the times of the
// directories that are no entry of a layer.
func same(t *testing.T, got, want string) {
	t.Helper()
	for _, dir := range []string{got, want} {
		ts := unix.NsecToTimespec(then.UnixNano())
		if err := unix.UtimesNano(dir, []unix.Timespec{ts, ts}); err != nil {
			t.Fatal(err)
		}
	}
	ds, err := treecmp.Compare(got, want, treecmp.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range ds {
		t.Error(d)
	}
}

func TestWhiteouts(t *testing.T) {
	lower := func(t *testing.T) []byte {
		return layer(t, "a", "d/", "d/x", "d/y", "d/e/", "d/e/f", "l>d", "k=a", "odd \"\\\n\tö")
	}
	tests := []struct {
		name  string
		upper []string
		want  []string
	}{
		{"none", nil, []string{"a", "d/", "d/x", "d/y", "d/e/", "d/e/f", "l>d", "k=a", "odd \"\\\n\tö"}},
		{"file", []string{"d/", "d/.wh.x"}, []string{"a", "d/", "d/y", "d/e/", "d/e/f", "l>d", "k=a", "odd \"\\\n\tö"}},
		{"directory, and nothing behind a link", []string{".wh.d", ".wh.l"}, []string{"a", "k=a", "odd \"\\\n\tö"}},
		{"odd name", []string{".wh.odd \"\\\n\tö"}, []string{"a", "d/", "d/x", "d/y", "d/e/", "d/e/f", "l>d", "k=a"}},
		{"opaque", []string{"d/", "d/.wh..wh..opq", "d/new"}, []string{"a", "d/", "d/new", "l>d", "k=a", "odd \"\\\n\tö"}},
		{"opaque after the new", []string{"d/", "d/e/", "d/e/g", "d/.wh..wh..opq"},
			[]string{"a", "d/", "d/e/", "d/e/g", "l>d", "k=a", "odd \"\\\n\tö"}},
		{"opaque beside a whiteout", []string{"d/", "d/.wh..wh..opq", "d/.wh.x", "d/z"},
			[]string{"a", "d/", "d/z", "l>d", "k=a", "odd \"\\\n\tö"}},
		{"gone already", []string{".wh.nothing"}, []string{"a", "d/", "d/x", "d/y", "d/e/", "d/e/f", "l>d", "k=a", "odd \"\\\n\tö"}},
		{"replaced in the same layer", []string{".wh.d", "d/", "d/x"}, []string{"a", "d/", "d/x", "l>d", "k=a", "odd \"\\\n\tö"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			same(t, tree(t, lower(t), layer(t, tt.upper...)), tree(t, layer(t, tt.want...)))
		})
	}
}

// toZstd makes a zstd layer of a gzip layer.
func toZstd(t *testing.T, layer []byte) []byte {
	t.Helper()
	z, err := gzip.NewReader(bytes.NewReader(layer))
	if err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	w, err := zstd.NewWriter(&buf, zstd.WithEncoderConcurrency(1))
	if err != nil {
		t.Fatal(err)
	}
	_, err = io.Copy(w, z)
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func needZstd(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("zstd"); err != nil {
		t.Skip("zstd is not installed")
	}
}

// TestUnpackTakesAllCompressions, of a file, of a pipe, and of what is
// neither.
func TestUnpackTakesAllCompressions(t *testing.T) {
	needZstd(t)
	gz := layer(t, "a", "d/", "d/x")
	want := tree(t, gz)
	z, err := gzip.NewReader(bytes.NewReader(gz))
	if err != nil {
		t.Fatal(err)
	}
	raw, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	for name, p := range map[string][]byte{"gzip": gz, "zstd": toZstd(t, gz), "none": raw} {
		t.Run(name, func(t *testing.T) {
			same(t, tree(t, p), want)

			file := filepath.Join(t.TempDir(), "layer")
			if err := os.WriteFile(file, p, 0o600); err != nil {
				t.Fatal(err)
			}
			f, err := os.Open(file)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			dir := t.TempDir()
			if err := Unpack(t.Context(), f, dir); err != nil {
				t.Fatal(err)
			}
			same(t, dir, want)

			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			go func() { w.Write(p); w.Close() }()
			dir = t.TempDir()
			if err := Unpack(t.Context(), r, dir); err != nil {
				t.Fatal(err)
			}
			same(t, dir, want)
		})
	}
}

func TestStartOfAZstdImage(t *testing.T) {
	needZstd(t)
	layers := many(t)
	for i := range layers {
		layers[i] = toZstd(t, layers[i])
	}
	p := serve(t, layers...)
	want := tree(t, layer(t, "d/", "d/x", "b"))
	for _, stream := range []bool{false, true} {
		res, err := Start(t.Context(), Options{Registry: p.URL(), Name: "img:1", Dir: t.TempDir(), Stream: stream})
		if err != nil {
			t.Fatal(err)
		}
		same(t, res.Rootfs, want)
	}
}

func TestUnpackTellsWhatFailed(t *testing.T) {
	good := layer(t, "a", "b")
	broken := bytes.Clone(good)
	broken[len(broken)-6] ^= 1 // in the checksum
	for name, p := range map[string][]byte{"checksum": broken, "short": good[:len(good)/2], "no gzip": []byte("hello hello hello"), "tiny": []byte("x"), "empty": nil,
		"no zstd": append(bytes.Clone(zstdMagic), "hello"...)} {
		if err := Unpack(t.Context(), bytes.NewReader(p), t.TempDir()); err == nil {
			t.Errorf("%s: unpacked without an error", name)
		}
	}
	if err := Unpack(t.Context(), bytes.NewReader(good), filepath.Join(t.TempDir(), "none")); err == nil || !strings.Contains(err.Error(), "none") {
		t.Errorf("error %v, want one that names the directory", err)
	}
}

// serve is a registry of one image, "img:1", behind a fault-injecting proxy.
func serve(t *testing.T, layers ...[]byte) *netmodel.Proxy {
	t.Helper()
	l, err := oci.Create(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	var ds []oci.Descriptor
	for _, p := range layers {
		d := oci.Descriptor{MediaType: oci.TypeGzip, Digest: oci.Digest(p), Size: int64(len(p))}
		name, err := l.Blob(d.Digest)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, p, 0o644); err != nil {
			t.Fatal(err)
		}
		ds = append(ds, d)
	}
	if err := l.Finish(oci.Image{Config: oci.Process{Cmd: []string{"run"}}}, ds); err != nil {
		t.Fatal(err)
	}
	_, m, err := l.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		digest := filepath.Base(r.URL.Path)
		if r.URL.Path == "/v2/img/manifests/1" {
			digest = m.Digest
		}
		name, err := l.Blob(digest)
		if err != nil {
			http.NotFound(w, r)
			return
		}
		http.ServeFile(w, r, name)
	}))
	t.Cleanup(server.Close)
	p, err := netmodel.Start(server.URL, netmodel.Model{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

// many are layers of which each changes what the one before has made.
func many(t *testing.T) [][]byte {
	return [][]byte{
		layer(t, "a", "d/", "d/x"),
		layer(t, "d/", "d/.wh.x", "d/y"),
		layer(t, "d/", "d/x", "b"),
		layer(t, ".wh.a", "d/", "d/.wh.y"),
	}
}

func TestStart(t *testing.T) {
	layers := many(t)
	p := serve(t, layers...)
	want := tree(t, layer(t, "d/", "d/x", "b"))
	for _, o := range []Options{{}, {Parallel: 3}, {Stream: true}, {Parallel: 3, Stream: true}} {
		p.Reset()
		o.Registry, o.Name, o.Dir = p.URL(), "img:1", t.TempDir()
		ran := ""
		o.Run = func(_ context.Context, rootfs string, c oci.Image) error {
			ran = c.Config.Cmd[0]
			same(t, rootfs, want)
			return nil
		}
		res, err := Start(t.Context(), o)
		if err != nil {
			t.Fatalf("%+v: %v", o, err)
		}
		if ran != "run" {
			t.Errorf("%+v: the config's command is %q", o, ran)
		}
		if res.Manifest <= 0 || res.Downloaded < res.Manifest || res.Unpacked < res.Downloaded || res.Total < res.Unpacked {
			t.Errorf("times are out of order: %+v", res)
		}
		var bytes int64
		for i, l := range res.Layers {
			bytes += l.Size
			if l.Digest != oci.Digest(layers[i]) || l.Downloaded <= 0 || l.Unpacked < l.Unpacking || l.Unpacking <= 0 {
				t.Errorf("layer %d: %+v", i, l)
			}
		}
		if bytes >= res.Bytes {
			t.Errorf("%d bytes, layers alone are %d", res.Bytes, bytes)
		}
	}
}

func TestStartRefusesWhatIsNotTheImage(t *testing.T) {
	layers := many(t)
	p := serve(t, layers...)
	victim := "/v2/img/blobs/" + oci.Digest(layers[2])
	for name, f := range map[string]netmodel.Fault{
		"flip":     {Flip: []int64{20}},
		"truncate": {Truncate: true, After: 20},
		"status":   {Status: http.StatusServiceUnavailable},
	} {
		for _, stream := range []bool{false, true} {
			p.SetFaults(func(r *http.Request) *netmodel.Fault {
				if r.URL.Path == victim {
					return &f
				}
				return nil
			})
			o := Options{Registry: p.URL(), Name: "img:1", Dir: t.TempDir(), Parallel: 2, Stream: stream}
			o.Run = func(context.Context, string, oci.Image) error {
				t.Errorf("%s: the container runs", name)
				return nil
			}
			if _, err := Start(t.Context(), o); err == nil {
				t.Errorf("%s, stream %v: no error", name, stream)
			}
		}
	}
}

func TestStartErrors(t *testing.T) {
	p := serve(t, many(t)...)
	for _, name := range []string{"img", "img:2", "other:1"} {
		if _, err := Start(t.Context(), Options{Registry: p.URL(), Name: name, Dir: t.TempDir()}); err == nil {
			t.Errorf("%s is started", name)
		}
	}
	boom := errors.New("boom")
	_, err := Start(t.Context(), Options{Registry: p.URL(), Name: "img:1", Dir: t.TempDir(),
		Run: func(context.Context, string, oci.Image) error { return boom }})
	if !errors.Is(err, boom) {
		t.Errorf("error %v, want that of Run", err)
	}
}

func TestStartEndsWithItsContext(t *testing.T) {
	p := serve(t, many(t)...)
	ctx, cancel := context.WithCancel(t.Context())
	p.SetFaults(func(r *http.Request) *netmodel.Fault {
		if strings.Contains(r.URL.Path, "sha256") {
			cancel()
			return &netmodel.Fault{Stall: time.Hour}
		}
		return nil
	})
	for _, stream := range []bool{false, true} {
		if _, err := Start(ctx, Options{Registry: p.URL(), Name: "img:1", Dir: t.TempDir(), Stream: stream}); !errors.Is(err, context.Canceled) {
			t.Errorf("error %v, want that it was cancelled", err)
		}
	}
}
