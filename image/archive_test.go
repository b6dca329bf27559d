package image_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/blobtest"
	"github.com/shale-image/shale/image"
)

// tarEntry is a file of a test archive, or a link if it has one.
type tarEntry struct {
	name, link string
	kind       byte
	data       []byte
}

func writeTar(t testing.TB, entries ...tarEntry) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "archive.tar")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := tar.NewWriter(f)
	for _, e := range entries {
		if err := w.WriteHeader(&tar.Header{Name: e.name, Typeflag: e.kind, Linkname: e.link, Size: int64(len(e.data)), Mode: 0o644}); err != nil {
			t.Fatal(err)
		}
		w.Write(e.data)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return name
}

// packLayout makes an oci-archive of a layout.
func packLayout(t testing.TB, dir string) string {
	t.Helper()
	var entries []tarEntry
	err := fs.WalkDir(os.DirFS(dir), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		p, err := os.ReadFile(filepath.Join(dir, name))
		entries = append(entries, tarEntry{name: "./" + name, data: p})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return writeTar(t, entries...)
}

func readLayer(t testing.TB, repo *image.Repository, d image.Descriptor) []byte {
	t.Helper()
	rc, err := repo.Blob(t.Context(), d)
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	p, err := io.ReadAll(rc)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestArchiveIsSource(t *testing.T) {
	blobtest.Run(t, func(contents map[string][]byte) blob.Source {
		var entries []tarEntry
		for digest, p := range contents {
			entries = append(entries, tarEntry{name: "blobs/sha256/" + strings.TrimPrefix(digest, "sha256:"), data: p})
		}
		return open(t, "oci-archive:"+writeTar(t, entries...), image.Options{}).Blobs()
	})
}

func TestOCIArchive(t *testing.T) {
	dir := t.TempDir()
	layout := open(t, "oci:"+dir+":v1", image.Options{})
	layer := pushBlob(t, layout, "application/vnd.oci.image.layer.v1.tar", []byte("a layer"))
	config := pushBlob(t, layout, image.MediaTypeConfig, []byte(`{"os":"linux","architecture":"amd64","rootfs":{"diff_ids":["`+layer.Digest+`"]}}`))
	m := fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"config":%s,"layers":[%s]}`, image.MediaTypeManifest, marshal(t, config), marshal(t, layer))
	want, err := layout.PushManifest(t.Context(), image.MediaTypeManifest, m, "v1")
	if err != nil {
		t.Fatal(err)
	}
	file := packLayout(t, dir)
	for _, ref := range []string{"oci-archive:" + file, "oci-archive:" + file + ":v1", "oci-archive:" + file + "@" + want.Digest, "oci-archive:" + squeeze(t, file)} {
		repo := open(t, ref, image.Options{})
		if got := repo.Ref().String(); got != ref {
			t.Errorf("%s is written as %s", ref, got)
		}
		img, err := repo.Resolve(t.Context(), image.Platform{OS: "linux", Architecture: "amd64"})
		if err != nil || img.ManifestDigest != want.Digest {
			t.Fatalf("%s: %v, %v", ref, img, err)
		}
		if p := readLayer(t, repo, img.Layers[0]); string(p) != "a layer" {
			t.Errorf("%s: layer is %q", ref, p)
		}
		if err := repo.PushBlob(t.Context(), layer, opener([]byte("a layer"))); err == nil || repo.Ref().Writable() {
			t.Errorf("%s: something was pushed", ref)
		}
	}
	if _, err := open(t, "oci-archive:"+file+":v2", image.Options{}).Resolve(t.Context(), image.Platform{}); !errors.Is(err, blob.ErrNotFound) {
		t.Errorf("another tag: %v", err)
	}
	if _, err := open(t, "oci-archive:/nowhere", image.Options{}).Resolve(t.Context(), image.Platform{}); !errors.Is(err, blob.ErrNotFound) {
		t.Errorf("no file: %v", err)
	}
}

func marshal(t testing.TB, v any) []byte {
	t.Helper()
	p, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// squeeze compresses a file.
func squeeze(t testing.TB, file string) string {
	t.Helper()
	p, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	w.Write(p)
	w.Close()
	if err := os.WriteFile(file+".gz", b.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	return file + ".gz"
}

// TestDockerArchive has the three forms that docker save has had: layers by id
// with a link for one that is there twice, layers by digest, and these
// compressed.
func TestDockerArchive(t *testing.T) {
	one, two := []byte("layer one"), []byte("layer two")
	hex := func(p []byte) string { return strings.TrimPrefix(blobtest.Ref(p).Digest, "sha256:") }
	config := fmt.Appendf(nil, `{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":["sha256:%s","sha256:%s","sha256:%s"]}}`, hex(one), hex(two), hex(one))
	manifest := func(config string, layers ...string) []byte {
		return marshal(t, []map[string]any{{"Config": config, "RepoTags": []string{"registry.example/app:v1"}, "Layers": layers}})
	}
	var zipped bytes.Buffer
	w := gzip.NewWriter(&zipped)
	w.Write(two)
	w.Close()
	for name, file := range map[string]string{
		"by id": writeTar(t,
			tarEntry{name: "aaa/layer.tar", data: one}, tarEntry{name: "bbb/layer.tar", data: two},
			tarEntry{name: "ccc/layer.tar", kind: tar.TypeSymlink, link: "../aaa/layer.tar"},
			tarEntry{name: "c.json", data: config},
			tarEntry{name: "manifest.json", data: manifest("c.json", "aaa/layer.tar", "bbb/layer.tar", "ccc/layer.tar")}),
		"by digest": writeTar(t,
			tarEntry{name: "blobs/sha256/" + hex(one), data: one}, tarEntry{name: "blobs/sha256/" + hex(two), data: two},
			tarEntry{name: "blobs/sha256/" + hex(config), data: config},
			tarEntry{name: "manifest.json", data: manifest("blobs/sha256/"+hex(config), "blobs/sha256/"+hex(one), "blobs/sha256/"+hex(two), "blobs/sha256/"+hex(one))}),
		"compressed": writeTar(t,
			tarEntry{name: "1.tar", data: one}, tarEntry{name: "blobs/sha256/" + hex(zipped.Bytes()), data: zipped.Bytes()},
			tarEntry{name: "c.json", data: config},
			tarEntry{name: "manifest.json", data: manifest("c.json", "1.tar", "blobs/sha256/"+hex(zipped.Bytes()), "1.tar")}),
	} {
		t.Run(name, func(t *testing.T) {
			for _, ref := range []string{"docker-archive:" + file, "docker-archive:" + file + ":v1", "docker-archive:" + squeeze(t, file)} {
				repo := open(t, ref, image.Options{})
				img, err := repo.Resolve(t.Context(), image.Platform{OS: "linux", Architecture: "amd64"})
				if err != nil {
					t.Fatal(err)
				}
				want := two
				if name == "compressed" {
					want = zipped.Bytes()
				}
				if !bytes.Equal(readLayer(t, repo, img.Layers[0]), one) || !bytes.Equal(readLayer(t, repo, img.Layers[1]), want) || !bytes.Equal(readLayer(t, repo, img.Layers[2]), one) {
					t.Errorf("%s: wrong layers", ref)
				}
				if _, err := repo.At(img.ManifestDigest).Resolve(t.Context(), image.Platform{OS: "linux", Architecture: "amd64"}); err != nil {
					t.Errorf("by digest: %v", err)
				}
			}
			if _, err := open(t, "docker-archive:"+file+":v2", image.Options{}).Resolve(t.Context(), image.Platform{}); !errors.Is(err, blob.ErrNotFound) || !strings.Contains(err.Error(), "app:v1") {
				t.Errorf("another tag: %v", err)
			}
		})
	}
}

func TestArchiveLimits(t *testing.T) {
	dir := t.TempDir()
	layout := open(t, "oci:"+dir+":v1", image.Options{})
	pushImage(t, layout, "v1", "amd64")
	docker := writeTar(t, tarEntry{name: "manifest.json", data: []byte(`[{"Config":"c","RepoTags":["app:v1"]}]`)}, tarEntry{name: "c", data: make([]byte, 200)})
	for _, test := range []struct {
		ref  string
		opts image.Options
		is   string
	}{
		{"oci-archive:" + packLayout(t, dir), image.Options{ManifestLimit: 100}, "of more than 100 bytes (ManifestBytes)"},
		{"docker-archive:" + docker, image.Options{ManifestLimit: 10}, "of more than 10 bytes (ManifestBytes)"},
		{"docker-archive:" + docker, image.Options{ConfigLimit: 100}, "of more than 100 bytes"},
	} {
		_, err := open(t, test.ref, test.opts).Resolve(t.Context(), linux("amd64"))
		if !errors.Is(err, image.ErrLimit) || !strings.HasSuffix(err.Error(), test.is) {
			t.Errorf("%s: %v, want %q", test.ref, err, test.is)
		}
	}
}

// TestHostileArchive has archives that lie; none may make the reader read what
// it should not, or take it down.
func TestHostileArchive(t *testing.T) {
	config := []byte(`{"os":"linux","architecture":"amd64","rootfs":{"diff_ids":["sha256:` + strings.Repeat("a", 64) + `"]}}`)
	list := []byte(`[{"Config":"c","Layers":["l"]}]`)
	for name, test := range map[string]struct {
		entries []tarEntry
		is      error
	}{
		"no manifest":    {[]tarEntry{{name: "c", data: config}}, blob.ErrNotFound},
		"no JSON":        {[]tarEntry{{name: "manifest.json", data: []byte("[")}}, image.ErrCorrupt},
		"no config":      {[]tarEntry{{name: "manifest.json", data: list}}, blob.ErrNotFound},
		"no layer":       {[]tarEntry{{name: "manifest.json", data: list}, {name: "c", data: config}}, blob.ErrNotFound},
		"link to itself": {[]tarEntry{{name: "manifest.json", data: list}, {name: "c", data: config}, {name: "l", kind: tar.TypeSymlink, link: "l"}}, blob.ErrNotFound},
		"link outside":   {[]tarEntry{{name: "manifest.json", data: list}, {name: "c", data: config}, {name: "l", kind: tar.TypeSymlink, link: "../../../etc/passwd"}}, blob.ErrNotFound},
		"diff_ids":       {[]tarEntry{{name: "manifest.json", data: []byte(`[{"Config":"c"}]`)}, {name: "c", data: config}}, image.ErrCorrupt},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := open(t, "docker-archive:"+writeTar(t, test.entries...), image.Options{}).Resolve(t.Context(), image.Platform{}); !errors.Is(err, test.is) {
				t.Errorf("got error %v, want %v", err, test.is)
			}
		})
	}
	file := writeTar(t, tarEntry{name: "manifest.json", data: list}, tarEntry{name: "c", data: config}, tarEntry{name: "l", data: []byte("not what the digest says")})
	repo := open(t, "docker-archive:"+file, image.Options{})
	img, err := repo.Resolve(t.Context(), image.Platform{OS: "linux", Architecture: "amd64"})
	if err != nil {
		t.Fatal(err)
	}
	rc, err := repo.Blob(t.Context(), img.Layers[0])
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	if _, err := io.ReadAll(rc); !errors.Is(err, image.ErrCorrupt) {
		t.Errorf("a layer that is not what its digest says: %v", err)
	}
	fi, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, fi.Size()-3000); err != nil {
		t.Fatal(err)
	}
	if _, err := open(t, "docker-archive:"+file, image.Options{}).Resolve(t.Context(), image.Platform{}); !errors.Is(err, image.ErrCorrupt) && !errors.Is(err, blob.ErrNotFound) {
		t.Errorf("a truncated archive: %v", err)
	}
}

// TestSkopeoArchives reads what skopeo writes of the Debian image.
func TestSkopeoArchives(t *testing.T) {
	if _, err := exec.LookPath("skopeo"); err != nil {
		t.Skip("skopeo is not installed")
	}
	dirs, _ := filepath.Glob("../build/images/python-*/index.json")
	if len(dirs) == 0 {
		t.Skip("no image of Debian with python3 in build/images: run `make demo` once")
	}
	from := "oci:" + filepath.Dir(dirs[0])
	want, err := open(t, from, image.Options{}).Resolve(t.Context(), image.Platform{})
	if err != nil {
		t.Fatal(err)
	}
	for _, to := range []string{"oci-archive:", "docker-archive:"} {
		file := filepath.Join(t.TempDir(), "archive")
		if out, err := exec.Command("skopeo", "--insecure-policy", "copy", from, to+file+":app:v1").CombinedOutput(); err != nil {
			t.Fatalf("skopeo: %v\n%s", err, out)
		}
		repo := open(t, to+file, image.Options{})
		img, err := repo.Resolve(t.Context(), image.Platform{})
		if err != nil {
			t.Fatal(err)
		}
		for i, l := range img.Layers {
			p := readLayer(t, repo, l)
			if to == "oci-archive:" && l.Digest != want.Layers[i].Digest || to == "docker-archive:" && l.Digest != want.Config.DiffIDs[i] || int64(len(p)) != l.Size {
				t.Errorf("%s: layer %d is %+v", to, i, l)
			}
		}
	}
}
