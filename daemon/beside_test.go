package daemon

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/registry"
	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/mount"
	"github.com/shale-image/shale/reader"
)

// mountNoting mounts an image and returns what the caller was told meanwhile.
func mountNoting(t *testing.T, c *Client, ref string) (dir string, notes string) {
	t.Helper()
	dir = t.TempDir()
	m, err := c.Mount(background, Source{Ref: ref, Platform: "linux/amd64"}, Place{Where: dir}, func(p Progress) { notes += p.Note })
	must(t, err)
	defer m.FS.Close()
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	must(t, mount.Attach(m.FS, dir))
	return dir, notes
}

// TestBesideFails: an image whose manifest and layers are served starts, whatever
// becomes of requests for what lies beside it, and says why it was read as a whole.
func TestBesideFails(t *testing.T) {
	for _, api := range []bool{true, false} {
		p := newPacksIn(t, strings.TrimSuffix(windowed(t), "shale")+"plain", false, registry.WithReferrersSupport(api))
		found, err := p.repo.Referrers(background, p.img.ManifestDigest, reader.ArtifactType)
		must(t, err)
		a, err := p.repo.Artifact(background, found[0].Descriptor, p.img.ManifestDigest)
		must(t, err)
		for what, parts := range map[string][]string{
			"API": {"/referrers/"}, "tag": {"/manifests/sha256-"}, "API and tag": {"/referrers/", "/manifests/sha256-"},
			"artifact": {"/manifests/" + a.Digest}, "index": {a.Layers[0].Digest},
		} {
			for _, status := range []int{401, 403, 500} {
				t.Run(fmt.Sprintf("API %v, %d of %s", api, status, what), func(t *testing.T) {
					p.mu.Lock()
					p.spoil = func(w http.ResponseWriter, r *http.Request) bool {
						bad := slices.ContainsFunc(parts, func(part string) bool { return strings.Contains(r.URL.Path, part) })
						if bad {
							w.WriteHeader(status)
						}
						return bad
					}
					p.mu.Unlock()
					dir, notes := mountNoting(t, service(t), p.ref)
					wholly(t, dir)
					lazy := what == "API" || what == "tag" && api // its registry has both
					if told := strings.Contains(notes, "all of the image is read, once") && strings.Contains(notes, fmt.Sprint(status)); told == lazy {
						t.Errorf("it notes %q", notes)
					}
				})
			}
		}
	}
}

// TestGarbageBeside: an index that is none hides no other one.
func TestGarbageBeside(t *testing.T) {
	p := newPacks(t, strings.TrimSuffix(windowed(t), "shale")+"plain", false)
	found, err := p.repo.Referrers(background, p.img.ManifestDigest, reader.ArtifactType)
	must(t, err)
	a, err := p.repo.Artifact(background, found[0].Descriptor, p.img.ManifestDigest)
	must(t, err)
	garbage := []byte("no index")
	d := image.Descriptor{MediaType: reader.IndexMediaType, Digest: sha(garbage), Size: int64(len(garbage))}
	must(t, p.repo.PushBlob(background, d, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(garbage)), nil }))
	subject := image.Descriptor{MediaType: p.img.MediaType, Digest: p.img.ManifestDigest, Size: int64(len(p.img.ManifestBytes))}
	all := func(image.Descriptor) bool { return true }
	_, err = p.repo.PushArtifact(background, subject, reader.ArtifactType, []image.Descriptor{d}, nil, all)
	must(t, err)
	_, err = p.repo.PushArtifact(background, subject, reader.ArtifactType, a.Layers, map[string]string{"note": "good"}, nil)
	must(t, err)
	c := service(t)
	dir, notes := mountNoting(t, c, p.ref)
	if strings.Contains(notes, "all of the image is read") {
		t.Errorf("it notes %q", notes)
	}
	wholly(t, dir)
	if _, err := os.Stat(filepath.Join(imageDir(c, p.img.ManifestDigest), foreignFile)); err != nil {
		t.Errorf("nothing to compare is kept: %v", err)
	}
}

// TestSideFails: readers see nothing of it where what lies beside the layers is refused
// or does not come, and the layers do.
func TestSideFails(t *testing.T) {
	for what, answer := range map[string]http.HandlerFunc{
		"403":   func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(403) },
		"500":   func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) },
		"hangs": func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			p := newPacks(t, strings.TrimSuffix(windowed(t), "shale")+"plain", false)
			found, err := p.repo.Referrers(background, p.img.ManifestDigest, reader.ArtifactType)
			must(t, err)
			a, err := p.repo.Artifact(background, found[0].Descriptor, p.img.ManifestDigest)
			must(t, err)
			if len(a.Layers) != 2 {
				t.Fatalf("the artifact has %v", a.Layers)
			}
			p.mu.Lock()
			p.spoil = func(w http.ResponseWriter, r *http.Request) bool {
				bad := strings.HasSuffix(r.URL.Path, a.Layers[1].Digest)
				if bad {
					answer(w, r)
				}
				return bad
			}
			p.mu.Unlock()
			c := service(t)
			dir, m := attach(t, c, p.ref)
			p.requests()
			wholly(t, dir)
			if !contains(p.requests(), a.Layers[1].Digest) {
				t.Error("nobody asked for what lies beside the layers")
			}
			if s := statusOf(t, c, m.ID); s.Fill.Errors != 0 {
				t.Errorf("readers saw it: %+v", s.Fill)
			}
		})
	}
}
