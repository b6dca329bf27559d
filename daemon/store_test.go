package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/reader"
)

// holds checks that the image is whole through a mount.
func holds(t *testing.T, c *Client, ref string) {
	t.Helper()
	dir, _ := attach(t, c, ref)
	for name, want := range files {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
	unmount(t, c, dir)
}

// TestDamage: whatever becomes of the files that the store keeps, a mount makes
// good.
func TestDamage(t *testing.T) {
	for name, damage := range map[string]func(root, image string) error{
		"names": func(root, _ string) error { return os.WriteFile(filepath.Join(root, "refs.json"), []byte("{"), 0o600) },
		"null names": func(root, _ string) error {
			return os.WriteFile(filepath.Join(root, "refs.json"), []byte("null"), 0o600)
		},
		"a bad name": func(root, _ string) error {
			return os.WriteFile(filepath.Join(root, "refs.json"), []byte(`{"x":"../.."}`), 0o600)
		},
		"record":    func(_, image string) error { return os.WriteFile(filepath.Join(image, "record"), nil, 0o600) },
		"no record": func(_, image string) error { return os.Remove(filepath.Join(image, "record")) },
		"config":    func(_, image string) error { return os.WriteFile(filepath.Join(image, "config"), []byte("{"), 0o600) },
		"no link":   func(_, image string) error { return os.RemoveAll(filepath.Join(image, "linked")) },
		"no map":    func(_, image string) error { return os.Remove(filepath.Join(image, "linked", "map")) },
		"another info": func(_, image string) error {
			return os.WriteFile(filepath.Join(image, "linked", "info"), []byte(`{"version":99}`), 0o600)
		},
		"no images": func(_, image string) error { return os.RemoveAll(filepath.Dir(image)) },
		"no pool":   func(root, _ string) error { return os.RemoveAll(filepath.Join(root, "pool")) },
	} {
		t.Run(name, func(t *testing.T) {
			c, ref := service(t), layout(t)
			holds(t, c, ref)
			end(t, c)
			images, err := filepath.Glob(filepath.Join(c.Root, "images", "*"))
			if err != nil || len(images) != 1 {
				t.Fatal(images, err)
			}
			if err := damage(c.Root, images[0]); err != nil {
				t.Fatal(err)
			}
			holds(t, c, ref)
			remove(t, c, ref)
		})
	}
}

// TestLeftovers: what a killed process can leave behind goes when the next one
// starts.
func TestLeftovers(t *testing.T) {
	c, ref := service(t), layout(t)
	holds(t, c, ref)
	end(t, c)
	images, _ := filepath.Glob(filepath.Join(c.Root, "images", "*"))
	half := filepath.Join(c.Root, "images", strings.Repeat("0", 64))
	want := tree(t, c.Root)
	for _, name := range []string{
		".refs.json123", ".scrub.json456", filepath.Join(half, "linked.new", "meta"), filepath.Join(half, "scratch", "blobs", "x"), filepath.Join(half, ".bootstrap-1"),
		filepath.Join(half+removedSuffix, "record"), filepath.Join(half+madeSuffix, "linked", "meta"), filepath.Join(images[0], ".record123"), filepath.Join(images[0], "linked.new", "map"),
	} {
		if !filepath.IsAbs(name) {
			name = filepath.Join(c.Root, name)
		}
		if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	pid(t, c)
	end(t, c)
	if got := tree(t, c.Root); got != want {
		t.Errorf("there is now\n%s\nwant\n%s", got, want)
	}
	holds(t, c, ref)
}

func tree(t *testing.T, root string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.Walk(root, func(path string, st os.FileInfo, err error) error {
		b.WriteString(path + "\n")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// TestKilled kills the service at all moments of a pull of an image of either
// kind. The next one has nothing to be told.
func TestKilled(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	converted := layout(t)
	for _, ref := range []string{converted, strings.TrimSuffix(converted, "shale") + "plain"} {
		c := service(t)
		for i := range 12 {
			p := pid(t, c)
			failed := make(chan error, 1)
			go func() {
				_, err := c.Pull(background, Source{Ref: ref, Platform: "linux/amd64"}, true, nil)
				failed <- err
			}()
			time.Sleep(time.Duration(i*4) * time.Millisecond)
			if err := syscall.Kill(p, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			<-failed
		}
		holds(t, c, ref)
		left, err := filepath.Glob(filepath.Join(c.Root, "images", "*", "*"))
		for i := range left {
			left[i] = filepath.Base(left[i])
		}
		want := []string{"config", "linked", "record"}
		if ref != converted {
			want = []string{"config", "index", "linked", "record"} // its layers are too small for windows
		}
		if !slices.Equal(left, want) || err != nil {
			t.Errorf("left behind: %v, want %v; %v", left, want, err)
		}
		remove(t, c, ref)
		st, err := c.Status(background)
		if err != nil || st.Pool.Segments != 0 || st.Pool.Address != 0 {
			t.Errorf("left in the pool: %+v, %v", st.Pool, err)
		}
	}
}

// TestAllAtOnce mounts, reads, pulls anew and removes one image concurrently.
func TestAllAtOnce(t *testing.T) {
	c, ref := service(t), layout(t)
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 10 {
				m, err := c.Mount(background, Source{Ref: ref, Platform: "linux/amd64"}, Place{Where: "nowhere"}, nil)
				if err != nil {
					t.Error(err)
					return
				}
				for name, want := range files {
					got, err := os.ReadFile(filepath.Join("/proc/self/fd", fmt.Sprint(m.FS.Fd()), name))
					if err != nil || !bytes.Equal(got, want) {
						t.Errorf("%s: %d bytes, %v", name, len(got), err)
					}
				}
				m.FS.Close()
			}
		})
	}
	for range 2 {
		wg.Go(func() {
			for range 10 {
				if _, err := c.Pull(background, Source{Ref: ref, Platform: "linux/amd64", Refresh: true}, true, nil); err != nil {
					t.Error(err)
				}
				if _, err := c.Remove(background, ref); err != nil && !errors.Is(err, ErrBusy) && !errors.Is(err, blob.ErrNotFound) {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	holds(t, c, ref)
}

// TestIndexed mounts an ordinary image by the index beside it, right, damaged
// and lying: what is read is right in any case.
func TestIndexed(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	for name, x := range map[string]struct {
		damage func(dir string, index, side image.Descriptor)
	}{
		"right":   {func(string, image.Descriptor, image.Descriptor) {}},
		"damaged": {func(dir string, index, _ image.Descriptor) { flip(t, dir, index) }},
		"gone":    {func(dir string, index, _ image.Descriptor) { os.Remove(blobFile(dir, index)) }},
		"windows": {func(dir string, _, side image.Descriptor) { flip(t, dir, side) }},
		"no side": {func(dir string, _, side image.Descriptor) { os.Remove(blobFile(dir, side)) }},
	} {
		t.Run(name, func(t *testing.T) {
			c, ref := service(t), strings.TrimSuffix(windowed(t), "shale")+"plain"
			dir := strings.TrimSuffix(strings.TrimPrefix(ref, "oci:"), ":plain")
			index, side := pushIndex(t, ref)
			if side.Size == 0 {
				t.Fatal("the layers need no windows: no test")
			}
			x.damage(dir, index, side)
			mnt, _ := attach(t, c, ref)
			all := maps.Clone(files)
			all["text"] = longText()
			for name, want := range all {
				if got, err := os.ReadFile(filepath.Join(mnt, name)); err != nil || !bytes.Equal(got, want) {
					t.Errorf("%s: %d bytes, %v", name, len(got), err)
				}
			}
			unmount(t, c, mnt)
			p, err := c.Pull(background, Source{Ref: ref, Platform: "linux/amd64"}, false, nil)
			if err != nil {
				t.Fatal(err)
			}
			eventually(t, "the node goes by its own index, or what it has compared", func() bool {
				js, err := os.ReadFile(filepath.Join(imageDir(c, p.ManifestDigest), "record"))
				return err == nil && strings.Contains(string(js), fmt.Sprintf("%q", reader.Local))
			})
			if p, err = c.Pull(background, Source{Ref: ref, Platform: "linux/amd64"}, true, nil); err != nil || p.MissingBytes != 0 {
				t.Errorf("complete: %d bytes are missing, %v", p.MissingBytes, err)
			}
			holds(t, c, ref)
		})
	}
}

func blobFile(dir string, d image.Descriptor) string {
	return filepath.Join(dir, "blobs", "sha256", strings.TrimPrefix(d.Digest, "sha256:"))
}

// flip damages a blob all over.
func flip(t *testing.T, dir string, d image.Descriptor) {
	t.Helper()
	p, err := os.ReadFile(blobFile(dir, d))
	if err != nil {
		t.Fatal(err)
	}
	for i := 10; i < len(p); i += 100 {
		p[i] ^= 1
	}
	if err := os.WriteFile(blobFile(dir, d), p, 0o644); err != nil {
		t.Fatal(err)
	}
}

// pushIndex pushes the index of an image beside it.
func pushIndex(t *testing.T, ref string) (index, side image.Descriptor) {
	t.Helper()
	r, err := image.ParseRef(ref)
	if err != nil {
		t.Fatal(err)
	}
	repo, err := image.Open(background, r, image.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer repo.Close()
	img, err := repo.Resolve(background, image.Platform{OS: "linux", Architecture: "amd64"})
	if err != nil {
		t.Fatal(err)
	}
	made, err := reader.Make(background, reader.Job{Manifest: img.ManifestDigest, Layers: img.Layers, DiffIDs: img.Config.DiffIDs,
		Open: func(ctx context.Context, n int) (io.ReadCloser, error) { return repo.Blob(ctx, img.Layers[n]) }})
	if err != nil {
		t.Fatal(err)
	}
	defer made.Close()
	if _, err := reader.Push(background, repo, img, made); err != nil {
		t.Fatal(err)
	}
	return image.Descriptor{Digest: reader.IndexDigest(made.Encoded), Size: int64(len(made.Encoded))}, made.Side
}
