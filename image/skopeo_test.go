package image_test

import (
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/shale-image/shale/image"
)

// TestSkopeo: another tool reads what is written here, and the other way round.
func TestSkopeo(t *testing.T) {
	skopeo, err := exec.LookPath("skopeo")
	if err != nil {
		t.Skip("skopeo is not installed (Debian: apt install skopeo)")
	}
	dir := t.TempDir()
	ours, theirs := "oci:"+filepath.Join(dir, "ours")+":v1", "oci:"+filepath.Join(dir, "theirs")+":v2"
	remote := debianRegistry(t, "") + "/app:v3"
	want := pushImage(t, open(t, ours, image.Options{}), "v1", "amd64")
	for _, args := range [][]string{
		{"copy", "--preserve-digests", "--dest-tls-verify=false", ours, "docker://" + remote},
		{"copy", "--preserve-digests", "--src-tls-verify=false", "docker://" + remote, theirs},
	} {
		args = append([]string{"--insecure-policy", "--tmpdir", dir}, args...)
		if out, err := exec.Command(skopeo, args...).CombinedOutput(); err != nil {
			t.Fatalf("skopeo %v: %v\n%s", args, err, out)
		}
	}
	for _, ref := range []string{remote, theirs} {
		img, err := open(t, ref, image.Options{}).Resolve(t.Context(), linux("amd64"))
		if err != nil || img.ManifestDigest != want.Digest || img.Config.User != "1000:1000" {
			t.Errorf("%s: %v, or another image", ref, err)
		}
	}
}
