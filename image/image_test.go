package image_test

import (
	"bytes"
	"errors"
	"io"
	"reflect"
	"strings"
	"testing"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/image"
)

func TestPushAndResolve(t *testing.T) {
	everywhere(t, func(t *testing.T, ref string) {
		repo := open(t, ref+":v1", image.Options{})
		want := pushImage(t, repo, "v1", "amd64")
		img, err := repo.Resolve(t.Context(), linux("amd64"))
		if err != nil {
			t.Fatal(err)
		}
		if img.ManifestDigest != want.Digest || int64(len(img.ManifestBytes)) != want.Size || img.MediaType != image.MediaTypeManifest || img.Annotations["a"] != "b" {
			t.Errorf("manifest %s, expected %s", img.ManifestDigest, want.Digest)
		}
		if img.Platform != linux("amd64") || img.Ref.String() != ref+":v1" {
			t.Errorf("platform %v, ref %v", img.Platform, img.Ref)
		}
		c := img.Config
		c.Created = c.Created.UTC()
		if got := sprint(c); got != "{linux/amd64 2026-01-02 03:04:05 +0000 UTC 1000:1000 /work SIGINT [/init] [-v] [PATH=/bin A=amd64] map[l:v] [443/tcp 80/tcp] [] [sha256:"+strings.Repeat("ab", 32)+"]}" {
			t.Errorf("config %s", got)
		}
		if len(img.Layers) != 2 || img.Layers[0].MediaType != tarGzip {
			t.Fatalf("layers %v", img.Layers)
		}
		for i, l := range img.Layers {
			r, err := repo.Blob(t.Context(), l)
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(r)
			r.Close()
			if err != nil || !bytes.Equal(got, layers[i]) {
				t.Errorf("layer %d: wrong bytes, or %v", i, err)
			}
			p, err := blob.ReadAll(t.Context(), repo.Blobs(), l.Ref(), 3, 5)
			if err != nil || !bytes.Equal(p, layers[i][3:8]) {
				t.Errorf("layer %d: range: %q, %v", i, p, err)
			}
		}

		// By digest, with and without a tag; a wrong tag beside it does not matter.
		for _, s := range []string{ref + "@" + want.Digest, ref + ":other@" + want.Digest} {
			if img, err := open(t, s, image.Options{}).Resolve(t.Context(), linux("amd64")); err != nil || img.ManifestDigest != want.Digest {
				t.Errorf("%s: %v", s, err)
			}
		}
		// Moving a tag.
		moved := pushImage(t, repo, "v1", "arm64")
		if img, err := repo.Resolve(t.Context(), linux("arm64")); err != nil || img.ManifestDigest != moved.Digest {
			t.Errorf("a moved tag: %v", err)
		}
		for _, s := range []string{ref + ":none", ref + "@sha256:" + strings.Repeat("0", 64)} {
			_, err := open(t, s, image.Options{}).Resolve(t.Context(), linux("amd64"))
			if !errors.Is(err, blob.ErrNotFound) || !strings.Contains(err.Error(), s) {
				t.Errorf("%s: %v", s, err)
			}
		}
	})
}

func TestSecondPushSendsNothing(t *testing.T) {
	everywhere(t, func(t *testing.T, ref string) {
		rec := newRecorder(t)
		repo := open(t, ref+":v1", image.Options{Transport: rec})
		pushImage(t, repo, "v1", "amd64")
		rec.take()
		for _, l := range layers {
			d := desc(tarGzip, l)
			err := repo.PushBlob(t.Context(), d, func() (io.ReadCloser, error) {
				t.Error("a blob that is there was read again")
				return nil, io.EOF
			})
			if err != nil {
				t.Error(err)
			}
		}
		for _, req := range rec.take() {
			if !strings.HasPrefix(req, "HEAD ") {
				t.Errorf("a second push makes the request %s", req)
			}
		}
		pushBlob(t, repo, tarGzip, []byte("a new one"))
		if !strings.HasPrefix(ref, "oci:") {
			if n := len(rec.take()); n != 3 {
				t.Errorf("a new blob costs %d requests, expected 3", n)
			}
		}
	})
}

func TestPushVerifies(t *testing.T) {
	everywhere(t, func(t *testing.T, ref string) {
		repo := open(t, ref+":v1", image.Options{})
		for _, lie := range []string{"the wrong", "short", "something longer", ""} {
			d := desc(tarGzip, []byte("the right"))
			err := repo.PushBlob(t.Context(), d, opener([]byte(lie)))
			if !errors.Is(err, image.ErrCorrupt) || !strings.Contains(err.Error(), d.Digest) {
				t.Errorf("%q: %v", lie, err)
			}
			if _, err := blob.ReadAll(t.Context(), repo.Blobs(), d.Ref(), 0, d.Size); !errors.Is(err, blob.ErrNotFound) {
				t.Errorf("%q was stored: %v", lie, err)
			}
		}
		broken := errors.New("disk on fire")
		if err := repo.PushBlob(t.Context(), desc("", []byte("x")), func() (io.ReadCloser, error) { return nil, broken }); !errors.Is(err, broken) {
			t.Errorf("%v", err)
		}
		pushBlob(t, repo, tarGzip, nil) // the empty blob
		r, err := repo.Blob(t.Context(), desc("", nil))
		if err != nil {
			t.Fatal(err)
		}
		if p, err := io.ReadAll(r); len(p) != 0 || err != nil {
			t.Errorf("%q, %v", p, err)
		}
	})
}

func platform(os, arch, variant string, features ...string) object {
	return object{"os": os, "architecture": arch, "variant": variant, "os.features": features}
}

func entry(d image.Descriptor, p object) object {
	e := object{"mediaType": d.MediaType, "digest": d.Digest, "size": d.Size}
	if p != nil {
		e["platform"] = p
	}
	return e
}

func TestIndex(t *testing.T) {
	everywhere(t, func(t *testing.T, ref string) {
		repo := open(t, ref+":multi", image.Options{})
		push := func(tag string, entries ...object) image.Descriptor {
			return pushManifest(t, repo, image.MediaTypeIndex, tag, object{"schemaVersion": 2, "mediaType": image.MediaTypeIndex, "manifests": entries})
		}
		amd, arm64 := pushImage(t, repo, "", "amd64"), pushImage(t, repo, "", "arm64")
		m := manifest(t, repo, config("linux", "arm"))
		v6 := pushManifest(t, repo, image.MediaTypeManifest, "", m)
		m["annotations"] = object{"variant": "v7"}
		v7 := pushManifest(t, repo, image.MediaTypeManifest, "", m)
		m = manifest(t, repo, config("linux", "amd64"))
		m["annotations"] = object{"lazy": "yes"}
		lazy := pushManifest(t, repo, image.MediaTypeManifest, "", m)
		push("multi",
			entry(v6, platform("linux", "arm", "v6")), entry(v7, platform("linux", "arm", "v7")),
			entry(amd, platform("linux", "amd64", "")), entry(lazy, platform("linux", "amd64", "", "lazy.v1")),
			entry(arm64, platform("linux", "arm64", "v8")), entry(amd, platform("unknown", "unknown", "")))
		for _, c := range []struct {
			platform string
			want     image.Descriptor
		}{
			{"linux/amd64", amd}, {"amd64", amd}, {"linux/amd64/v3", amd}, {"linux/x86_64", amd}, {"arm64", arm64}, {"linux/arm64/v8", arm64},
			{"linux/arm64/v9", arm64}, {"linux/arm", v7}, {"linux/arm/v7", v7}, {"linux/arm/v6", v6}, {"linux/arm/v8", v7},
		} {
			p, err := image.ParsePlatform(c.platform)
			if err != nil {
				t.Fatal(err)
			}
			img, err := repo.Resolve(t.Context(), p)
			if err != nil || img.ManifestDigest != c.want.Digest {
				t.Errorf("%s: %v, or the wrong image", c.platform, err)
			}
		}
		_, err := repo.Resolve(t.Context(), linux("riscv64"))
		var pe *image.PlatformError
		if !errors.As(err, &pe) || !errors.Is(err, image.ErrPlatform) || len(pe.Available) < 4 || !strings.Contains(err.Error(), "linux/arm/v6") {
			t.Errorf("%v", err)
		}
		knows := open(t, ref+":multi", image.Options{Features: []string{"lazy.v1", "other"}})
		if img, err := knows.Resolve(t.Context(), linux("amd64")); err != nil || img.ManifestDigest != lazy.Digest {
			t.Errorf("with the feature: %v, or the wrong image", err)
		}

		nested := push("", entry(arm64, platform("linux", "arm64", "")))
		push("nested", entry(amd, platform("linux", "amd64", "")), entry(nested, nil))
		if img, err := open(t, ref+":nested", image.Options{}).Resolve(t.Context(), linux("arm64")); err != nil || img.ManifestDigest != arm64.Digest {
			t.Errorf("nested: %v", err)
		}
		deep := nested
		for range 5 {
			deep = push("", entry(deep, nil))
		}
		push("deep", entry(deep, nil))
		if _, err := open(t, ref+":deep", image.Options{}).Resolve(t.Context(), linux("arm64")); !errors.Is(err, image.ErrLimit) {
			t.Errorf("deep: %v", err)
		}
		push("bare", entry(amd, nil)) // one image that does not tell its platform
		if img, err := open(t, ref+":bare", image.Options{}).Resolve(t.Context(), linux("amd64")); err != nil || img.ManifestDigest != amd.Digest {
			t.Errorf("bare: %v", err)
		}
		if _, err := open(t, ref+":bare", image.Options{}).Resolve(t.Context(), linux("arm64")); !errors.Is(err, image.ErrPlatform) {
			t.Errorf("bare, other platform: %v", err)
		}
		push("empty")
		if _, err := open(t, ref+":empty", image.Options{}).Resolve(t.Context(), linux("amd64")); !errors.Is(err, image.ErrPlatform) {
			t.Errorf("empty: %v", err)
		}
		lying := entry(amd, platform("linux", "amd64", ""))
		lying["size"] = amd.Size + 1
		push("size", lying)
		if _, err := open(t, ref+":size", image.Options{}).Resolve(t.Context(), linux("amd64")); !errors.Is(err, image.ErrCorrupt) || !strings.Contains(err.Error(), amd.Digest) {
			t.Errorf("wrong size: %v", err)
		}
	})
}

func TestNotAnImage(t *testing.T) {
	everywhere(t, func(t *testing.T, ref string) {
		repo := open(t, ref, image.Options{})
		const chart = "application/vnd.cncf.helm.config.v1+json"
		m := manifest(t, repo, config("linux", "amd64"))
		with := func(key string, v any) object {
			c := object{}
			for k, v := range m {
				c[k] = v
			}
			c[key] = v
			return c
		}
		for what, m := range map[string]object{
			chart:                          with("config", pushBlob(t, repo, chart, []byte("{}"))),
			"application/vnd.in-toto+json": with("layers", []image.Descriptor{pushBlob(t, repo, "application/vnd.in-toto+json", []byte("{} "))}),
			"application/vnd.example.sbom.v1+json": func() object {
				m := with("config", pushBlob(t, repo, "application/vnd.oci.empty.v1+json", []byte("{}")))
				m["artifactType"] = "application/vnd.example.sbom.v1+json"
				return m
			}(),
		} {
			pushManifest(t, repo, image.MediaTypeManifest, "other", m)
			_, err := open(t, ref+":other", image.Options{}).Resolve(t.Context(), linux("amd64"))
			var ne *image.NotImageError
			if !errors.As(err, &ne) || ne.What != what || !errors.Is(err, image.ErrNotImage) {
				t.Errorf("%s: %v", what, err)
			}
			// But its manifest can be had.
			if got, err := repo.Manifest(t.Context(), "other"); err != nil || len(got.Bytes) == 0 {
				t.Errorf("%s: %v", what, err)
			}
		}
	})
}

func TestLimits(t *testing.T) {
	everywhere(t, func(t *testing.T, ref string) {
		pushImage(t, open(t, ref, image.Options{}), "latest", "amd64")
		for _, opts := range []image.Options{{ManifestLimit: 100}, {ConfigLimit: 100}} {
			_, err := open(t, ref+":latest", opts).Resolve(t.Context(), linux("amd64"))
			if !errors.Is(err, image.ErrLimit) || !strings.Contains(err.Error(), "100 bytes") ||
				strings.Contains(err.Error(), "(ManifestBytes)") != (opts.ManifestLimit > 0) {
				t.Errorf("%+v: %v", opts, err)
			}
		}
		small := open(t, ref, image.Options{ManifestLimit: 100})
		if _, err := small.PushManifest(t.Context(), image.MediaTypeManifest, make([]byte, 101), "x"); !errors.Is(err, image.ErrLimit) {
			t.Errorf("%v", err)
		}
	})
}

func TestInlineConfig(t *testing.T) {
	host := serve(t, nil)
	rec := newRecorder(t)
	repo := open(t, host+"/app:v1", image.Options{Transport: rec})
	m := manifest(t, repo, config("linux", "amd64"))
	d := m["config"].(image.Descriptor)
	p, err := blob.ReadAll(t.Context(), repo.Blobs(), d.Ref(), 0, d.Size)
	if err != nil {
		t.Fatal(err)
	}
	for _, data := range [][]byte{p, []byte("lies")} {
		m["config"] = object{"mediaType": d.MediaType, "digest": d.Digest, "size": d.Size, "data": data}
		pushManifest(t, repo, image.MediaTypeManifest, "v1", m)
		rec.take()
		img, err := repo.Resolve(t.Context(), linux("amd64"))
		if err != nil || img.Config.User == "" || !reflect.DeepEqual(img.ConfigBytes, p) {
			t.Errorf("%v", err)
		}
		want := 1
		if len(data) < 10 {
			want = 2 // what does not match its digest is not used
		}
		if got := rec.take(); len(got) != want {
			t.Errorf("%d requests, expected %d: %v", len(got), want, got)
		}
	}
}
