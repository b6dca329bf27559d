package runtime

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// TestLetGo unmounts file systems that were mounted when a container began: they end
// while it runs, whether mounts are shared or not. What its volumes lie on stays.
func TestLetGo(t *testing.T) {
	eachRuntime(t, func(t *testing.T, path string) {
		for name, how := range map[string]uintptr{"private": unix.MS_PRIVATE, "shared": unix.MS_SHARED} {
			t.Run(name, func(t *testing.T) {
				base := filepath.Join(t.TempDir(), "a b") // which mount tables escape
				tmpfs(t, base)
				if err := unix.Mount("", base, "", how, ""); err != nil {
					t.Fatal(err)
				}
				volume, other := filepath.Join(base, "volume"), filepath.Join(base, "other")
				tmpfs(t, volume)
				tmpfs(t, filepath.Join(volume, "below"))
				tmpfs(t, other)
				tmpfs(t, filepath.Join(other, "below"))
				tmpfs(t, other) // on top of it
				write(t, filepath.Join(volume, "below/f"), "data\n", 0o644)
				link := filepath.Join(t.TempDir(), "link")
				for to, from := range map[string]string{volume: filepath.Join(other, "link"), filepath.Join(other, "link"): link} {
					if err := os.Symlink(to, from); err != nil {
						t.Fatal(err)
					}
				}
				_, r := caller{Runtime: path, StateDir: newState(t), Root: newRoot(t), Remove: true,
					Mounts: []Mount{{Source: link, Destination: "/v"}},
					Config: Config{Args: []string{"/bin/sh", "-c", "cat /v/below/f; sleep 1000"}},
				}.start(t)
				await(t, r, "data")
				for range 2 {
					gone := watchEnd(t, other)
					if err := unix.Unmount(other, unix.MNT_DETACH); err != nil {
						t.Fatal(err)
					}
					gone()
				}
			})
		}
	})
}

// tmpfs mounts one until the test ends.
func tmpfs(t *testing.T, dir string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("test", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
}

// watchEnd returns a function that waits until the file system at dir is no more.
func watchEnd(t *testing.T, dir string) func() {
	t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if _, err := unix.InotifyAddWatch(fd, dir, unix.IN_DELETE_SELF); err != nil {
		t.Fatal(err)
	}
	return func() {
		t.Helper()
		buf := make([]byte, unix.SizeofInotifyEvent)
		for end := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
			if n, err := unix.Read(fd, buf); err == nil && n == len(buf) && binary.NativeEndian.Uint32(buf[4:])&unix.IN_UNMOUNT != 0 {
				return
			}
			if time.Now().After(end) {
				t.Errorf("%s is unmounted, and still in use", dir)
				return
			}
		}
	}
}

func TestCopies(t *testing.T) {
	mounts := []*mountinfo.Info{
		{ID: 1, Parent: 1, Mountpoint: "/"},
		{ID: 2, Parent: 1, Mountpoint: "/usr"},
		{ID: 3, Parent: 1, Mountpoint: "/usrlocal"},
		{ID: 4, Parent: 1, Mountpoint: "/mnt", Optional: "shared:3 master:7"},
		{ID: 5, Parent: 4, Mountpoint: "/mnt/follows"},
		{ID: 6, Parent: 5, Mountpoint: "/mnt/follows/not"},
		{ID: 7, Parent: 1, Mountpoint: "/srv"},
		{ID: 8, Parent: 7, Mountpoint: "/srv/a"},
		{ID: 9, Parent: 8, Mountpoint: "/srv/a/b"},
		{ID: 10, Parent: 7, Mountpoint: "/srv/ab"},
		{ID: 11, Parent: 1, Mountpoint: "/proc/sys/x"},
	}
	for _, c := range []struct {
		needed string
		want   []string
	}{
		{"/nothing", []string{"/usrlocal", "/mnt", "/mnt/follows/not", "/srv", "/srv/a", "/srv/a/b", "/srv/ab"}},
		{"/srv/a/c", []string{"/usrlocal", "/mnt", "/mnt/follows/not", "/srv/a/b", "/srv/ab"}},
		{"/srv/a", []string{"/usrlocal", "/mnt", "/mnt/follows/not", "/srv/ab"}},
		{"/mnt/follows/not", []string{"/usrlocal", "/srv", "/srv/a", "/srv/a/b", "/srv/ab"}},
		{"/", nil},
	} {
		if got := copies(mounts, append([]string{c.needed}, systemDirs...)); !slices.Equal(got, c.want) {
			t.Errorf("%s: %q, want %q", c.needed, got, c.want)
		}
	}
}
