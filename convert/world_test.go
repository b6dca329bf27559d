package convert

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/convert/source"
)

// makeWorld fills a directory with all a tree can have.
func makeWorld(t testing.TB, root string) {
	t.Helper()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	at := func(name string) string { return filepath.Join(root, name) }
	write := func(name, data string) { check(os.WriteFile(at(name), []byte(data), 0o644)) }
	long := strings.Repeat("d", 120)
	for _, d := range []string{"bin", "empty dir", "deep", "deep/er", "sticky", "opaque", "replaced", long, long + "/" + long} {
		check(os.Mkdir(at(d), 0o755))
	}
	check(unix.Chmod(at("sticky"), 0o1777))
	write("empty", "")
	write("one", "1")
	write("block", strings.Repeat("b", 4096))
	write("block+1", strings.Repeat("c", 4097))
	write("chunk", text(1, 1<<20))
	write("chunk+1", text(2, 1<<20+1))
	write("chunk again", text(1, 1<<20))
	write("zeros", strings.Repeat("\x00", 300000))
	write("zeros inside", text(3, 1<<20)+strings.Repeat("\x00", 1<<20)+text(4, 1<<20+99))
	write("bin/su", "#!/bin/sh\n")
	check(unix.Chmod(at("bin/su"), 0o6755))
	write("secret", "x")
	check(os.Chmod(at("secret"), 0))
	write("not utf-8 \xff\xfe", "latin")
	write("new\nline", "n")
	write("opaque/old", "hidden by the next layer")
	write("replaced/by a file", "")
	write("goes", "whiteout")
	write(long+"/"+long+"/"+strings.Repeat("n", 255), "long")
	check(os.Link(at("one"), at("deep/link to one")))
	check(os.Link(at("chunk"), at("another")))
	check(os.Symlink("../one", at("deep/symlink")))
	check(os.Symlink(strings.Repeat("t/", 1500), at("long symlink")))
	check(os.Symlink("/nowhere", at("absolute")))
	check(os.Link(at("absolute"), at("link to a symlink")))
	check(os.Lchown(at("absolute"), 12, 34))
	check(unix.Mkfifo(at("fifo"), 0o640))
	check(unix.Mknod(at("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	check(unix.Mknod(at("disk"), unix.S_IFBLK|0o660, int(unix.Mkdev(259, 70000))))
	check(os.Link(at("null"), at("null too")))
	for name, value := range map[string]string{"user.empty": "", "user.binary": "a\x00\n=\xff", "trusted.t": "t",
		"security.capability": "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"} {
		check(unix.Setxattr(at("block"), name, []byte(value), 0))
	}
	check(unix.Setxattr(at("sticky"), "user.dir", []byte("d"), 0))
	check(unix.Lsetxattr(at("long symlink"), "trusted.l", []byte("on a link"), 0))
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
	sparse("hole only", 5<<20, nil)
	sparse("large hole", 1<<28, map[int64]string{1 << 27: "in the middle"})
	sparse("hole at the end", 300000, map[int64]string{0: "start"})
	sparse("hole at the start", 300000, map[int64]string{299990: "0123456789"})
	many := map[int64]string{}
	for i := range int64(60) {
		many[i*32768+i] = fmt.Sprintf("fragment %d", i)
	}
	sparse("many holes", 60*32768+17, many)
	check(os.Lchown(at("one"), 3000000, 4294967290))
	settle(t, root, 1700000000)
	for name, ts := range map[string]unix.Timespec{
		"empty": {Sec: -1000000, Nsec: 250000000}, "secret": {Sec: 0}, "block+1": {Sec: 1 << 33},
	} {
		check(unix.UtimesNanoAt(unix.AT_FDCWD, at(name), []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW))
	}
}

// settle sets all times below a directory.
func settle(t testing.TB, root string, sec int64) {
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		ts := unix.Timespec{Sec: sec, Nsec: 123456789}
		if err == nil {
			err = unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// makeSecond makes what a second layer adds to the world, and its whiteouts.
func makeSecond(t testing.TB, root string) {
	t.Helper()
	for _, d := range []string{"opaque", "deep", "new dir"} {
		if err := os.Mkdir(filepath.Join(root, d), 0o750); err != nil {
			t.Fatal(err)
		}
	}
	for name, data := range map[string]string{
		".wh.goes": "", "opaque/.wh..wh..opq": "", "opaque/new": "new", "replaced": "a file now", "deep/.wh.er": "",
		"chunk+1": text(2, 1<<20) + "another end", "new dir/copy": text(1, 1<<20), "one": "cut from its other name",
	} {
		if err := os.WriteFile(filepath.Join(root, name), []byte(data), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	settle(t, root, 1800000000)
}

// unpack does to a directory what a layer says, by GNU tar and os.RemoveAll.
func unpack(t testing.TB, root, archive string) {
	t.Helper()
	for _, name := range strings.Split(string(run(t, "tar", "-tf", archive, "--quoting-style=literal")), "\n") {
		dir, base := filepath.Split(name)
		if base == ".wh..wh..opq" {
			names, _ := os.ReadDir(filepath.Join(root, dir))
			for _, n := range names {
				os.RemoveAll(filepath.Join(root, dir, n.Name()))
			}
		} else if hidden, ok := strings.CutPrefix(base, ".wh."); ok {
			os.RemoveAll(filepath.Join(root, dir, hidden))
		} else if fi, err := os.Lstat(filepath.Join(root, name)); err == nil && fi.IsDir() && base != "" {
			os.RemoveAll(filepath.Join(root, name)) // a file in place of a directory
		}
	}
	run(t, "tar", "--numeric-owner", "--xattrs", "--xattrs-include=*", "--same-owner", "--delay-directory-restore",
		"--warning=no-timestamp", "--exclude=.wh.*", "-xpf", archive, "-C", root)
}

// TestAgainstTar converts images of awkward layers and compares what comes out
// with what GNU tar makes of the layers.
func TestAgainstTar(t *testing.T) {
	needRoot(t, "tar")
	one, two := t.TempDir(), t.TempDir()
	makeWorld(t, one)
	makeSecond(t, two)
	pack := func(dir string, args ...string) []byte {
		return run(t, "tar", append(append([]string{"--sparse", "-c", "-f", "-", "-C", dir}, args...), ".")...)
	}
	layers := [][]byte{pack(one, "--format=posix", "--xattrs", "--xattrs-include=*", "--sparse-version=1.0"), pack(two, "--format=gnu")}
	want := t.TempDir()
	for _, l := range layers {
		name := filepath.Join(t.TempDir(), "layer")
		if err := os.WriteFile(name, l, 0o600); err != nil {
			t.Fatal(err)
		}
		unpack(t, want, name)
	}
	for _, o := range []Options{
		{}, {ChunkSize: 4 << 10}, {ChunkSize: 1 << 20, Compress: true}, {ChunkSize: 256 << 10, Compress: true, Compressor: 2},
	} {
		t.Run(fmt.Sprintf("%d %v", o.ChunkSize, o.Compressor), func(t *testing.T) {
			o.ChunkSize = max(o.ChunkSize, 64<<10)
			dst := target(t)
			mustConvert(t, makeImage(t, gz(layers[0]), zst(layers[1])), dst, o)
			same(t, want, exported(t, dst))
		})
	}
	t.Run("dir", func(t *testing.T) {
		img, err := source.Dir(one, amd64)
		if err != nil {
			t.Fatal(err)
		}
		dst := target(t)
		if _, err := Image(t.Context(), img, dst, Options{}); err != nil {
			t.Fatal(err)
		}
		same(t, one, exported(t, dst))
	})
}

// TestDebian converts a real image.
func TestDebian(t *testing.T) {
	needRoot(t, "tar")
	dir := debianImage(t)
	src, dst := open(t, "oci:"+dir), target(t)
	res := mustConvert(t, src, dst, Options{})
	t.Logf("%d bytes from %d", res.Bytes, res.SourceBytes)
	img, err := src.Resolve(t.Context(), amd64)
	if err != nil {
		t.Fatal(err)
	}
	want := t.TempDir()
	for _, l := range img.Layers {
		unpack(t, want, filepath.Join(dir, "blobs/sha256", strings.TrimPrefix(l.Digest, "sha256:")))
	}
	same(t, want, exported(t, dst))
}
