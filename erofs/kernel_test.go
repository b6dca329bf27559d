package erofs

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/index"
)

// kernelMount mounts an image from regular files and returns where. It is
// unmounted when the test ends.
func kernelMount(t testing.TB, source string, devices ...string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	fs, err := unix.Fsopen("erofs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		t.Skipf("the kernel has no erofs: fsopen: %v", err)
	}
	defer unix.Close(fs)
	check := func(what string, err error) {
		if err == nil {
			return
		}
		if errors.Is(err, unix.ENOTBLK) {
			t.Skip("the kernel has no file-backed EROFS mounts (Linux 6.12)")
		}
		log := make([]byte, 4096) // the kernel's own words
		n, _ := unix.Read(fs, log)
		t.Fatalf("%s: %v: %s", what, err, log[:max(n, 0)])
	}
	check("source", unix.FsconfigSetString(fs, "source", source))
	for _, d := range devices {
		check("device", unix.FsconfigSetString(fs, "device", d))
	}
	check("create", unix.FsconfigCreate(fs))
	m, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NODEV)
	check("fsmount", err)
	defer unix.Close(m)
	dir := t.TempDir()
	check("move_mount", unix.MoveMount(m, "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH))
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount: %v", err)
			unix.Unmount(dir, unix.MNT_DETACH)
		}
	})
	return dir
}

// statInode is an inode as the kernel shows it, and its inode and link numbers.
func statInode(t testing.TB, path string) (attributes, uint64, uint64) {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatal(err)
	}
	a := attributes{Mode: st.Mode, UID: st.Uid, GID: st.Gid, Mtime: index.Time{Sec: st.Mtim.Sec, Nsec: uint32(st.Mtim.Nsec)}, Rdev: st.Rdev}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		a.Size = st.Size
	case unix.S_IFLNK:
		buf := make([]byte, 2*BlockSize)
		n, err := unix.Readlink(path, buf)
		if err != nil || int64(n) != st.Size {
			t.Errorf("%s: readlink: %d bytes of %d, %v", path, n, st.Size, err)
		}
		a.Target = string(buf[:max(n, 0)])
	}
	names := make([]byte, 1<<16)
	n, err := unix.Llistxattr(path, names)
	if err != nil {
		t.Fatalf("%s: listxattr: %v", path, err)
	}
	for name := range strings.SplitSeq(string(names[:n]), "\x00") {
		if name == "" {
			continue
		}
		value := make([]byte, 1<<16)
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			t.Errorf("%s: getxattr %s: %v", path, name, err)
		}
		a.Xattrs = append(a.Xattrs, index.Xattr{Name: name, Value: string(value[:max(n, 0)])})
	}
	a.Xattrs = byName(a.Xattrs)
	return a, st.Ino, st.Nlink
}

// compareMount compares a mounted image with the world, by descriptors: paths
// may be longer than the kernel takes.
func (w *world) compareMount(t *testing.T, mnt string) {
	t.Helper()
	links := map[*index.Inode]uint64{}
	w.tree.Walk(func(_ string, ino *index.Inode) error {
		links[ino]++
		for _, c := range ino.Children {
			if c.IsDir() {
				links[ino]++
			}
		}
		if ino.IsDir() {
			links[ino]++ // "."
		}
		return nil
	})
	numbers, owners := map[*index.Inode]uint64{}, map[uint64]*index.Inode{}
	var walk func(path, label string, ino *index.Inode)
	walk = func(path, label string, ino *index.Inode) {
		got, number, nlink := statInode(t, path)
		if want := facts(ino); fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%.200s:\n got %.2000q\nwant %.2000q", label, fmt.Sprint(got), fmt.Sprint(want))
		}
		if nlink != links[ino] {
			t.Errorf("%.200s: %d links, want %d", label, nlink, links[ino])
		}
		if n, known := numbers[ino]; known && n != number || owners[number] != nil && owners[number] != ino {
			t.Errorf("%.200s: inode number %d is not shared as it should be", label, number)
		}
		numbers[ino], owners[number] = number, ino
		switch {
		case ino.IsRegular():
			w.compareFile(t, path, label, ino)
		case ino.IsDir():
			f, err := os.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			names, err := f.Readdirnames(-1)
			if err != nil {
				t.Fatal(err)
			}
			slices.Sort(names)
			if !slices.Equal(names, ino.Names()) {
				t.Errorf("%.200s: %d names, want %d", label, len(names), len(ino.Children))
				return
			}
			for _, name := range names {
				walk(fmt.Sprintf("/proc/self/fd/%d/%s", f.Fd(), name), label+"/"+name, ino.Children[name])
			}
		}
	}
	f, err := os.Open(mnt)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	walk(fmt.Sprintf("/proc/self/fd/%d/.", f.Fd()), "", w.tree.Root)
}

// compareFile reads a file whole, or a huge one around its ends.
func (w *world) compareFile(t *testing.T, path, label string, ino *index.Inode) {
	f, err := os.Open(path)
	if err != nil {
		t.Error(err)
		return
	}
	defer f.Close()
	offs, step := []int64{0}, ino.Size
	if ino.Size > 64<<20 {
		step = 1 << 16
		offs = append(offs, ino.Size/2, ino.Size-step)
	}
	for _, off := range offs {
		got := make([]byte, step)
		if n, err := f.ReadAt(got, off); int64(n) != step {
			t.Errorf("%s: read %d bytes of %d at %d: %v", label, n, step, off, err)
		}
		if !bytes.Equal(got, w.content(ino, off, int(step))) {
			t.Errorf("%s: wrong bytes after offset %d", label, off)
		}
	}
}

func TestKernel(t *testing.T) {
	w := awkward()
	for i, bits := range []uint8{0, 0, BlockBits} {
		o := w.options()
		o.ChunkBits, o.FlatAlign, o.Flat = bits, 4, i == 1
		if i == 2 { // files of exabytes in blocks have too many entries
			delete(w.tree.Root.Children, "huge")
			delete(w.tree.Root.Children, "endless")
		}
		l, img := w.build(t, o)
		meta, devices, flat := w.store(t, l, img)
		t.Run(fmt.Sprintf("devices,bits=%d,flat=%t", bits, o.Flat), func(t *testing.T) { w.compareMount(t, kernelMount(t, meta, devices...)) })
		t.Run(fmt.Sprintf("mapped,bits=%d,flat=%t", bits, o.Flat), func(t *testing.T) { w.compareMount(t, kernelMount(t, flat)) })
	}
}

func TestKernelManyDevices(t *testing.T) {
	w := newWorld(500)
	for i := range w.devices {
		c := w.chunk(i+1, 5000, i%3)
		w.tree.Root.Children[fmt.Sprint("file", i)] = w.file(5000, index.Extent{Chunk: c})
	}
	for _, flat := range []bool{false, true} {
		o := w.options()
		o.Flat = flat
		l, img := w.build(t, o)
		meta, devices, mapped := w.store(t, l, img)
		w.compareMount(t, kernelMount(t, meta, devices...))
		w.compareMount(t, kernelMount(t, mapped))
	}
}

// Without a device there is no data, and the image needs no device table.
func TestKernelNoDevice(t *testing.T) {
	w := newWorld(0)
	w.tree.Root.Children["hole"] = w.file(1 << 20)
	w.tree.Root.Children["empty"] = w.file(0)
	l, img := w.build(t, w.options())
	meta, _, _ := w.store(t, l, img)
	w.compareMount(t, kernelMount(t, meta))
	w.tree.Root.Children = nil
	_, img = w.build(t, w.options())
	if im, _, _ := read(t, img); im.Super().FeatureIncompat != 0 {
		t.Errorf("an empty tree needs features %#x", im.Super().FeatureIncompat)
	}
}

func tool(t testing.TB, name string) string {
	t.Helper()
	p, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("%s (erofs-utils) is not installed", name)
	}
	return p
}

func run(t testing.TB, cmd string, args ...string) []byte {
	t.Helper()
	out, err := exec.Command(cmd, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", cmd, args, err, out)
	}
	return out
}

// fsck.erofs reads every inode and, with --extract, all data.
func TestFsck(t *testing.T) {
	fsck := tool(t, "fsck.erofs")
	w := awkward()
	delete(w.tree.Root.Children, "huge") // it would read all these zeros
	delete(w.tree.Root.Children, "endless")
	l, img := w.build(t, w.options())
	meta, devices, _ := w.store(t, l, img)
	args := []string{"--extract"}
	for _, d := range devices {
		args = append(args, "--device="+d)
	}
	if out := run(t, fsck, append(args, meta)...); bytes.Contains(out, []byte("<E>")) || bytes.Contains(out, []byte("<W>")) {
		t.Errorf("fsck.erofs: %s", out)
	}

	// It only says so, and exits with 0, when the checksum is wrong.
	img[superOff+sbChecksum]++
	bad, _, _ := w.store(t, l, img)
	if out := run(t, fsck, append(args, bad)...); !bytes.Contains(out, []byte("<E>")) {
		t.Errorf("fsck.erofs accepts a wrong checksum: %s", out)
	}
}

// What mkfs.erofs writes (compact inodes, shared attributes) is what we read.
func TestReadMkfs(t *testing.T) {
	mkfs := tool(t, "mkfs.erofs")
	if os.Geteuid() != 0 {
		t.Skip("attributes and devices need root")
	}
	base := t.TempDir()
	src, blob, out := filepath.Join(base, "src"), filepath.Join(base, "blob"), filepath.Join(base, "out")
	write := func(name string, n int) {
		p := filepath.Join(src, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, bytes.Repeat([]byte(name), n), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 300 {
		write(fmt.Sprintf("dir/a-file-with-a-long-name-%d", i), i*40)
	}
	write("empty", 0)
	for i := range 20 { // often enough for mkfs to share them
		write(fmt.Sprint("attr", i), 3)
		for _, x := range []string{"user.shared", "trusted.too"} {
			if err := unix.Setxattr(filepath.Join(src, fmt.Sprint("attr", i)), x, []byte("value\x00"), 0); err != nil {
				t.Skipf("the file system keeps no attributes: %v", err)
			}
		}
	}
	for _, err := range []error{
		os.Symlink("target", filepath.Join(src, "symlink")), os.Link(filepath.Join(src, "attr1"), filepath.Join(src, "hard")),
		unix.Mknod(filepath.Join(src, "dev"), unix.S_IFCHR|0o600, int(unix.Mkdev(300, 70000))), os.Chown(filepath.Join(src, "attr2"), 1<<20, 5),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, times := range []string{"--preserve-mtime", "--ignore-mtime"} {
		run(t, mkfs, "--quiet", times, "-T1600000000", "--chunksize=4096", "--blobdev="+blob, out, src)
		img, err := os.ReadFile(out)
		if err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(blob)
		if err != nil {
			t.Fatal(err)
		}
		im, tree, runs := read(t, img)
		if len(im.Devices()) != 1 || len(runs) != 300-1+20 {
			t.Errorf("%d devices, %d files with data", len(im.Devices()), len(runs))
		}
		mnt := kernelMount(t, out, blob)
		tree.Walk(func(path string, ino *index.Inode) error {
			got, _, _ := statInode(t, filepath.Join(mnt, path))
			if want := facts(ino); fmt.Sprint(got) != fmt.Sprint(want) {
				t.Errorf("%s:\nkernel %q\n  tree %q", path, fmt.Sprint(got), fmt.Sprint(want))
			}
			if rs, ok := runs[path]; ok {
				want, _ := os.ReadFile(filepath.Join(src, path))
				var have []byte
				for _, r := range rs {
					have = append(have, data[int64(r.Block)*BlockSize:][:r.Length]...)
				}
				if !bytes.Equal(have, want) {
					t.Errorf("%s: wrong data", path)
				}
			}
			return nil
		})
		if tree.Root.Children["hard"] != tree.Root.Children["attr1"] {
			t.Error("a hard link is lost")
		}
	}
}
