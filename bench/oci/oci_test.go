package oci

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// newLayout makes a layout with one layer.
func newLayout(t *testing.T, layer string) (Layout, Descriptor) {
	t.Helper()
	l, err := Create(filepath.Join(t.TempDir(), "image"))
	if err != nil {
		t.Fatal(err)
	}
	d := Descriptor{MediaType: TypeGzip, Digest: Digest([]byte(layer)), Size: int64(len(layer))}
	name, err := l.Blob(d.Digest)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(layer), 0o644); err != nil {
		t.Fatal(err)
	}
	config := Image{Architecture: "amd64", OS: "linux", Config: Process{Cmd: []string{"true"}},
		RootFS: RootFS{Type: "layers", DiffIDs: []string{d.Digest}}}
	if err := l.Finish(config, []Descriptor{d}); err != nil {
		t.Fatal(err)
	}
	return l, d
}

func TestRoundTrip(t *testing.T) {
	l, d := newLayout(t, "content")
	m, desc, err := l.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	if len(m.Layers) != 1 || m.Layers[0] != d {
		t.Errorf("layers %v, want %v", m.Layers, d)
	}
	if desc.Platform == nil || desc.Platform.Architecture != "amd64" || desc.MediaType != TypeManifest {
		t.Errorf("descriptor %+v", desc)
	}
	c, err := l.Config(m)
	if err != nil || len(c.Config.Cmd) != 1 || c.Config.Cmd[0] != "true" || c.RootFS.DiffIDs[0] != d.Digest {
		t.Errorf("config %+v, %v", c, err)
	}
}

func TestChangedDocumentIsRefused(t *testing.T) {
	l, _ := newLayout(t, "content")
	_, desc, err := l.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	name, err := l.Blob(desc.Digest)
	if err != nil {
		t.Fatal(err)
	}
	p, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, append(p, ' '), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, _, err := l.Manifest(); err == nil || !strings.Contains(err.Error(), desc.Digest) {
		t.Errorf("error %v, want one that names %s", err, desc.Digest)
	}
}

func TestBlobRefusesOtherNames(t *testing.T) {
	good := strings.Repeat("a", 64)
	for _, digest := range []string{
		"", good, "sha512:" + good, "sha256:", "sha256:" + good[1:], "sha256:../../" + good[6:],
		"sha256:" + strings.ToUpper(good),
	} {
		if name, err := Layout("x").Blob(digest); err == nil {
			t.Errorf("%q gives %s", digest, name)
		}
	}
	if _, err := Layout("x").Blob("sha256:" + good); err != nil {
		t.Error(err)
	}
}

func TestReadDocumentIsBounded(t *testing.T) {
	if p, err := ReadDocument(bytes.NewReader(make([]byte, maxDocument))); err != nil || len(p) != maxDocument {
		t.Errorf("%d bytes, %v", len(p), err)
	}
	if _, err := ReadDocument(bytes.NewReader(make([]byte, maxDocument+1))); err == nil {
		t.Error("a document over the limit is read")
	}
}
