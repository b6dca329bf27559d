package debian

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/shale-image/shale/bench/oci"
)

var t0 = time.Unix(1600000000, 0)

func file(name, content string) (tar.Header, string) {
	return tar.Header{Typeflag: tar.TypeReg, Name: "./" + name, Mode: 0o644, ModTime: t0, Size: int64(len(content))}, content
}

func dir(name string) (tar.Header, string) {
	return tar.Header{Typeflag: tar.TypeDir, Name: "./" + name + "/", Mode: 0o755, ModTime: t0}, ""
}

func hardLink(name, target string) (tar.Header, string) {
	return tar.Header{Typeflag: tar.TypeLink, Name: "./" + name, Linkname: "./" + target, Mode: 0o644, ModTime: t0}, ""
}

func symlink(name, target string) (tar.Header, string) {
	return tar.Header{Typeflag: tar.TypeSymlink, Name: "./" + name, Linkname: target, Mode: 0o777, ModTime: t0}, ""
}

// archive builds a tar file as mmdebstrap writes it.
type archive struct {
	t   *testing.T
	buf bytes.Buffer
	w   *tar.Writer
}

func newArchive(t *testing.T) *archive {
	a := &archive{t: t}
	a.w = tar.NewWriter(&a.buf)
	return a.add(dir("."))
}

func (a *archive) add(h tar.Header, content string) *archive {
	a.t.Helper()
	h.Format = tar.FormatPAX
	if err := a.w.WriteHeader(&h); err != nil {
		a.t.Fatal(err)
	}
	if _, err := io.WriteString(a.w, content); err != nil {
		a.t.Fatal(err)
	}
	return a
}

func (a *archive) file() string {
	a.t.Helper()
	if err := a.w.Close(); err != nil {
		a.t.Fatal(err)
	}
	name := filepath.Join(a.t.TempDir(), "tar")
	if err := os.WriteFile(name, a.buf.Bytes(), 0o644); err != nil {
		a.t.Fatal(err)
	}
	return name
}

// layerOf writes the layer that leads from lower to upper, and returns it and
// what is in it.
func layerOf(t *testing.T, lower, upper *archive, start time.Time) (layer, []*tar.Header) {
	t.Helper()
	var below snapshot
	if lower != nil {
		lower.file()
		var err error
		if below, err = takeSnapshot(bytes.NewReader(lower.buf.Bytes())); err != nil {
			t.Fatal(err)
		}
	}
	out, err := oci.Create(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	l, err := writeLayer(out, upper.file(), below, start)
	if err != nil {
		t.Fatal(err)
	}
	blob, err := out.Blob(l.Digest)
	if err != nil {
		t.Fatal(err)
	}
	p, err := os.ReadFile(blob)
	if err != nil {
		t.Fatal(err)
	}
	if oci.Digest(p) != l.Digest || int64(len(p)) != l.Size {
		t.Errorf("blob is %s of %d bytes, the descriptor says %s of %d", oci.Digest(p), len(p), l.Digest, l.Size)
	}
	z, err := gzip.NewReader(bytes.NewReader(p))
	if err != nil {
		t.Fatal(err)
	}
	plain, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	if oci.Digest(plain) != l.diffID {
		t.Errorf("diff id is %s, want %s", l.diffID, oci.Digest(plain))
	}
	var headers []*tar.Header
	for tr := tar.NewReader(bytes.NewReader(plain)); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return l, headers
		} else if err != nil {
			t.Fatal(err)
		}
		headers = append(headers, h)
	}
}

func names(headers []*tar.Header) string {
	var out []string
	for _, h := range headers {
		out = append(out, h.Name)
	}
	return strings.Join(out, " ")
}

func TestLayerHasTheDifference(t *testing.T) {
	base := func() *archive { // d holds a file, a hard link, and a directory
		return newArchive(t).add(dir("d")).add(file("d/a", "1")).add(hardLink("d/b", "d/a")).
			add(dir("d/e")).add(file("d/e/f", "2")).add(dir("x"))
	}
	xattr, none := file("x/y", "")
	xattr.PAXRecords = map[string]string{"SCHILY.xattr.user.k": "v"}
	owned, _ := dir("x")
	owned.Uid = 7
	tests := []struct {
		name  string
		upper *archive
		want  string
	}{
		{"nothing", base(), ""},
		{"new file", base().add(file("x/y", "")), "x/ x/y"},
		{"xattr", base().add(xattr, none), "x/ x/y"},
		{"content of the same size", newArchive(t).add(dir("d")).add(file("d/a", "1")).add(hardLink("d/b", "d/a")).
			add(dir("d/e")).add(file("d/e/f", "3")).add(dir("x")), "d/ d/e/ d/e/f"},
		{"owner", newArchive(t).add(dir("d")).add(file("d/a", "1")).add(hardLink("d/b", "d/a")).
			add(dir("d/e")).add(file("d/e/f", "2")).add(owned, ""), "x/"},
		{"one more link: all links", base().add(hardLink("x/c", "d/a")), "d/ d/a d/b x/ x/c"},
		{"link gone", newArchive(t).add(dir("d")).add(file("d/a", "1")).
			add(dir("d/e")).add(file("d/e/f", "2")).add(dir("x")), "d/ d/.wh.b"},
		{"directory gone: one whiteout", newArchive(t).add(dir("d")).add(file("d/a", "1")).add(hardLink("d/b", "d/a")).
			add(dir("x")), "d/ d/.wh.e"},
		{"directory becomes a link", newArchive(t).add(dir("d")).add(file("d/a", "1")).add(hardLink("d/b", "d/a")).
			add(symlink("d/e", "a")).add(dir("x")), "d/ d/e"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, got := layerOf(t, base(), tt.upper, time.Now())
			if names(got) != tt.want {
				t.Errorf("layer has %q, want %q", names(got), tt.want)
			}
		})
	}
}

func TestLayerIsReproducible(t *testing.T) {
	pack := func(start time.Time) (layer, []*tar.Header) {
		a := newArchive(t)
		h, content := file("etc/hostname", start.String())
		a.add(dir("etc")).add(h, content)
		h, content = file("etc/made-now", "x")
		h.ModTime = start.Add(3 * time.Second)
		h.Uname = start.String()
		a.add(h, content)
		h, content = file("etc/packaged", "x")
		h.ModTime = time.Unix(1750000000, 500)
		a.add(h, content).add(file("dev/null", start.String()))
		return layerOf(t, nil, a, start)
	}
	first, headers := pack(time.Unix(1760000000, 0))
	second, _ := pack(time.Unix(1770000000, 0))
	if first.Digest != second.Digest {
		t.Errorf("digests differ: %s and %s", first.Digest, second.Digest)
	}
	if want := "etc/ etc/made-now etc/packaged"; names(headers) != want {
		t.Errorf("layer has %q, want %q", names(headers), want)
	}
	for _, h := range headers[1:] {
		if want := time.Unix(1750000000, 500); !h.ModTime.Equal(want) {
			t.Errorf("%s has time %v, want the newest of a package, %v", h.Name, h.ModTime, want)
		}
	}
}

func TestKeys(t *testing.T) {
	seen := map[string]string{}
	changed := Python
	changed.Env = slices.Concat(Python.Env, []string{"A=b"})
	all := append([]Recipe{python3, tools, changed}, Images...)
	for i, r := range all {
		for _, c := range []Compression{Gzip, Zstd, ZstdFrames} {
			for _, arch := range []string{"amd64", "arm64"} {
				name := fmt.Sprint(i, r.Name, c, arch)
				key := r.With(c).key(arch)
				if other, ok := seen[key]; ok {
					t.Errorf("%s and %s have the same key %s", name, other, key)
				}
				seen[key] = name
			}
		}
	}
	// Keys of images that are kept on machines; see version.
	for key, r := range map[string]Recipe{"base-765a017a4415": Base, "python-f286d0a73928": Python} {
		if got := r.key("amd64"); got != key {
			t.Errorf("key of %s is %s, want %s", r.Name, got, key)
		}
	}
}
