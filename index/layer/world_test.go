package layer_test

import (
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/layer"
)

// image is a tree with the contents of its files.
type image struct {
	tree *index.Tree
	data map[*index.Inode]content
}

// content is what an archive stores of a file.
type content struct {
	fragments []layer.Fragment
	stored    []byte
}

// bytes returns the file as it reads.
func (c content) bytes(size int64) []byte {
	p := make([]byte, size)
	stored := c.stored
	for _, f := range c.fragments {
		copy(p[f.Off:f.Off+f.Length], stored)
		stored = stored[f.Length:]
	}
	return p
}

func newImage() *image {
	return &image{index.NewTree(), map[*index.Inode]content{}}
}

// apply reads an archive, in any compression, onto the image.
func (i *image) apply(r io.Reader) error {
	rc, _, err := layer.Decompress(r, index.Limits{})
	if err != nil {
		return err
	}
	defer rc.Close()
	in := layer.NewReader(rc, "test layer", index.Limits{})
	to := i.tree.Begin()
	for {
		e, err := in.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		stored, err := io.ReadAll(in)
		if err != nil {
			return err
		}
		if err := to.Apply(e.Change); err != nil {
			return err
		}
		if len(stored) > 0 {
			i.data[e.Inode] = content{e.Fragments, stored}
		}
	}
}

// list writes one line for each name of the tree, with everything a file
// system would tell about it.
func (i *image) list(t *testing.T) []string {
	t.Helper()
	var lines []string
	first := map[*index.Inode]string{}
	err := i.tree.Walk(func(path string, ino *index.Inode) error {
		if first[ino] == "" {
			first[ino] = path
		}
		line := describe(path, ino.Mode, ino.UID, ino.GID, ino.Rdev, ino.Mtime, ino.Target, ino.Xattrs, first[ino])
		if ino.IsRegular() {
			line += sum(i.data[ino].bytes(ino.Size))
		}
		lines = append(lines, line)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

func describe(path string, mode, uid, gid uint32, rdev uint64, mtime index.Time, target string, xattrs []index.Xattr, first string) string {
	return fmt.Sprintf("%q %#o %d:%d rdev=%d mtime=%d.%09d ->%q xattrs=%q same=%q", path, mode, uid, gid, rdev, mtime.Sec, mtime.Nsec, target, xattrs, first)
}

func sum(p []byte) string {
	return fmt.Sprintf(" %d bytes %x", len(p), fnv(p))
}

func fnv(p []byte) (h uint64) {
	h = 14695981039346656037
	for _, c := range p {
		h = (h ^ uint64(c)) * 1099511628211
	}
	return h
}

// listDisk writes the lines of list for a directory.
func listDisk(t *testing.T, root string) []string {
	t.Helper()
	var lines []string
	first := map[uint64]string{}
	var walk func(path string)
	walk = func(path string) {
		full := filepath.Join(root, path)
		var st syscall.Stat_t
		if err := syscall.Lstat(full, &st); err != nil {
			t.Fatal(err)
		}
		if _, ok := first[st.Ino]; !ok {
			first[st.Ino] = path
		}
		var rdev uint64
		target := ""
		switch st.Mode & syscall.S_IFMT {
		case syscall.S_IFCHR, syscall.S_IFBLK:
			rdev = st.Rdev
		case syscall.S_IFLNK:
			target, _ = os.Readlink(full)
		}
		mtime := index.Time{Sec: st.Mtim.Sec, Nsec: uint32(st.Mtim.Nsec)}
		line := describe(path, st.Mode, st.Uid, st.Gid, rdev, mtime, target, diskXattrs(t, full), first[st.Ino])
		if st.Mode&syscall.S_IFMT == syscall.S_IFREG {
			p, err := os.ReadFile(full)
			if err != nil {
				t.Fatal(err)
			}
			line += sum(p)
		}
		lines = append(lines, line)
		if st.Mode&syscall.S_IFMT != syscall.S_IFDIR {
			return
		}
		entries, err := os.ReadDir(full)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			walk(filepath.Join(path, e.Name()))
		}
	}
	walk("")
	return lines
}

func diskXattrs(t *testing.T, path string) (out []index.Xattr) {
	t.Helper()
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, buf)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		if name == "" {
			continue
		}
		value := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, index.Xattr{Name: name, Value: string(value[:n])})
	}
	slices.SortFunc(out, func(a, b index.Xattr) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// diff fails the test where two lists differ.
func diff(t *testing.T, got, want []string) {
	t.Helper()
	in := func(list []string) map[string]bool {
		m := map[string]bool{}
		for _, s := range list {
			m[s] = true
		}
		return m
	}
	g, w := in(got), in(want)
	for _, s := range want {
		if !g[s] {
			t.Errorf("missing: %s", s)
		}
	}
	for _, s := range got {
		if !w[s] {
			t.Errorf("extra:   %s", s)
		}
	}
}

// world is what the tree on disk has.
type world struct {
	long, xattrs, special, bigIDs, old, big bool
}

// makeWorld fills a directory with awkward files.
func makeWorld(t testing.TB, root string, w world) {
	t.Helper()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	at := func(name string) string { return filepath.Join(root, name) }
	write := func(name, data string) { check(os.WriteFile(at(name), []byte(data), 0o644)) }

	for _, d := range []string{"bin", "empty dir", "deep", "deep/er", "sticky"} {
		check(os.Mkdir(at(d), 0o755))
	}
	check(unix.Chmod(at("sticky"), 0o1777))
	write("empty", "")
	write("one", "1")
	write("block", strings.Repeat("b", 512))
	write("block+1", strings.Repeat("c", 513))
	write("bin/su", "#!/bin/sh\n")
	check(unix.Chmod(at("bin/su"), 0o6755))
	write("secret", "x")
	check(os.Chmod(at("secret"), 0))
	write("not utf-8 \xff\xfe", "latin")
	write("new\nline", "n")
	write("deep/er/blank ", " ")
	write("-dash", "-")
	check(os.Link(at("one"), at("deep/link to one")))
	check(os.Link(at("one"), at("another")))
	check(os.Symlink("../one", at("deep/symlink")))
	check(os.Symlink("/nowhere", at("absolute")))
	check(os.Link(at("absolute"), at("link to a symlink")))
	check(os.Lchown(at("absolute"), 12, 34))
	if w.special {
		check(unix.Mkfifo(at("fifo"), 0o640))
		check(unix.Mknod(at("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
		check(unix.Mknod(at("disk"), unix.S_IFBLK|0o660, int(unix.Mkdev(259, 70000))))
		check(os.Link(at("null"), at("null too")))
	}
	if w.long {
		name := strings.Repeat("n", 255)
		dir := strings.Repeat("d", 120)
		check(os.MkdirAll(at(dir+"/"+dir), 0o755))
		write(dir+"/"+dir+"/"+name, "long")
		check(os.Symlink(strings.Repeat("t/", 1500), at("long symlink")))
		check(os.Link(at(dir+"/"+dir+"/"+name), at(dir+"/link")))
		write(strings.Repeat("h", 100), "a hundred")
		write(dir+"/ "+strings.Repeat("i", 90), "in a prefix")
	}
	if w.xattrs {
		for name, value := range map[string]string{
			"user.empty": "", "user.text": "hello", "user.binary": "a\x00\n=\xff", "user.odd=name %": "v", "trusted.t": "t",
			"security.capability": "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
		} {
			check(unix.Setxattr(at("block"), name, []byte(value), 0))
		}
		check(unix.Setxattr(at("deep"), "user.dir", []byte("d"), 0))
		check(unix.Setxattr(at("deep/er"), "user.long", bytes.Repeat([]byte("v"), 2000), 0))
	}
	if w.big {
		sparse := func(name string, size int64, data map[int64]string) {
			f, err := os.Create(at(name))
			check(err)
			check(f.Truncate(size))
			for off, s := range data {
				_, err := f.WriteAt([]byte(s), off)
				check(err)
			}
			check(f.Close())
		}
		sparse("hole only", 1<<20, nil)
		sparse("hole at the end", 300000, map[int64]string{0: "start"})
		sparse("hole at the start", 300000, map[int64]string{299990: "0123456789"})
		many := map[int64]string{}
		for i := range int64(60) {
			many[i*32768+i] = fmt.Sprintf("fragment %d", i)
		}
		sparse("many holes", 60*32768+17, many)
	}
	if w.bigIDs {
		check(os.Lchown(at("one"), 3000000, 4294967290))
		check(os.Lchown(at("deep"), 65534, 100000))
	}
	when := time.Unix(1700000000, 123456789)
	check(filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		ts := unix.NsecToTimespec(when.UnixNano())
		return unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW)
	}))
	if w.old {
		for name, ts := range map[string]unix.Timespec{
			"empty": {Sec: -1000000, Nsec: 250000000}, "one": {Sec: -1, Nsec: 1}, "block": {Sec: 0}, "block+1": {Sec: 1 << 33},
		} {
			check(unix.UtimesNanoAt(unix.AT_FDCWD, at(name), []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW))
		}
	}
}

func need(t *testing.T, tool string) {
	t.Helper()
	if _, err := exec.LookPath(tool); err != nil {
		t.Skipf("%s is not installed", tool)
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root: owners, devices and trusted xattrs are part of the test")
	}
}

func run(t testing.TB, name string, args ...string) []byte {
	t.Helper()
	cmd := exec.Command(name, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, &errs)
	}
	return out.Bytes()
}

// compare reads an archive and checks that the tree is what GNU tar extracts.
func compare(t *testing.T, archive []byte) {
	t.Helper()
	dir := t.TempDir()
	file, root := filepath.Join(dir, "archive"), filepath.Join(dir, "root")
	if err := os.WriteFile(file, archive, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(root, 0o755); err != nil {
		t.Fatal(err)
	}
	run(t, "tar", "--numeric-owner", "--xattrs", "--xattrs-include=*", "--same-owner",
		"--delay-directory-restore", "--warning=no-timestamp", "-xpf", file, "-C", root)
	compareDisk(t, archive, root)
}

// compareDisk reads an archive and checks that the tree is that of a directory.
func compareDisk(t *testing.T, archive []byte, root string) {
	t.Helper()
	img := newImage()
	if err := img.apply(bytes.NewReader(archive)); err != nil {
		t.Fatal(err)
	}
	diff(t, img.list(t), listDisk(t, root))
}

func TestAgainstTar(t *testing.T) {
	need(t, "tar")
	all := world{long: true, xattrs: true, special: true, bigIDs: true, old: true, big: true}
	noXattrs := all
	noXattrs.xattrs = false
	for _, test := range []struct {
		name  string
		world world
		tool  string
		args  []string
	}{
		{"v7", world{}, "tar", []string{"--format=v7", "-c"}},
		{"ustar", world{special: true}, "tar", []string{"--format=ustar", "-c"}},
		{"gnu", noXattrs, "tar", []string{"--format=gnu", "-c"}},
		{"oldgnu", noXattrs, "tar", []string{"--format=oldgnu", "-c"}},
		{"gnu sparse", noXattrs, "tar", []string{"--format=gnu", "--sparse", "-c"}},
		{"posix", all, "tar", []string{"--format=posix", "--xattrs", "--xattrs-include=*", "-c"}},
		{"posix sparse 0.0", all, "tar", []string{"--format=posix", "--xattrs", "--xattrs-include=*", "--sparse", "--sparse-version=0.0", "-c"}},
		{"posix sparse 0.1", all, "tar", []string{"--format=posix", "--xattrs", "--xattrs-include=*", "--sparse", "--sparse-version=0.1", "-c"}},
		{"posix sparse 1.0", all, "tar", []string{"--format=posix", "--xattrs", "--xattrs-include=*", "--sparse", "--sparse-version=1.0", "-c"}},
		{"posix global", world{}, "tar", []string{"--format=posix", "--pax-option=mtime=12345.5,comment=hello,exthdr.name=x", "-c"}},
		{"posix gzip", all, "tar", []string{"--format=posix", "-zc"}},
		{"posix zstd", all, "tar", []string{"--format=posix", "--zstd", "-c"}},
		{"gnu label", world{}, "tar", []string{"--format=gnu", "--label=a volume", "-c"}},
		{"gnu incremental", world{special: true}, "tar", []string{"--format=gnu", "--listed-incremental=" + filepath.Join(t.TempDir(), "snapshot"), "-c"}},
		{"bsdtar ustar", world{special: true}, "bsdtar", []string{"--format=ustar", "-c"}},
		{"bsdtar pax", noXattrs, "bsdtar", []string{"--format=pax", "--no-fflags", "--no-acls", "-c"}},
		{"bsdtar pax xattrs", world{xattrs: true}, "bsdtar", []string{"--format=pax", "--xattrs", "-c"}},
		{"bsdtar gnutar", world{long: true, special: true}, "bsdtar", []string{"--format=gnutar", "-c"}},
		{"bsdtar v7", world{}, "bsdtar", []string{"--format=v7", "-c"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			need(t, test.tool)
			root := t.TempDir()
			makeWorld(t, root, test.world)
			archive := run(t, test.tool, append(test.args, "-f", "-", "-C", root, ".")...)
			if test.name == "bsdtar pax xattrs" { // neither tar gives odd names of attributes back right
				compareDisk(t, archive, root)
				return
			}
			compare(t, archive)
		})
	}
}
