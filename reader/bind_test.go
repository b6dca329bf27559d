package reader

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"log"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/registry"

	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
)

func openAt(t *testing.T, name string) *image.Repository {
	t.Helper()
	ref, err := image.ParseRef(name)
	if err != nil {
		t.Fatal(err)
	}
	repo, err := image.Open(t.Context(), ref, image.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { repo.Close() })
	return repo
}

// TestBind: what is bound is believed where only that is, wherever it was pushed, and is
// the same image.
func TestBind(t *testing.T) {
	r := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(r.Close)
	host, layout := strings.TrimPrefix(r.URL, "http://"), "oci:"+t.TempDir()+"/layout:"
	signer, keys := newKey(t)
	for _, c := range []struct{ from, to string }{
		{layout + "app", layout + "bound"},
		{layout + "app", "oci:" + t.TempDir() + "/another:bound"},
		{host + "/app:app", host + "/app:bound"},
		{host + "/app:app", host + "/another:bound"},
		{host + "/app:app", layout + "from-registry"},
	} {
		s := store(t, c.from, false)
		to := openAt(t, c.to)
		digest, artifact, err := Bind(t.Context(), s.repo, s.img, to, s.made, signer)
		if err != nil {
			t.Fatalf("%+v: %v", c, err)
		}
		if again, same, err := Bind(t.Context(), s.repo, s.img, to, s.made, signer); err != nil || again != digest || same != artifact {
			t.Errorf("%+v: again: %s, %s, %v", c, again, same, err)
		}
		img, err := to.Resolve(t.Context(), image.Platform{OS: "linux", Architecture: "amd64"})
		if err != nil {
			t.Fatalf("%+v: %v", c, err)
		}
		if img.ManifestDigest != digest || digest == s.img.ManifestDigest || !bytes.Equal(img.ConfigBytes, s.img.ConfigBytes) || img.Layers[0].Digest != s.img.Layers[0].Digest {
			t.Errorf("%+v: bound as %+v", c, img)
		}
		raw, err := Fetch(t.Context(), to, img, Options{TempDir: t.TempDir(), Trust: Bound})
		if err != nil {
			t.Fatalf("%+v: %v", c, err)
		}
		tree, err := raw.Tree()
		if err == nil {
			err = index.Equal(s.made.Tree, tree)
		}
		if raw.Trust != Bound || err != nil {
			t.Errorf("%+v: %s, %v", c, raw.Trust, err)
		}
		raw.Close()
		// The signature is of the manifest that was made, and the image of before has none.
		a, err := to.Artifact(t.Context(), image.Descriptor{MediaType: image.MediaTypeManifest, Digest: artifact, Size: sizeOf(t, to, artifact)}, digest)
		if err != nil {
			t.Fatal(err)
		}
		if key, err := keys.Verify(statement(digest, a.Layers), a.Annotations); err != nil || key != signer.ID() {
			t.Errorf("%+v: signed by %q, %v", c, key, err)
		}
		if _, err := Fetch(t.Context(), s.repo, s.img, Options{TempDir: t.TempDir()}); !errors.Is(err, ErrNoIndex) {
			t.Errorf("%+v: the image of before has changed: %v", c, err)
		}
	}
}

func sizeOf(t *testing.T, repo *image.Repository, digest string) int64 {
	t.Helper()
	m, err := repo.Manifest(t.Context(), digest)
	if err != nil {
		t.Fatal(err)
	}
	return int64(len(m.Bytes))
}

// TestBoundManifest: all that a manifest has stays, under the names that OCI has for it.
func TestBoundManifest(t *testing.T) {
	const config = `{"digest":"sha256:c","mediaType":"KIND","size":12345678901234567}`
	layer := func(kind string) string {
		return `{"mediaType":"` + kind + `","digest":"sha256:l","size":7,"annotations":{"a":"b"}}`
	}
	for _, c := range []struct{ what, kind, in, want string }{
		{"OCI", image.MediaTypeManifest, `{"schemaVersion":2,"config":` + strings.Replace(config, "KIND", image.MediaTypeConfig, 1) + `,"layers":[` + layer("x") + `],"subject":{"x":1},"annotations":{"k":"v"}}`,
			`{"annotations":{"io.github.shale-image.index":"sha256:i","k":"v"},"config":` + strings.Replace(config, "KIND", image.MediaTypeConfig, 1) +
				`,"layers":[{"annotations":{"a":"b"},"digest":"sha256:l","mediaType":"x","size":7}],"mediaType":"` + image.MediaTypeManifest + `","schemaVersion":2,"subject":{"x":1}}`},
		{"Docker", image.MediaTypeDockerManifest, `{"mediaType":"` + image.MediaTypeDockerManifest + `","schemaVersion":2,"config":` + strings.Replace(config, "KIND", image.MediaTypeDockerConfig, 1) + `,"layers":[` + layer("application/vnd.docker.image.rootfs.diff.tar.gzip") + `]}`,
			`{"annotations":{"io.github.shale-image.index":"sha256:i"},"config":` + strings.Replace(config, "KIND", image.MediaTypeConfig, 1) +
				`,"layers":[{"annotations":{"a":"b"},"digest":"sha256:l","mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","size":7}],"mediaType":"` + image.MediaTypeManifest + `","schemaVersion":2}`},
		{"Docker, with a layer of its own kind", image.MediaTypeDockerManifest, `{"config":` + strings.Replace(config, "KIND", image.MediaTypeDockerConfig, 1) + `,"layers":[` + layer("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip") + `]}`, ""},
		{"annotations that are none", image.MediaTypeManifest, `{"config":{},"layers":[],"annotations":7}`, ""},
		{"a layer that is none", image.MediaTypeManifest, `{"config":{},"layers":[7]}`, ""},
		{"no config", image.MediaTypeManifest, `{"layers":[]}`, ""},
		{"no manifest", image.MediaTypeManifest, `[]`, ""},
	} {
		img := &image.Image{MediaType: c.kind, ManifestBytes: []byte(c.in), ManifestDigest: "sha256:m"}
		got, err := boundManifest(img, "sha256:i")
		if c.want == "" {
			if !errors.Is(err, index.ErrUnsupported) || !strings.Contains(err.Error(), "sha256:m") {
				t.Errorf("%s: %s, %v", c.what, got, err)
			}
			continue
		}
		if err != nil || string(got) != c.want || !json.Valid(got) {
			t.Errorf("%s: %s, %v, want %s", c.what, got, err, c.want)
		}
	}
}
