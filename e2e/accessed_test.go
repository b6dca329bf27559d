package e2e

import (
	"context"
	"encoding/json"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/daemon"
	"github.com/shale-image/shale/mount"
)

// cached asks the kernel how many pages of a file it has in memory (cachestat(2),
// Linux 6.5). That reads none of it.
func cached(t *testing.T, name string) uint64 {
	t.Helper()
	const sysCachestat = 451 // on all architectures
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var all struct{ off, len uint64 } // 0 bytes: to the end
	var st struct{ cache, dirty, writeback, evicted, recent uint64 }
	_, _, errno := unix.Syscall6(sysCachestat, f.Fd(), uintptr(unsafe.Pointer(&all)), uintptr(unsafe.Pointer(&st)), 0, 0, 0)
	if errno == unix.ENOSYS {
		t.Skip("the kernel has no cachestat (Linux 6.5)")
	}
	if errno != 0 {
		t.Fatalf("cachestat %s: %v", name, errno)
	}
	return st.cache + st.evicted
}

// TestAccessed: the kernel's page cache says which files of a mount were read, and
// `shale accessed` says the same. Neither sees reads of files without content.
func TestAccessed(t *testing.T) {
	w := setup(t)
	n := w.node(t)
	ref := w.registry.Host() + "/" + name
	n.shale(0, "pull", "-q", ref) // starts the service
	c := &daemon.Client{Root: n.root}
	m, err := c.Mount(context.Background(), daemon.Source{Ref: ref}, daemon.Place{Where: n.mnt, Face: "device", ReadAheadKiB: 4, NoPack: true}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer m.FS.Close()
	if err := mount.Attach(m.FS, n.mnt); err != nil {
		t.Fatal(err)
	}
	m.FS.Close()
	for _, args := range [][]string{
		{"/usr/bin/python3", "-c", "import json, sqlite3, email.message, http.client; print(json.dumps([1]))"},
		{"/bin/sh", "-c", "ls /etc; head -c 100 /usr/bin/perl >/var/empty || cat /etc/debian_version; grep -c . /etc/services"},
	} {
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Dir, cmd.SysProcAttr = "/", &syscall.SysProcAttr{Chroot: n.mnt}
		if out, err := cmd.CombinedOutput(); err != nil && args[0] != "/bin/sh" {
			t.Fatalf("%q: %v\n%s", args, err, out)
		}
	}
	// What the kernel has of each file, by inode: several names may be one file.
	seen, inode := map[uint64]string{}, map[string]uint64{}
	files := 0
	err = filepath.WalkDir(n.mnt, func(name string, de fs.DirEntry, err error) error {
		if err != nil || !de.Type().IsRegular() {
			return err
		}
		st, err := de.Info()
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(n.mnt, name)
		inode[rel] = st.Sys().(*syscall.Stat_t).Ino
		files++
		if cached(t, name) > 0 {
			seen[inode[rel]] = rel
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Unmount(n.mnt, 0); err != nil {
		t.Fatal(err)
	}
	var got struct {
		Files []struct {
			Path   string
			Others int
			Also   []string
		}
		Packages []struct{ Name, Status string }
	}
	if err := json.Unmarshal([]byte(n.shale(0, "accessed", "--json", ref)), &got); err != nil {
		t.Fatal(err)
	}
	said := map[uint64]bool{}     // surely
	possibly := map[uint64]bool{} // or one with the same content
	ambiguous := 0
	for _, f := range got.Files {
		names := append([]string{f.Path}, f.Also...)
		if f.Others > 0 {
			ambiguous++
			for _, name := range names {
				possibly[inode[name]] = true
			}
			if f.Others == len(f.Also) && !slices.ContainsFunc(names, func(name string) bool { return seen[inode[name]] != "" }) {
				t.Errorf("said to be read: one of %q; the kernel has none of them", names)
			}
			continue
		}
		said[inode[f.Path]] = true
		if seen[inode[f.Path]] == "" {
			t.Errorf("said to be read: %s; the kernel has nothing of it", f.Path)
		}
	}
	for ino, name := range seen {
		if !said[ino] && !possibly[ino] {
			t.Errorf("the kernel has some of %s, which is not said to be read", name)
		}
	}
	if len(seen) < 50 || files < 5000 || len(seen) == files {
		t.Errorf("the kernel has %d of %d files: no test", len(seen), files)
	}
	status := map[string]string{}
	for _, p := range got.Packages {
		status[p.Name] = p.Status
	}
	for name, want := range map[string]string{"libc6": "read", "python3.11-minimal": "read", "libpython3.11-stdlib": "read", "tar": "never"} {
		if status[name] != want {
			t.Errorf("package %s: %q, want %s", name, status[name], want)
		}
	}
	t.Logf("%d of %d files were read as the kernel has it, %d are said to be, %d of them ambiguous", len(seen), files, len(got.Files), ambiguous)
}
