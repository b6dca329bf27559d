package export

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/bench/treecmp"
	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/memblob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world is a tree with all a tree can have but sockets, and its blob.
func world(t *testing.T) (*index.Tree, *memblob.Source) {
	t.Helper()
	tree, src := index.NewTree(), memblob.New(nil)
	var stored []byte
	content := func(parts ...string) (ext []index.Extent, size int64) {
		for _, p := range parts {
			if p != "" { // else a hole
				ext = append(ext, index.Extent{Off: size, Chunk: uint32(len(tree.Chunks))})
				tree.Chunks = append(tree.Chunks, index.Chunk{Digest: chunk.Sum(chunk.BLAKE3, []byte(p)), Size: uint32(len(p)), Offset: int64(len(stored))})
				stored = append(stored, p...)
			}
			size += max(int64(len(p)), 65536)
		}
		return ext, size
	}
	now := index.Time{Sec: 1700000000, Nsec: 123456789}
	var changes []index.Change
	add := func(path string, ino *index.Inode) *index.Inode {
		if ino.Mtime == (index.Time{}) {
			ino.Mtime = now
		}
		changes = append(changes, index.Change{Path: path, Inode: ino})
		return ino
	}
	file := func(path string, parts ...string) *index.Inode {
		ino := &index.Inode{Mode: unix.S_IFREG | 0o644}
		ino.Extents, ino.Size = content(parts...)
		return add(path, ino)
	}
	long := strings.Repeat("l", 200)
	chunk := strings.Repeat("0123456789abcdef", 4096)
	add("", &index.Inode{Mode: unix.S_IFDIR | 0o755})
	add("d", &index.Inode{Mode: unix.S_IFDIR | 0o500, UID: 1, GID: 2, Xattrs: []index.Xattr{{Name: "user.dir", Value: "v"}}})
	file("empty")
	file("d/whole", chunk, chunk[1:]+"x")
	file("holes", "", chunk, "", chunk[2:]+"yz", "")
	file("d/setuid", chunk).Mode |= 0o4111
	x := file("xattrs", chunk)
	x.Xattrs = []index.Xattr{{Name: "security.capability", Value: "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"},
		{Name: "trusted.t", Value: "a\x00=\n"}, {Name: "user.empty"}}
	x.UID, x.GID = 3000000, 4294967290
	file("old").Mtime = index.Time{Sec: -2, Nsec: 250000000}
	file("far").Mtime = index.Time{Sec: 1 << 33}
	file(long+"/"+long+"/f", chunk)
	add("link", &index.Inode{Mode: unix.S_IFLNK | 0o777, Target: strings.Repeat("t/", 100), UID: 7})
	add("out", &index.Inode{Mode: unix.S_IFLNK | 0o777, Target: "/etc/passwd"})
	add("fifo", &index.Inode{Mode: unix.S_IFIFO | 0o640})
	add("null", &index.Inode{Mode: unix.S_IFCHR | 0o666, Rdev: unix.Mkdev(1, 3)})
	add("disk", &index.Inode{Mode: unix.S_IFBLK | 0o660, Rdev: unix.Mkdev(259, 70000)})
	for from, to := range map[string]string{"d/hard": "empty", "a first name": "null", "hard " + long: "link"} {
		changes = append(changes, index.Change{Op: index.Link, Path: from, Target: to})
	}
	if err := tree.Apply(changes); err != nil {
		t.Fatal(err)
	}
	ref := src.Put(stored)
	tree.Blobs = []index.Blob{plain(ref)}
	return tree, src
}

// plain is a blob whose stream is what it stores.
func plain(ref blob.Ref) index.Blob {
	return index.Blob{Digest: ref.Digest, Size: ref.Size, Spans: []index.Span{{Size: ref.Size, Length: ref.Size}}}
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: owners, devices and trusted xattrs are part of the test")
	}
}

// TestTarAndDir exports a tree both ways and has GNU tar unpack the archive: all
// three must agree.
func TestTarAndDir(t *testing.T) {
	needRoot(t)
	if _, err := exec.LookPath("tar"); err != nil {
		t.Skip("tar is not installed")
	}
	tree, src := world(t)
	var archive, again bytes.Buffer
	for _, w := range []*bytes.Buffer{&archive, &again} {
		if err := Tar(t.Context(), w, tree, src); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(archive.Bytes(), again.Bytes()) {
		t.Error("two archives of a tree differ")
	}
	unpacked, dir := t.TempDir(), filepath.Join(t.TempDir(), "made")
	cmd := exec.Command("tar", "--numeric-owner", "--xattrs", "--xattrs-include=*", "--same-owner", "--delay-directory-restore", "--warning=no-timestamp", "-xpf", "-", "-C", unpacked)
	cmd.Stdin = &archive
	if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
		t.Fatalf("tar: %v\n%s", err, out)
	}
	if err := Dir(t.Context(), dir, tree, src); err != nil {
		t.Fatal(err)
	}
	diffs, err := treecmp.Compare(unpacked, dir, treecmp.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range diffs {
		t.Error(d)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(dir, "holes"), &st); err != nil || st.Size != 5*65536 || st.Blocks*512 >= st.Size {
		t.Errorf("a file with holes has %d bytes in %d blocks, %v", st.Size, st.Blocks, err)
	}
}

func TestDirRefusesWhatIsNotEmpty(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "there")
	if err := os.WriteFile(name, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Dir(t.Context(), dir, index.NewTree(), nil); !errors.Is(err, ErrNotEmpty) || !strings.Contains(err.Error(), "there") {
		t.Errorf("got error %v", err)
	}
	if err := Dir(t.Context(), name, index.NewTree(), nil); err == nil {
		t.Error("exported into a file")
	}
}

// TestNamesThatLeadOut has trees that no reader makes.
func TestNamesThatLeadOut(t *testing.T) {
	for _, name := range []string{"..", ".", "", "../out", "a/../../out", "/out", "nul\x00"} {
		tree := index.NewTree()
		tree.Root.Children = map[string]*index.Inode{name: {Mode: unix.S_IFREG | 0o644}}
		base := t.TempDir()
		if err := Dir(t.Context(), filepath.Join(base, "in"), tree, nil); !errors.Is(err, index.ErrCorrupt) {
			t.Errorf("%q: got error %v", name, err)
		}
		if names, err := os.ReadDir(base); err != nil || len(names) != 1 {
			t.Errorf("%q: %v, %v", name, names, err)
		}
		if err := Tar(t.Context(), &bytes.Buffer{}, tree, nil); !errors.Is(err, index.ErrCorrupt) {
			t.Errorf("%q in an archive: got error %v", name, err)
		}
	}
}

// TestLinksAreNotFollowed has a symbolic link where a directory was: the
// directory's own metadata must not go where the link leads.
func TestLinksAreNotFollowed(t *testing.T) {
	needRoot(t)
	base := t.TempDir()
	victim := filepath.Join(base, "victim")
	if err := os.Mkdir(victim, 0o700); err != nil {
		t.Fatal(err)
	}
	tree := index.NewTree()
	if err := tree.Apply([]index.Change{{Path: "d", Inode: &index.Inode{Mode: unix.S_IFDIR | 0o777}}, {Path: "d/f", Inode: &index.Inode{Mode: unix.S_IFREG | 0o644, Size: 1, Extents: []index.Extent{{}}}}}); err != nil {
		t.Fatal(err)
	}
	p := []byte("x")
	tree.Chunks = []index.Chunk{{Digest: chunk.Sum(chunk.BLAKE3, p), Size: 1}}
	src := memblob.New(nil)
	ref := src.Put(p)
	tree.Blobs = []index.Blob{plain(ref)}
	in := filepath.Join(base, "in")
	src.Fault = func(context.Context, blob.Ref, int64, int64) *memblob.Fault {
		os.Rename(filepath.Join(in, "d"), filepath.Join(base, "moved"))
		os.Symlink("../victim", filepath.Join(in, "d"))
		return nil
	}
	err := Dir(t.Context(), in, tree, src)
	if fi, serr := os.Stat(victim); err == nil || serr != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("error %v; the link's target is %v, %v", err, fi.Mode(), serr)
	}
}

// TestErrors has the file named, and cancellation obeyed.
func TestErrors(t *testing.T) {
	needRoot(t)
	tree, src := world(t)
	src.Fault = func(context.Context, blob.Ref, int64, int64) *memblob.Fault {
		return &memblob.Fault{After: -1, Err: blob.ErrUnavailable}
	}
	for what, do := range map[string]func(context.Context) error{
		"dir": func(ctx context.Context) error { return Dir(ctx, filepath.Join(t.TempDir(), "x"), tree, src) },
		"tar": func(ctx context.Context) error { return Tar(ctx, &bytes.Buffer{}, tree, src) },
	} {
		if err := do(t.Context()); !errors.Is(err, blob.ErrUnavailable) || !strings.Contains(err.Error(), ": blob sha256:") {
			t.Errorf("%s: got error %v", what, err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := do(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("%s, cancelled: got error %v", what, err)
		}
	}
	tree.Root.Children["s"] = &index.Inode{Mode: unix.S_IFSOCK | 0o600}
	src.Fault = nil
	if err := Tar(t.Context(), &bytes.Buffer{}, tree, src); !errors.Is(err, index.ErrUnsupported) || !strings.Contains(fmt.Sprint(err), "./s") {
		t.Errorf("a socket: got error %v", err)
	}
}
