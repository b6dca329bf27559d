package image_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/image"
)

func TestLayoutConcurrentTags(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "layout")
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			// A Repository each, as in so many processes.
			ref, _ := image.ParseRef("oci:" + dir)
			repo, err := image.Open(t.Context(), ref, image.Options{})
			if err != nil {
				t.Error(err)
				return
			}
			defer repo.Close()
			p := fmt.Appendf(nil, `{"schemaVersion":2,"manifests":[],"annotations":{"i":"%d"}}`, i)
			if _, err := repo.PushManifest(t.Context(), image.MediaTypeIndex, p, fmt.Sprintf("tag%d", i)); err != nil {
				t.Error(err)
			}
			if err := repo.PushBlob(t.Context(), desc("", []byte("the same")), opener([]byte("the same"))); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	repo := open(t, "oci:"+dir, image.Options{})
	for i := range 16 {
		m, err := repo.Manifest(t.Context(), fmt.Sprintf("tag%d", i))
		if err != nil || !strings.Contains(string(m.Bytes), fmt.Sprintf(`"%d"`, i)) {
			t.Errorf("tag%d: %s, %v", i, m.Bytes, err)
		}
	}
	filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		if name := filepath.Base(path); err != nil || strings.HasPrefix(name, ".") {
			t.Errorf("left behind: %s, %v", path, err)
		}
		return nil
	})
	if p, err := os.ReadFile(filepath.Join(dir, "oci-layout")); string(p) != `{"imageLayoutVersion":"1.0.0"}` {
		t.Errorf("%s, %v", p, err)
	}
	_, err := repo.Manifest(t.Context(), "tag99")
	if !errors.Is(err, blob.ErrNotFound) || !strings.Contains(err.Error(), "tag7") {
		t.Errorf("a missing tag: %v", err)
	}
}

// TestLayoutOfOthers: fields and entries that are not ours stay, and so does
// what a process that died has left.
func TestLayoutOfOthers(t *testing.T) {
	dir := t.TempDir()
	other := `{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"` + someDigest + `","size":7,"annotations":{"org.opencontainers.image.ref.name":"docker.io/library/debian:12"},"x":{"y":1}}`
	index := `{"schemaVersion":2,"manifests":[` + other + `],"z":[1,2]}`
	for name, text := range map[string]string{"index.json": index, ".index.json.new": "half of a li"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	repo := open(t, "oci:"+dir, image.Options{})
	for range 2 {
		pushManifest(t, repo, image.MediaTypeIndex, "mine", object{"schemaVersion": 2, "manifests": []int{}})
	}
	p, err := os.ReadFile(filepath.Join(dir, "index.json"))
	var got struct {
		Manifests []json.RawMessage
		Z         []int
	}
	if err != nil || json.Unmarshal(p, &got) != nil || len(got.Manifests) != 2 || string(got.Manifests[0]) != other || len(got.Z) != 2 {
		t.Errorf("%s, %v", p, err)
	}
	if _, err := repo.Manifest(t.Context(), "12"); !errors.Is(err, blob.ErrNotFound) || !strings.Contains(err.Error(), someDigest) {
		t.Errorf("the entry of a tool that writes whole references: %v", err)
	}
	// Without a tag: the only entry, else latest.
	if _, err := repo.Manifest(t.Context(), ""); !errors.Is(err, blob.ErrNotFound) || !strings.Contains(err.Error(), `"latest"`) {
		t.Errorf("%v", err)
	}
}

func TestLayoutUntagged(t *testing.T) {
	repo := open(t, "oci:"+t.TempDir(), image.Options{})
	if _, err := repo.Resolve(t.Context(), linux("amd64")); !errors.Is(err, blob.ErrNotFound) {
		t.Errorf("an empty layout: %v", err)
	}
	want := pushImage(t, repo, repo.Ref().Tag(), "amd64")
	if img, err := repo.Resolve(t.Context(), linux("amd64")); err != nil || img.ManifestDigest != want.Digest {
		t.Errorf("%v", err)
	}
}

func TestLayoutHostile(t *testing.T) {
	outside := filepath.Join(t.TempDir(), "outside")
	if err := os.WriteFile(outside, []byte(`{"schemaVersion":2,"manifests":[]}`), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		make func(path string) error
		err  error
	}{
		{"link", func(p string) error { return os.Symlink(outside, p) }, nil},
		{"directory", func(p string) error { return os.Mkdir(p, 0o755) }, blob.ErrNotFound},
		{"huge", func(p string) error {
			return errors.Join(os.WriteFile(p, nil, 0o644), os.Truncate(p, 1<<40))
		}, image.ErrLimit},
		{"garbage", func(p string) error { return os.WriteFile(p, []byte("{"), 0o644) }, image.ErrCorrupt},
		{"bad digest", func(p string) error {
			return os.WriteFile(p, []byte(`{"schemaVersion":2,"manifests":[{"digest":"sha256:../../../outside","size":1}]}`), 0o644)
		}, image.ErrCorrupt},
	} {
		dir := t.TempDir()
		if err := c.make(filepath.Join(dir, "index.json")); err != nil {
			t.Fatal(err)
		}
		repo := open(t, "oci:"+dir, image.Options{})
		if _, err := repo.Resolve(t.Context(), linux("amd64")); err == nil || c.err != nil && !errors.Is(err, c.err) {
			t.Errorf("%s: %v", c.name, err)
		}
		if _, err := repo.PushManifest(t.Context(), image.MediaTypeIndex, []byte(`{"schemaVersion":2,"manifests":[]}`), "x"); err == nil {
			t.Errorf("%s: a push goes on as if nothing were wrong", c.name)
		}
	}
	// A flipped bit in a blob of a layout.
	ref := "oci:" + t.TempDir() + ":v1"
	repo := open(t, ref, image.Options{})
	m := pushImage(t, repo, "v1", "amd64")
	path := filepath.Join(repo.Ref().Dir(), "blobs/sha256", strings.TrimPrefix(m.Digest, "sha256:"))
	p, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	p[len(p)-10] ^= 1
	if err := os.WriteFile(path, p, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := repo.Resolve(t.Context(), linux("amd64")); !errors.Is(err, image.ErrCorrupt) || !strings.Contains(err.Error(), m.Digest) {
		t.Errorf("%v", err)
	}
}

func TestLayoutCancel(t *testing.T) {
	dir := t.TempDir()
	repo := open(t, "oci:"+dir, image.Options{})
	ctx, cancel := context.WithCancel(t.Context())
	d := desc("", layers[1])
	err := repo.PushBlob(ctx, d, func() (io.ReadCloser, error) {
		cancel()
		return opener(layers[1])()
	})
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if files, _ := os.ReadDir(filepath.Join(dir, "blobs/sha256")); len(files) != 0 {
		t.Errorf("left behind: %v", files)
	}
}
