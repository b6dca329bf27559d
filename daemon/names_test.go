package daemon

import (
	"encoding/json"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/shale-image/shale/image"
)

// TestKnown: what the node has is found without its registry, however it is named.
func TestKnown(t *testing.T) {
	c, ref := service(t), layout(t)
	dir := strings.TrimSuffix(strings.TrimPrefix(ref, "oci:"), ":shale")
	repo, err := image.Open(background, refOf(t, "oci:"+dir+":multi"), image.Options{})
	must(t, err)
	defer repo.Close()
	m, err := repo.Manifest(background, "shale")
	must(t, err)
	list, _ := json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": image.MediaTypeIndex,
		"manifests": []any{map[string]any{
			"mediaType": m.MediaType, "digest": m.Digest, "size": len(m.Bytes),
			"platform": map[string]string{"os": "linux", "architecture": "amd64"},
		}},
	})
	_, err = repo.PushManifest(background, image.MediaTypeIndex, list, "multi")
	must(t, err)
	pull := func(ref, platform string, complete bool) error {
		t.Helper()
		out, err := c.Pull(background, Source{Ref: ref, Platform: platform}, complete, nil)
		if err == nil && out.ManifestDigest != m.Digest {
			t.Errorf("%s is %s, want %s", ref, out.ManifestDigest, m.Digest)
		}
		return err
	}
	must(t, pull("oci:"+dir+":shale", "linux/amd64", false))
	must(t, pull("oci:"+dir+":multi", "linux/amd64", false))
	must(t, os.Rename(dir, dir+".gone"))
	elsewhere := "oci:" + dir + "-other@"
	if err := pull(elsewhere+m.Digest, "linux/amd64", false); err == nil {
		t.Error("what lies elsewhere is taken though it is not here")
	}
	must(t, pull("oci:"+dir+"@"+m.Digest, "linux/amd64", false))
	must(t, os.Rename(dir+".gone", dir))
	must(t, pull("oci:"+dir+":shale", "linux/amd64", true))
	must(t, os.Rename(dir, dir+".gone"))
	ways := [][2]string{
		{"oci:" + dir + ":shale", "amd64"}, {"oci:" + dir + ":shale", "linux/x86_64/v1"}, {"oci:" + dir + ":shale@" + m.Digest, "linux/amd64"},
		{"oci:" + dir + "@" + sha(list), "amd64"}, {"oci:" + dir + ":multi@" + sha(list), "linux/amd64"}, {elsewhere + m.Digest, "linux/amd64"},
	}
	if runtime.GOARCH == "amd64" {
		ways = append(ways, [2]string{"oci:" + dir + ":shale", ""}, [2]string{"oci:" + dir + ":new@" + sha(list), ""})
	}
	for _, w := range ways {
		if err := pull(w[0], w[1], false); err != nil {
			t.Errorf("%s of %q: %v", w[0], w[1], err)
		}
	}
	for _, w := range [][2]string{
		{"oci:" + dir + ":shale", "linux/arm64"}, {"oci:" + dir + "@" + m.Digest, "linux/arm64"}, {"oci:" + dir + "@" + sha(list), "linux/arm64"},
		{"oci:" + dir + "@" + sha([]byte("x")), "linux/amd64"}, {"oci:" + dir + ":none", "linux/amd64"},
	} {
		if err := pull(w[0], w[1], false); err == nil {
			t.Errorf("%s of %q is known", w[0], w[1])
		}
	}
	end(t, c) // the next service knows as much
	for _, w := range ways {
		if err := pull(w[0], w[1], false); err != nil {
			t.Errorf("%s of %q: %v", w[0], w[1], err)
		}
	}
}

// TestLoadNames: names that were kept with the node's platform written out are those
// without.
func TestLoadNames(t *testing.T) {
	own := image.Platform{}.Canonical()
	a, b := sha([]byte("a")), sha([]byte("b"))
	s := &store{refs: filepath.Join(t.TempDir(), "refs.json"), log: slog.New(slog.DiscardHandler)}
	js, _ := json.Marshal(map[string]string{
		"r/a:1 " + own: b, "r/a:1 ": a,
		"r/b:1 linux/" + runtime.GOARCH: b,
		"oci:/a b:c linux/s390x":        a,
		"r/c:1 ":                        "../..", "nothing": a,
	})
	must(t, os.WriteFile(s.refs, js, 0o600))
	must(t, s.loadNames())
	want := map[string]string{"r/a:1 ": a, "r/b:1 ": b, "oci:/a b:c linux/s390x": a}
	if !maps.Equal(s.names, want) {
		t.Errorf("%v, want %v", s.names, want)
	}
	if k := nameKey("r/a:1", "arm64"); runtime.GOARCH != "arm64" && k != "r/a:1 linux/arm64/v8" {
		t.Error(k)
	}
}
