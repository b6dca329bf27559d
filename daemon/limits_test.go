package daemon

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/reader"
)

// TestLimits has an image that passes the default limit, and a node whose limit is
// higher: it reads layers, its own index again, an index of others, and compares that.
// Then the limit is lowered again.
func TestLimits(t *testing.T) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	h := &tar.Header{Name: "labelled", Mode: 0o644, Size: 6, Typeflag: tar.TypeReg, PAXRecords: map[string]string{
		"SCHILY.xattr.user.a": strings.Repeat("a", 40_000), "SCHILY.xattr.user.b": strings.Repeat("b", 40_000)}}
	if err := w.WriteHeader(h); err != nil {
		t.Fatal(err)
	}
	io.WriteString(w, "hello\n")
	w.Close()
	repo, dir := plainOf(t, b.Bytes())
	img, err := repo.Resolve(background, image.Platform{OS: "linux", Architecture: "amd64"})
	if err != nil {
		t.Fatal(err)
	}
	cfg := filepath.Join(t.TempDir(), "config")
	limit := func(n int) {
		if err := os.WriteFile(cfg, fmt.Appendf(nil, `{"limits": {"xattr_bytes": %d}}`, n), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("SHALE_TEST_CONFIG", cfg)
	limit(64 << 10)
	c, s := service(t), Source{Ref: "oci:" + dir + ":plain", Platform: "linux/amd64"}
	refused := func(when string) {
		t.Helper()
		if _, err := c.Pull(background, s, false, nil); !errors.Is(err, index.ErrLimit) || !strings.Contains(err.Error(), "(XattrBytes)") {
			t.Errorf("%s: %v", when, err)
		}
	}
	look := func() {
		t.Helper()
		mnt, _ := attach(t, c, s.Ref)
		value := make([]byte, 64<<10)
		n, err := unix.Getxattr(filepath.Join(mnt, "labelled"), "user.b", value)
		p, rerr := os.ReadFile(filepath.Join(mnt, "labelled"))
		if n != 40_000 || string(p) != "hello\n" {
			t.Errorf("%d bytes, %q; %v, %v", n, p, err, rerr)
		}
		unmount(t, c, mnt)
	}
	refused("by the default")
	end(t, c)
	limit(1 << 20)
	look() // its layers are read
	end(t, c)
	linked := filepath.Join(imageDir(c, img.ManifestDigest), "linked")
	if err := os.RemoveAll(linked); err != nil {
		t.Fatal(err)
	}
	look() // by its own index
	remove(t, c, s.Ref)
	made, err := reader.Make(background, reader.Job{Manifest: img.ManifestDigest, Layers: img.Layers, DiffIDs: img.Config.DiffIDs,
		Limits: index.Limits{XattrBytes: 1 << 20},
		Open:   func(ctx context.Context, n int) (io.ReadCloser, error) { return repo.Blob(ctx, img.Layers[n]) }})
	if err != nil {
		t.Fatal(err)
	}
	defer made.Close()
	if _, err := reader.Push(background, repo, img, made); err != nil {
		t.Fatal(err)
	}
	look() // by that of others
	x := &indexedImage{t: t, c: c, img: img}
	if _, err := c.Pull(background, s, true, nil); err != nil {
		t.Fatal(err)
	}
	x.compared()
	end(t, c)
	limit(64 << 10)
	if err := os.RemoveAll(linked); err != nil {
		t.Fatal(err)
	}
	refused("by a limit that is lower again")
}
