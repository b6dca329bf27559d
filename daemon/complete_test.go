package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/convert"
	"github.com/shale-image/shale/image"
)

// served makes an image in a registry, which ends with the returned function.
func served(t *testing.T, ref string) (remote string, end func()) {
	t.Helper()
	s := httptest.NewServer(registry.New())
	t.Cleanup(s.Close)
	remote = strings.TrimPrefix(s.URL, "http://") + "/app:1"
	var repos []*image.Repository
	for _, name := range []string{strings.TrimSuffix(ref, "shale") + "plain", remote} {
		r, err := image.ParseRef(name)
		if err != nil {
			t.Fatal(err)
		}
		repo, err := image.Open(background, r, image.Options{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { repo.Close() })
		repos = append(repos, repo)
	}
	if _, err := convert.Convert(background, repos[0], repos[1], convert.Options{Platform: image.Platform{OS: "linux", Architecture: "amd64"}}); err != nil {
		t.Fatal(err)
	}
	return remote, func() {
		s.CloseClientConnections()
		s.Close()
	}
}

func mountStatus(t *testing.T, c *Client, id string) MountStatus {
	t.Helper()
	st, err := c.Status(background)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range st.Mounts {
		if m.ID == id {
			return m
		}
	}
	t.Fatalf("no mount %s in %+v", id, st)
	return MountStatus{}
}

// TestBackgroundCompletion: a mount that nobody reads becomes complete by itself, and
// then needs no registry.
func TestBackgroundCompletion(t *testing.T) {
	configured(t, `{"cache": {"complete_after": "10ms"}}`)
	ref, gone := served(t, layout(t))
	c := service(t)
	dir, m := attach(t, c, ref)
	if m.Face == "direct" {
		t.Fatal("it is complete from the beginning")
	}
	if err := c.WaitComplete(background, m.ManifestDigest, nil); err != nil {
		t.Fatal(err)
	}
	if st := mountStatus(t, c, m.ID); !st.Survives || st.MissingChunks != 0 || st.Fill.Stalls != 0 {
		t.Errorf("%+v", st)
	}
	gone()
	for name, want := range files {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
	// The next one is direct, with no registry.
	unmount(t, c, dir)
	if _, m := attach(t, c, ref); m.Face != "direct" {
		t.Errorf("the face of a complete image is %s", m.Face)
	}
}

// TestNoCompletion: who does not want it is not completed.
func TestNoCompletion(t *testing.T) {
	configured(t, `{"cache": {"complete_after": "1ms"}}`)
	ref := layout(t)
	c := service(t)
	_, m := attachAs(t, c, ref, Place{NoComplete: true, AnyCommand: true})
	time.Sleep(500 * time.Millisecond)
	if st := mountStatus(t, c, m.ID); st.Survives || st.MissingChunks == 0 || st.Source.Bytes != 0 {
		t.Errorf("%+v", st)
	}
}

// TestWaitEnds: who waits for what nothing fetches is told why, whatever mounts there are.
func TestWaitEnds(t *testing.T) {
	refused := func(t *testing.T, c *Client, m *Mounted, why string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(background, time.Minute)
		defer cancel()
		err := c.WaitComplete(ctx, m.ManifestDigest, nil)
		if !errors.Is(err, blob.ErrNotFound) || !strings.Contains(err.Error(), why) {
			t.Errorf("%v, want %s", err, why)
		}
		if st := mountStatus(t, c, m.ID); !strings.Contains(st.Incomplete, why) {
			t.Errorf("its status says %q, want %s", st.Incomplete, why)
		}
	}
	t.Run("not wanted", func(t *testing.T) {
		configured(t, `{"cache": {"complete_after": "1h"}}`)
		c, ref := service(t), layout(t)
		_, m := attachAs(t, c, ref, Place{NoComplete: true})
		refused(t, c, m, "--no-complete")
		// One that does fetch it is waited for.
		attach(t, c, ref)
		ctx, cancel := context.WithTimeout(background, 3*completeLook)
		defer cancel()
		if err := c.WaitComplete(ctx, m.ManifestDigest, nil); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("with a mount that is completed in an hour: %v", err)
		}
	})
	t.Run("off", func(t *testing.T) {
		configured(t, `{"cache": {"complete": "off"}}`)
		c := service(t)
		_, m := attach(t, c, layout(t))
		refused(t, c, m, `"complete": "off"`)
	})
	t.Run("no room", func(t *testing.T) {
		configured(t, `{"cache": {"complete_after": "1ms", "quota": 8000000}}`)
		c := service(t)
		_, m := attachAs(t, c, bigLayout(t, 0, 2), Place{Face: "device"})
		refused(t, c, m, "it does not fit")
	})
	t.Run("evicted", func(t *testing.T) {
		configured(t, `{"cache": {"complete_after": "1ms", "quota": 25000000}}`)
		c := service(t)
		_, m := attachAs(t, c, bigLayout(t, 0, 1), Place{Face: "device"})
		must(t, c.WaitComplete(background, m.ManifestDigest, nil))
		dir, _ := attachAs(t, c, bigLayout(t, 1, 2), Place{Face: "device", NoComplete: true})
		readBig(t, dir, 1, 2)
		refused(t, c, m, "others needed the room")
	})
}

// TestOffline: without a network, after a restart, complete images are mounted and
// read, and of others what is here; the rest is an error.
func TestOffline(t *testing.T) {
	configured(t, `{"read_timeout": "2s"}`)
	whole, gone1 := served(t, layout(t))
	part, gone2 := served(t, bigLayout(t, 0, 3))
	c := service(t)
	if _, err := c.Pull(background, Source{Ref: whole, Platform: "linux/amd64"}, true, nil); err != nil {
		t.Fatal(err)
	}
	dir, m := attachAs(t, c, part, Place{Face: "device", NoComplete: true})
	readBig(t, dir, 0, 1)
	st := mountStatus(t, c, m.ID)
	kill(t, c, syscall.SIGKILL)
	if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	gone1()
	gone2()
	dir, _ = attach(t, c, whole)
	for name, want := range files {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
	dir, m = attachAs(t, c, part, Place{Face: "device", NoComplete: true})
	readBig(t, dir, 0, 1)
	again := mountStatus(t, c, m.ID)
	// More may have come before the service was killed, and readers are read ahead for.
	if again.MissingChunks > st.MissingChunks || again.MissingChunks == 0 || again.Source.Bytes != 0 {
		t.Errorf("%d chunks are missing, want %d as before; %d bytes came", again.MissingChunks, st.MissingChunks, again.Source.Bytes)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "f002")); !errors.Is(err, syscall.EIO) {
		t.Errorf("what is not here: %d bytes, %v, want EIO", len(got), err)
	}
	d, err := c.Df(background)
	if err != nil || len(d.Images) != 2 {
		t.Errorf("%+v, %v", d, err)
	}
}

// TestScrub: what has rotted under a mount is fetched again.
func TestScrub(t *testing.T) {
	configured(t, `{"cache": {"complete_after": "10ms"}}`)
	ref := layout(t)
	c := service(t)
	dir, m := attachAs(t, c, ref, Place{Face: "device"})
	if err := c.WaitComplete(background, m.ManifestDigest, nil); err != nil {
		t.Fatal(err)
	}
	data, err := filepath.Glob(filepath.Join(c.Root, "pool", "segments", "*", "data"))
	if err != nil || len(data) != 1 {
		t.Fatal(data, err)
	}
	f, err := os.OpenFile(data[0], os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte("rot"), 20<<10); err != nil {
		t.Fatal(err)
	}
	out, err := c.Scrub(background, nil)
	if err != nil || len(out.Problems) != 1 || !out.Problems[0].Dropped {
		t.Fatalf("%+v, %v", out, err)
	}
	if err := c.WaitComplete(background, m.ManifestDigest, nil); err != nil {
		t.Fatal(err)
	}
	if out, err = c.Scrub(background, nil); err != nil || len(out.Problems) != 0 {
		t.Errorf("once more: %+v, %v", out, err)
	}
	for name, want := range files {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
}

// TestScrubInTime: what has rotted is found, and fetched again, with nobody asking.
func TestScrubInTime(t *testing.T) {
	configured(t, `{"cache": {"complete_after": "10ms", "scrub": "1s"}}`)
	c := service(t)
	_, m := attachAs(t, c, layout(t), Place{Face: "device"})
	must(t, c.WaitComplete(background, m.ManifestDigest, nil))
	data, err := filepath.Glob(filepath.Join(c.Root, "pool", "segments", "*", "data"))
	if err != nil || len(data) != 1 {
		t.Fatal(data, err)
	}
	f, err := os.OpenFile(data[0], os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	right, p := make([]byte, 3), make([]byte, 3)
	_, err = f.ReadAt(right, 20<<10)
	must(t, err)
	for range 2 {
		_, err = f.WriteAt([]byte("rot"), 20<<10)
		must(t, err)
		eventually(t, "it is right again", func() bool {
			_, err := f.ReadAt(p, 20<<10)
			return err == nil && bytes.Equal(p, right)
		})
	}
}

// TestScrubGoesOn: a service goes on where the last one was, and what it finds that it
// cannot read is not believed.
func TestScrubGoesOn(t *testing.T) {
	s := &server{cfg: Config{Root: t.TempDir()}}
	st, err := s.scrubState()
	if err != nil || st.Next != 0 || time.Since(st.Finished) > time.Minute {
		t.Fatalf("%+v, %v", st, err)
	}
	want := scrubTime{Finished: time.Now().Add(-time.Hour).UTC().Round(0), Next: 7}
	must(t, s.keepScrub(want))
	if st, err = s.scrubState(); err != nil || st != want {
		t.Errorf("%+v, %v, want %+v", st, err, want)
	}
	for _, bad := range []string{"", "{", `{"finished": "2999-01-01T00:00:00Z"}`} {
		must(t, os.WriteFile(filepath.Join(s.cfg.Root, scrubFile), []byte(bad), 0o600))
		if st, err := s.scrubState(); err != nil || st.Next != 0 || time.Since(st.Finished) > time.Minute || time.Since(st.Finished) < 0 {
			t.Errorf("%q: %+v, %v", bad, st, err)
		}
	}
}

// TestCompleteBeside: an image whose source hangs, and a reader of it, hold up nobody
// else's completion.
func TestCompleteBeside(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	configured(t, `{"cache": {"complete_after": "500ms"}}`)
	c := service(t)
	src, shut, open, asked := guarded(t, windowed(t))
	hung, err := c.Mount(background, src, Place{Where: "nowhere", Face: "device"}, nil)
	must(t, err)
	shut() // before anything is completed
	defer hung.FS.Close()
	eventually(t, "it is being completed", func() bool { return asked.Load() > 0 })
	read := make(chan error, 1)
	go func() {
		p, err := os.ReadFile(fmt.Sprintf("/proc/self/fd/%d/text", hung.FS.Fd()))
		if err == nil && !bytes.Equal(p, longText()) {
			err = errors.New("wrong bytes")
		}
		read <- err
	}()
	_, m := attachAs(t, c, layout(t), Place{Face: "device"})
	must(t, c.WaitComplete(background, m.ManifestDigest, nil))
	if st := mountStatus(t, c, hung.ID); st.MissingChunks == 0 {
		t.Errorf("%+v: it does not hang", st)
	}
	open()
	must(t, <-read)
}
