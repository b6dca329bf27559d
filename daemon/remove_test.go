package daemon

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/blob"
)

func TestRemove(t *testing.T) {
	c, ref := service(t), layout(t)
	if _, err := c.Remove(background, ref); !errors.Is(err, blob.ErrNotFound) {
		t.Errorf("an unknown image: %v, want ErrNotFound", err)
	}
	dir, m := attach(t, c, ref)
	if _, err := os.ReadFile(filepath.Join(dir, "big")); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Remove(background, ref); !errors.Is(err, ErrBusy) {
		t.Errorf("a mounted image: %v, want ErrBusy", err)
	}
	unmount(t, c, dir)
	out := remove(t, c, ref)
	if len(out.Images) != 1 || out.Images[0] != m.ManifestDigest || out.FreedBytes < int64(len(files["big"])/16) {
		t.Errorf("removed %+v", out)
	}
	st, err := c.Status(background)
	if err != nil || len(st.Images) != 0 || st.Pool.Present != 0 || st.Pool.Segments != 0 {
		t.Errorf("%+v, pool %+v, %v", st, st.Pool, err)
	}
	// It can be had again.
	dir, _ = attach(t, c, ref)
	if got, err := os.ReadFile(filepath.Join(dir, "big")); err != nil || !bytes.Equal(got, files["big"]) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

// TestRemoveUnderDirect: a direct mount lives on without the service that made
// it, and the next one must not free what it shows.
func TestRemoveUnderDirect(t *testing.T) {
	c, ref := service(t), layout(t)
	if _, err := c.Pull(background, Source{Ref: ref, Platform: "linux/amd64"}, true, nil); err != nil {
		t.Fatal(err)
	}
	dir, m := attach(t, c, ref)
	if m.Face != "direct" {
		t.Skipf("the face of a complete image here is %s", m.Face)
	}
	kill(t, c, syscall.SIGKILL)
	if _, err := c.Remove(background, ref); !errors.Is(err, ErrBusy) {
		t.Errorf("an image with a direct mount: %v, want ErrBusy", err)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "big")); err != nil || !bytes.Equal(got, files["big"]) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it can be removed", func() bool {
		_, err := c.Remove(background, ref)
		return err == nil
	})
}

func unmount(t *testing.T, c *Client, dir string) {
	t.Helper()
	eventually(t, "the directory is unmounted", func() bool { return unix.Unmount(dir, 0) == nil })
	eventually(t, "the mount is forgotten", func() bool {
		st, err := c.Status(background)
		return err == nil && len(st.Mounts) == 0
	})
}

// remove removes an image whose mount has ended, and is about to let go of it.
func remove(t *testing.T, c *Client, ref string) (out *Removed) {
	t.Helper()
	var err error
	eventually(t, "the mount lets go of the image", func() bool {
		out, err = c.Remove(background, ref)
		return !errors.Is(err, ErrBusy)
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// TestDamagedSegment: an image whose segment is damaged is linked again and
// fetched again.
func TestDamagedSegment(t *testing.T) {
	c, ref := service(t), layout(t)
	dir, _ := attach(t, c, ref)
	if _, err := os.ReadFile(filepath.Join(dir, "big")); err != nil {
		t.Fatal(err)
	}
	unmount(t, c, dir)
	end(t, c)
	tables, err := filepath.Glob(filepath.Join(c.Root, "pool", "segments", "*", "table"))
	if err != nil || len(tables) != 1 {
		t.Fatal(tables, err)
	}
	b, err := os.ReadFile(tables[0])
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 1
	if err := os.WriteFile(tables[0], b, 0o600); err != nil {
		t.Fatal(err)
	}
	dir, _ = attach(t, c, ref)
	if got, err := os.ReadFile(filepath.Join(dir, "big")); err != nil || !bytes.Equal(got, files["big"]) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

// What has been read of an image's metadata is not open in a child that is being made.
func TestRemoveWhileChildrenStart(t *testing.T) {
	meta := filepath.Join(t.TempDir(), "meta")
	if err := os.WriteFile(meta, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(background)
	var children sync.WaitGroup
	defer func() { cancel(); children.Wait() }()
	for range 4 {
		children.Go(func() {
			for ctx.Err() == nil {
				exec.CommandContext(ctx, "/bin/true").Run()
			}
		})
	}
	for i := range 500 {
		if mountedElsewhere(meta) {
			t.Fatalf("it is said to be mounted the time %d", i+1)
		}
	}
	f, err := os.Open(meta)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if !mountedElsewhere(meta) {
		t.Error("open, it is said not to be mounted")
	}
}
