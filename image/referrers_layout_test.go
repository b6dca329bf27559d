package image_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/shale-image/shale/image"
)

// TestReferrersOfLayout: in a layout every manifest counts, wherever it is
// listed; what the layout lacks does not.
func TestReferrersOfLayout(t *testing.T) {
	dir := t.TempDir()
	repo := open(t, "oci:"+dir, image.Options{})
	if got := referrers(t, repo, someDigest, ""); len(got) != 0 {
		t.Errorf("without an index.json: %v", got)
	}
	p := manifest(t, repo, config("linux", "amd64"))
	subject := pushManifest(t, repo, image.MediaTypeManifest, "v1", p)
	// As others list them: at the top, in an index of an index, as an index.
	artifact := func(kind string) image.Descriptor {
		c := pushBlob(t, repo, kind, []byte("{}"))
		return pushManifest(t, repo, image.MediaTypeManifest, "", object{"schemaVersion": 2, "mediaType": image.MediaTypeManifest, "config": c, "layers": []any{}, "subject": subject})
	}
	top, nested, gone, other := artifact(typeA), artifact(typeB), desc(image.MediaTypeManifest, []byte("gone")), desc("text/plain", []byte("x"))
	list := func(extra object, ds ...image.Descriptor) image.Descriptor {
		o := object{"schemaVersion": 2, "mediaType": image.MediaTypeIndex, "manifests": ds}
		for k, v := range extra {
			o[k] = v
		}
		return pushManifest(t, repo, image.MediaTypeIndex, "", o)
	}
	outer := list(object{"subject": subject, "artifactType": typeA}, list(nil, nested, subject), nested, gone)
	subject.Annotations = map[string]string{"org.opencontainers.image.ref.name": "v1"}
	write := func(ds ...image.Descriptor) {
		if err := os.WriteFile(filepath.Join(dir, "index.json"), []byte(index(ds)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write(subject, top, top, outer, gone, other)
	for _, ref := range []string{"oci:" + dir, "oci-archive:" + packLayout(t, dir)} {
		r := open(t, ref, image.Options{})
		for kind, want := range map[string][]string{"": sorted(top.Digest, nested.Digest, outer.Digest), typeA: sorted(top.Digest, outer.Digest), typeB: {nested.Digest}} {
			if got := referrers(t, r, subject.Digest, kind); !slices.Equal(got, want) {
				t.Errorf("%s: %s: %v, expected %v", ref, kind, got, want)
			}
		}
	}
	if _, err := open(t, "oci-archive:"+packLayout(t, dir), image.Options{}).PushArtifact(t.Context(), subject, typeA, nil, nil, nil); err == nil {
		t.Error("an archive is written")
	}

	// An image that is alone and has no tag still is what the layout has.
	subject.Annotations = nil
	write(subject)
	pushArtifact(t, repo, subject, typeA, "x", nil)
	if img, err := open(t, "oci:"+dir, image.Options{}).Resolve(t.Context(), linux("amd64")); err != nil || img.ManifestDigest != subject.Digest {
		t.Errorf("beside its artifacts: %v", err)
	}

	wrong := top
	wrong.Size++
	write(subject, wrong)
	if _, err := repo.Referrers(t.Context(), subject.Digest, ""); !errors.Is(err, image.ErrCorrupt) {
		t.Errorf("a wrong size: %v", err)
	}
	for range 8 { // deeper than looked at
		outer = list(nil, outer)
	}
	write(outer)
	if got := referrers(t, repo, subject.Digest, ""); len(got) != 0 {
		t.Errorf("indexes in indexes: %v", got)
	}
	many := make([]image.Descriptor, 10001)
	for i := range many {
		many[i] = subject
	}
	write(many...)
	if _, err := repo.Referrers(t.Context(), subject.Digest, ""); !errors.Is(err, image.ErrLimit) {
		t.Errorf("a huge layout: %v", err)
	}
}

// TestSkopeoReferrers: another tool takes the list along, from a layout to a
// registry and back. It may drop the types from it on the way.
func TestSkopeoReferrers(t *testing.T) {
	skopeo, err := exec.LookPath("skopeo")
	if err != nil {
		t.Skip("skopeo is not installed (Debian: apt install skopeo)")
	}
	dir := t.TempDir()
	ours, theirs := "oci:"+filepath.Join(dir, "ours"), "oci:"+filepath.Join(dir, "theirs")
	remote := debianRegistry(t, "") + "/app"
	repo := open(t, ours, image.Options{})
	subject := pushImage(t, repo, "v1", "amd64")
	a := pushArtifact(t, repo, subject, typeA, "x", nil)
	pushArtifact(t, repo, subject, typeB, "y", nil)
	tag := strings.Replace(subject.Digest, ":", "-", 1)
	for _, args := range [][]string{
		{"--dest-tls-verify=false", ours + ":v1", "docker://" + remote + ":v1"},
		{"--dest-tls-verify=false", ours + ":" + tag, "docker://" + remote + ":" + tag},
		{"--src-tls-verify=false", "docker://" + remote + ":" + tag, theirs + ":" + tag},
	} {
		args = append([]string{"--insecure-policy", "--tmpdir", dir, "copy", "--all"}, args...)
		if out, err := exec.Command(skopeo, args...).CombinedOutput(); err != nil {
			t.Fatalf("skopeo %v: %v\n%s", args, err, out)
		}
	}
	for _, ref := range []string{remote, theirs} {
		repo := open(t, ref, image.Options{})
		list, err := repo.Referrers(t.Context(), subject.Digest, typeA)
		if err != nil || !slices.Equal(digests(descriptors(list)), []string{a}) {
			t.Fatalf("%s: %v, %v", ref, list, err)
		}
		if got, err := repo.Artifact(t.Context(), list[0].Descriptor, subject.Digest); err != nil || got.Type != typeA {
			t.Errorf("%s: %v", ref, err)
		}
		b := pushArtifact(t, repo, subject, typeA, "z", nil)
		if got := referrers(t, repo, subject.Digest, typeA); !slices.Equal(got, sorted(a, b)) {
			t.Errorf("%s: after one more: %v", ref, got)
		}
	}
}
