package convert

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/convert/source"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/reader"
)

// TestDict converts an image with the chunks of another.
func TestDict(t *testing.T) {
	known := archive(t, file{name: "a", data: text(1, 5*chunk.Size/2)}, file{name: "b", data: text(2, 5*chunk.Size/2)}, file{name: "z", data: strings.Repeat("\x00", 100000)})
	base := target(t)
	first := mustConvert(t, makeImage(t, gz(known)), base, Options{})
	dict, err := OpenDict(t.Context(), base, amd64)
	if err != nil {
		t.Fatal(err)
	}
	src := makeImage(t, gz(archive(t, file{name: "x", data: text(3, 3*chunk.Size/2)}, file{name: "y", data: text(1, 5*chunk.Size/2)}, file{name: "hole", data: strings.Repeat("\x00", 1<<20)})))
	var digest string
	for _, workers := range []int{1, 3} {
		dst := target(t)
		res := mustConvert(t, src, dst, Options{Dict: dict, Workers: workers})
		if res.DictChunks != 3 || res.Chunks != 5 || len(res.Blobs) != 3 || res.Blobs[0].Digest != first.Blobs[0].Digest {
			t.Errorf("%+v", res)
		}
		if digest == "" {
			digest = res.ManifestDigest
		}
		if res.ManifestDigest != digest {
			t.Errorf("%d workers: %s, want %s", workers, res.ManifestDigest, digest)
		}
		tr := tree(t, dst)
		plain := target(t)
		mustConvert(t, src, plain, Options{})
		if err := index.Equal(tree(t, plain), tr); err != nil {
			t.Error(err)
		}
		if os.Geteuid() == 0 {
			same(t, exported(t, plain), exported(t, dst))
		}
	}

	t.Run("all known", func(t *testing.T) {
		dst := target(t)
		res := mustConvert(t, makeImage(t, gz(known)), dst, Options{Dict: dict})
		if len(res.Blobs) != 2 || res.DictChunks != res.Chunks {
			t.Errorf("%+v", res)
		}
	})
	t.Run("none known", func(t *testing.T) {
		res := mustConvert(t, makeImage(t, gz(archive(t, file{name: "f", data: "f"}))), target(t), Options{Dict: dict})
		if len(res.Blobs) != 2 || res.DictChunks != 0 {
			t.Errorf("%+v", res)
		}
	})
	t.Run("chunk size", func(t *testing.T) {
		fails(t, src, Options{Dict: dict, ChunkSize: chunk.Size * 2}, index.ErrUnsupported, "dictionary oci:")
	})
	t.Run("not converted", func(t *testing.T) {
		if _, err := OpenDict(t.Context(), src, amd64); !errors.Is(err, reader.ErrNoIndex) {
			t.Error(err)
		}
	})
	t.Run("damaged", func(t *testing.T) {
		// A dictionary whose blob is not what it says: found before the push.
		name := filepath.Join(base.Ref().Dir(), "blobs/sha256", strings.TrimPrefix(first.Blobs[0].Digest, "sha256:"))
		p, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		p[100] ^= 1
		if err := os.WriteFile(name, p, 0o644); err != nil {
			t.Fatal(err)
		}
		fails(t, src, Options{Dict: dict}, chunk.ErrCorrupt, first.Blobs[0].Digest)
	})
}

func TestPrefetch(t *testing.T) {
	src := makeImage(t, gz(archive(t, file{name: "d/"}, file{name: "d/f", data: "f"}, file{name: "z", data: strings.Repeat("\x00", 100000)})))
	dst := target(t)
	mustConvert(t, src, dst, Options{Prefetch: []string{"/d", "d/f", "z"}})
	img, err := dst.ResolveManifest(t.Context(), amd64)
	if err != nil {
		t.Fatal(err)
	}
	im, _, err := reader.RAFS(t.Context(), dst, img, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if p := im.Prefetch(); len(p) != 3 || p[0] == p[1] || p[1] == p[2] || p[0] == 0 {
		t.Errorf("prefetch table %v", p)
	}
}

// TestPlatforms converts an index with images for three platforms, one whose
// variant only the index tells, and an attestation.
func TestPlatforms(t *testing.T) {
	repo := open(t, "oci:"+t.TempDir()+":all")
	type entry struct {
		image.Descriptor
		Platform image.Platform `json:"platform"`
	}
	var entries []entry
	want := []image.Platform{{OS: "linux", Architecture: "amd64"}, {OS: "linux", Architecture: "arm64", Variant: "v8"}, {OS: "linux", Architecture: "arm", Variant: "v5"}}
	for i, p := range append(want, image.Platform{OS: "unknown", Architecture: "unknown"}) {
		d := pushImage(t, repo, "", image.Platform{OS: p.OS, Architecture: p.Architecture}, gz(archive(t, file{name: p.Architecture, data: text(i, 1000)})))
		entries = append(entries, entry{d, p})
	}
	js, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": image.MediaTypeIndex, "manifests": entries})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := repo.PushManifest(t.Context(), image.MediaTypeIndex, js, "all"); err != nil {
		t.Fatal(err)
	}
	all, err := source.Platforms(t.Context(), repo)
	if err != nil {
		t.Fatal(err)
	}
	dst := target(t)
	var said []string
	res, err := Images(t.Context(), all, dst, Options{Workers: 1, Progress: func(e Event) {
		if !slices.Contains(said, e.Platform) {
			said = append(said, e.Platform)
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	if len(res.Platforms) != 3 || len(said) != 3 {
		t.Errorf("%d results, progress of %q", len(res.Platforms), said)
	}
	for _, p := range want {
		img, err := dst.ResolveManifest(t.Context(), p)
		if err != nil {
			t.Fatal(err)
		}
		tr, err := reader.Tree(t.Context(), dst, img, t.TempDir())
		if err != nil || !slices.Equal(tr.Root.Names(), []string{p.Architecture}) {
			t.Errorf("%v: %v, %v", p, tr, err)
		}
	}
	if m, err := dst.Manifest(t.Context(), ""); err != nil || m.Digest != res.ManifestDigest || m.MediaType != image.MediaTypeIndex {
		t.Errorf("%+v, %v", m, err)
	}
	// An image that is no index is an index of one, whatever its platform.
	one, err := source.Platforms(t.Context(), repo.At(entries[1].Digest))
	if err != nil || len(one) != 1 || one[0].Platform.Architecture != "arm64" {
		t.Errorf("%v, %v", one, err)
	}
}
