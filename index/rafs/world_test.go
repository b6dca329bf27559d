package rafs

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// tool finds a program of Nydus: on the PATH, or beside $NYDUS_IMAGE.
func tool(t *testing.T, name string) string {
	t.Helper()
	if p := os.Getenv("NYDUS_IMAGE"); p != "" {
		p = filepath.Join(filepath.Dir(p), name)
		if _, err := os.Stat(p); err == nil {
			return p
		}
	}
	p, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("%s is not on the PATH and not beside $NYDUS_IMAGE", name)
	}
	return p
}

// save writes an image to a directory: boot, and each blob under its id.
func save(t *testing.T, boot []byte, blobs [][]byte, ids []string) (path string) {
	t.Helper()
	d := t.TempDir()
	for i, p := range blobs {
		if err := os.WriteFile(filepath.Join(d, ids[i]), p, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	path = filepath.Join(d, "boot")
	if err := os.WriteFile(path, boot, 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func (w *written) save(t *testing.T) string {
	ids := make([]string, len(w.infos))
	for i := range ids {
		ids[i] = w.infos[i].ID
	}
	return save(t, w.boot, w.blobs, ids)
}

// devices decodes blobs to where the kernel wants them: content by address.
func devices(t *testing.T, im *Image, tr *index.Tree, blobs [][]byte) (paths []string) {
	t.Helper()
	d := t.TempDir()
	for i, b := range im.Blobs() {
		path := filepath.Join(d, fmt.Sprint("device", i))
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := f.Truncate(int64(b.Span)); err != nil {
			t.Fatal(err)
		}
		_, offsets := b.Spans()
		for k, r := range b.Chunks {
			p, err := decode(tr, index.Chunk{Size: r.Size, Blob: uint32(i), Offset: offsets[k]}, blobs[i])
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.WriteAt(p, int64(r.Addr)); err != nil {
				t.Fatal(err)
			}
		}
		paths = append(paths, path)
	}
	return paths
}

// mountKernel mounts a bootstrap with nothing but the kernel.
func mountKernel(t *testing.T, boot string, devices []string) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("mounting needs root")
	}
	fs, err := unix.Fsopen("erofs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		t.Skipf("the kernel has no EROFS: %v", err)
	}
	defer unix.Close(fs)
	fail := func(what string, err error) {
		t.Helper()
		if err == nil {
			return
		}
		log := make([]byte, 4096)
		n, _ := unix.Read(fs, log)
		t.Fatalf("%s: %v: %s", what, err, log[:max(n, 0)])
	}
	fail("source", unix.FsconfigSetString(fs, "source", boot))
	for _, d := range devices {
		fail("device", unix.FsconfigSetString(fs, "device", d))
	}
	if err := unix.FsconfigCreate(fs); err == unix.ENOTBLK {
		t.Skip("the kernel mounts no files as EROFS (needs Linux 6.12)")
	} else {
		fail("create", err)
	}
	m, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY)
	fail("fsmount", err)
	defer unix.Close(m)
	dir := t.TempDir()
	if err := unix.MoveMount(m, "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount: %v", err)
			unix.Unmount(dir, unix.MNT_DETACH)
		}
	})
	return dir
}

// compare compares a mounted tree with the one meant.
func compare(t *testing.T, dir string, tr *index.Tree, content map[*index.Inode][]byte) {
	t.Helper()
	inodes := map[*index.Inode]uint64{}
	n := 0
	err := tr.Walk(func(path string, ino *index.Inode) error {
		n++
		full := filepath.Join(dir, path)
		var st unix.Stat_t
		if err := unix.Lstat(full, &st); err != nil {
			t.Errorf("%s: %v", path, err)
			return nil
		}
		if st.Mode != ino.Mode || st.Uid != ino.UID || st.Gid != ino.GID || st.Mtim.Sec != ino.Mtime.Sec || st.Rdev != ino.Rdev ||
			st.Mtim.Nsec != int64(ino.Mtime.Nsec) || ino.IsRegular() && st.Size != ino.Size {
			t.Errorf("%s is mode %o, %d:%d, %d.%d, rdev %#x, %d bytes; want %+v", path, st.Mode, st.Uid, st.Gid, st.Mtim.Sec, st.Mtim.Nsec, st.Rdev, st.Size, ino)
		}
		if old, ok := inodes[ino]; ok && old != st.Ino {
			t.Errorf("%s is inode %d, its other name %d", path, st.Ino, old)
		}
		inodes[ino] = st.Ino
		for _, x := range ino.Xattrs {
			p := make([]byte, 256)
			k, err := unix.Lgetxattr(full, x.Name, p)
			if err != nil || string(p[:k]) != x.Value {
				t.Errorf("%s: %s is %q, %v; want %q", path, x.Name, p[:max(k, 0)], err, x.Value)
			}
		}
		switch ino.Type() {
		case syscall.S_IFREG:
			if p, err := os.ReadFile(full); err != nil || !bytes.Equal(p, content[ino]) {
				t.Errorf("%s: %d bytes, %v; want %d other ones", path, len(p), err, len(content[ino]))
			}
		case syscall.S_IFLNK:
			if p, err := os.Readlink(full); err != nil || p != ino.Target {
				t.Errorf("%s -> %q, %v; want %q", path, p, err, ino.Target)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	filepath.WalkDir(dir, func(string, os.DirEntry, error) error { n--; return nil })
	if n != 0 {
		t.Errorf("%d names are missing", n)
	}
}

// contents decodes files by their extents.
func contents(t *testing.T, tr *index.Tree, blobs [][]byte) map[*index.Inode][]byte {
	m := map[*index.Inode][]byte{}
	tr.Walk(func(path string, ino *index.Inode) error {
		m[ino] = make([]byte, max(ino.Size, 0))
		for _, e := range ino.Extents {
			c := tr.Chunks[e.Chunk]
			p, err := decode(tr, c, blobs[c.Blob])
			if err != nil {
				t.Fatalf("%s: %v", path, err)
			}
			copy(m[ino][e.Off:], p)
		}
		return nil
	})
	return m
}

func TestKernelMountsOurs(t *testing.T) {
	options(func(o kind) {
		t.Run(o.String(), func(t *testing.T) {
			w := sample(t, o)
			compare(t, mountKernel(t, w.save(t), devices(t, open(t, w.boot), w.tree, w.blobs)), w.tree, w.content)
		})
	})
}

// TestKernelAgrees holds our reading of foreign images against the kernel's.
func TestKernelAgrees(t *testing.T) {
	for name, s := range sources(t) {
		t.Run(name, func(t *testing.T) {
			im, tr := open(t, s[0], s[2]), tree(t, s[0], s[2])
			blobs := [][]byte{s[1]}
			compare(t, mountKernel(t, save(t, s[0], nil, nil), devices(t, im, tr, blobs)), tr, contents(t, tr, blobs))
		})
	}
}

func TestNydusImageChecks(t *testing.T) {
	check := tool(t, "nydus-image")
	options(func(o kind) {
		t.Run(o.String(), func(t *testing.T) {
			boot := sample(t, o).save(t)
			out, err := exec.Command(check, "check", "--bootstrap", boot, "--blob-dir", filepath.Dir(boot), "--verbose").CombinedOutput()
			if err != nil || !strings.Contains(string(out), "is valid") {
				t.Errorf("%v\n%s", err, out)
			}
		})
	})
	var boot bytes.Buffer
	if err := WriteBootstrap(&boot, &index.Tree{Root: dir(0o755, nil)}, nil, BlobOptions{1 << 20, chunk.Zstd, chunk.BLAKE3}); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(check, "check", "--bootstrap", save(t, boot.Bytes(), nil, nil)).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "is valid") {
		t.Errorf("empty image: %v\n%s", err, out)
	}
}

// TestNydusdServes lets Nydus' own FUSE server show our images: it reads
// chunk info, digests and data from the blobs.
func TestNydusdServes(t *testing.T) {
	nydusd := tool(t, "nydusd")
	if os.Getuid() != 0 {
		t.Skip("mounting needs root")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skip(err)
	}
	options(func(o kind) {
		t.Run(o.String(), func(t *testing.T) {
			w := sample(t, o)
			boot, dir, work := w.save(t), t.TempDir(), t.TempDir()
			config := filepath.Join(work, "config.json")
			if err := os.WriteFile(config, fmt.Appendf(nil, `{"device":{"backend":{"type":"localfs","config":{"dir":%q}},
				"cache":{"type":"blobcache","validate":true,"config":{"work_dir":%q}}},"mode":"direct","digest_validate":false,
				"enable_xattr":true}`, filepath.Dir(boot), work), 0o644); err != nil {
				t.Fatal(err)
			}
			var log bytes.Buffer
			cmd := exec.Command(nydusd, "fuse", "--config", config, "--mountpoint", dir, "--bootstrap", boot, "--log-level", "warn",
				"--apisock", filepath.Join(work, "api"), "--rlimit-nofile", "0")
			cmd.Stdout, cmd.Stderr = &log, &log
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil && !t.Failed() {
					t.Errorf("unmount: %v", err)
				}
				cmd.Process.Kill()
				cmd.Wait()
				if t.Failed() {
					t.Logf("nydusd: %s", log.Bytes())
				}
			})
			for range 500 {
				var st, up unix.Stat_t
				unix.Stat(dir, &st)
				unix.Stat(filepath.Dir(dir), &up)
				if st.Dev != up.Dev {
					compare(t, dir, w.tree, w.content)
					return
				}
				time.Sleep(20 * time.Millisecond)
			}
			t.Fatal("nydusd does not mount")
		})
	})
}
