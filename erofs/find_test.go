package erofs

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/index"
)

// maze is a tree of directories, files and symbolic links, both in an image and in a
// directory of the machine's.
type maze struct {
	w    *world
	dir  string
	fd   int
	n    *Nodes
	nids map[uint64]string // paths
	inos map[uint64]string
}

// newMaze makes a maze: a path that ends with "/" is a directory, one with a target a link.
func newMaze(t *testing.T, paths [][2]string) *maze {
	m := &maze{w: newWorld(0), dir: t.TempDir(), nids: map[uint64]string{}, inos: map[uint64]string{}}
	for _, p := range paths {
		at, on := m.w.tree.Root, filepath.Join(m.dir, p[0])
		names := strings.Split(strings.TrimSuffix(p[0], "/"), "/")
		for _, name := range names[:len(names)-1] {
			at = at.Children[name]
		}
		var ino *index.Inode
		var err error
		switch {
		case p[1] != "":
			ino, err = &index.Inode{Mode: unix.S_IFLNK | 0o777, Target: p[1]}, os.Symlink(p[1], on)
		case strings.HasSuffix(p[0], "/"):
			ino, err = dir(), os.Mkdir(on, 0o755)
		default:
			ino, err = m.w.file(0), os.WriteFile(on, nil, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
		at.Children[names[len(names)-1]] = ino
	}
	_, img := m.w.build(t, m.w.options())
	im, _, _ := read(t, img)
	m.n = im.Nodes()
	var walk func(nid uint64, path string)
	walk = func(nid uint64, path string) {
		m.nids[nid] = path
		var s unix.Stat_t
		if err := unix.Lstat(m.dir+path, &s); err != nil {
			t.Fatal(err)
		}
		m.inos[s.Ino] = path
		if s.Mode&unix.S_IFMT != unix.S_IFDIR {
			return
		}
		err := m.n.List(nid, 0, func(e Name) bool {
			if e.Name != "." && e.Name != ".." {
				walk(e.NID, path+"/"+e.Name)
			}
			return true
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	walk(m.n.Root(), "")
	var err error
	if m.fd, err = unix.Open(m.dir, unix.O_PATH|unix.O_CLOEXEC, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(m.fd) })
	return m
}

// kernel returns what a path leads to if the directory is the root.
func (m *maze) kernel(t *testing.T, path string) (string, error) {
	fd, err := unix.Openat2(m.fd, path, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT})
	if errors.Is(err, unix.ENOSYS) {
		t.Skip("no openat2")
	}
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	var s unix.Stat_t
	if err := unix.Fstat(fd, &s); err != nil {
		t.Fatal(err)
	}
	found, ok := m.inos[s.Ino]
	if !ok {
		t.Fatalf("%q leads out of the directory", path)
	}
	return found, nil
}

// image is kernel of the image.
func (m *maze) image(t *testing.T, path string) (string, error) {
	in, err := m.n.Find(path)
	if err != nil {
		if !errors.Is(err, index.ErrNotExist) {
			t.Errorf("%.100q: %v", path, err)
		}
		return "", err
	}
	stat, err := m.n.Stat(in.NID)
	if err != nil || stat != in {
		t.Errorf("%.100q: %+v, want %+v, %v", path, in, stat, err)
	}
	return m.nids[in.NID], nil
}

// same compares the two, and returns where the path leads.
func (m *maze) same(t *testing.T, path string) string {
	t.Helper()
	want, wrong := m.kernel(t, path)
	got, err := m.image(t, path)
	if got != want || (err == nil) != (wrong == nil) {
		t.Errorf("%.100q: %q, %v, want %q, %v", path, got, err, want, wrong)
	}
	return got
}

var links = [][2]string{
	{"a/"}, {"a/b/"}, {"a/b/file"}, {"a/b/c/"}, {"a/file"}, {"file"}, {"usr/"}, {"usr/lib/"}, {"usr/lib/libc.so.6"},
	{"lib", "usr/lib"}, {"usr/lib64", "/lib"}, {"root", "/"}, {"self", "."}, {"up", "../../.."}, {"a/up", ".."},
	{"a/b/c/top", "../../../../../a"}, {"a/rel", "b/file"}, {"a/abs", "/a/b/file"}, {"a/slash", "b//c/"}, {"a/dot", "./b/."},
	{"a/b/toFile", "/file"}, {"fileSlash", "file/"}, {"fileDot", "file/."}, {"fileUp", "file/.."}, {"gone", "missing"}, {"a/gone", "/a/missing/.."},
	{"one", "two"}, {"two", "a/../one"}, {"me", "me"}, {"deeper", "deeper/deeper"}, {"a/b/twice", "../b/twice2"}, {"a/b/twice2", "/a/dot/c"},
	{"libc", "usr/lib64/../lib/libc.so.6"}, {"a/...", "file"}, {"a/b/c/x y", "/usr"},
}

// A path leads where it does for a process whose root the tree is.
func TestFind(t *testing.T) {
	m := newMaze(t, links)
	for _, path := range []string{
		"/", "//", ".", "..", "/..", "../../a", "/../../..", "a", "/a", "a/", "a//", "//a//b///c//", "a/b/file", "a/./b/../b/file", "a/b/..", "a/b/../..",
		"a/b/../../../../a/file", "file", "file/", "file/.", "file/..", "file/x", "file//", "missing", "missing/..", "missing/../a", "a/b/file/../file",
		"lib", "lib/", "lib/..", "lib/../lib/libc.so.6", "/lib/libc.so.6", "usr/lib64/libc.so.6", "usr/lib64/libc.so.6/", "root/root/root/a/rel", "self/self/a",
		"up/a", "a/up/a/up/file", "a/b/c/top/file", "a/rel", "a/rel/", "a/rel/..", "a/abs", "a/slash", "a/slash/..", "a/slash/top/rel", "a/dot/c", "a/dot/../file",
		"a/b/toFile", "a/b/toFile/", "fileSlash", "fileDot", "fileUp", "gone", "gone/", "a/gone", "gone/..", "one", "two/x", "me", "me/..", "deeper",
		"a/b/twice", "a/b/twice/top/up", "libc", "a/...", "a/b/c/x y/lib", "A", "a/b/c/x", "a\x00", strings.Repeat("n", 255), strings.Repeat("n", 256),
		strings.Repeat("a/../", 300) + "a", strings.Repeat("root/", 40) + "a",
	} {
		m.same(t, path)
	}
	if in, err := m.n.Find(""); err != nil || in.NID != m.n.Root() {
		t.Errorf("nothing: %+v, %v", in, err)
	}
	for path, want := range map[string]string{ // what the kernel has said once
		"usr/lib64/libc.so.6": "/usr/lib/libc.so.6", "a/b/c/top/file": "/a/file", "up/../..": "", "a/abs": "/a/b/file", "one": "?", "fileUp": "?", "deeper": "?",
	} {
		if got, err := m.image(t, path); err == nil && got != want || err != nil && want != "?" {
			t.Errorf("%q: %q, %v, want %q", path, got, err, want)
		}
	}
	names := []string{"", ".", "..", "..", "/", "missing"}
	for _, l := range links {
		names = append(names, filepath.Base(l[0]))
	}
	for _, l := range links {
		names = append(names, strings.TrimSuffix(l[0], "/"))
	}
	found := 0
	rnd := rand.New(rand.NewPCG(3, 4))
	for range 3000 {
		var path []string
		for range 1 + rnd.IntN(6) {
			path = append(path, names[rnd.IntN(len(names))])
		}
		p := strings.Join(path, "/")
		if p == "" {
			continue
		}
		if m.same(t, p) != "" {
			found++
		}
	}
	if found < 200 {
		t.Errorf("only %d paths lead anywhere", found)
	}
}

// As many links in a row as Linux follows lead to a file; more names and links than
// any path has end.
func TestFindFar(t *testing.T) {
	var paths [][2]string
	for i := range 45 {
		paths = append(paths, [2]string{fmt.Sprintf("l%d", i), fmt.Sprintf("/self/l%d", i+1)})
	}
	paths = append(paths, [2]string{"l45"}, [2]string{"self/"})
	for i := range 46 {
		paths = append(paths, [2]string{fmt.Sprintf("self/l%d", i), fmt.Sprintf("../l%d", i)})
	}
	grows := strings.Repeat("grows/", 600) // too long before it is too often
	paths = append(paths, [2]string{"grows", grows[:len(grows)-1]})
	m := newMaze(t, paths)
	for _, path := range []string{"l45", "l44", "l40", "l35", "l25", "grows", "grows/l1"} {
		m.same(t, path)
	}
	if at, err := m.image(t, "l25"); err != nil || at != "/l45" { // 40 links
		t.Errorf("40 links lead to %q, %v", at, err)
	}
	for _, path := range []string{strings.Repeat("self/../", 5000), strings.Repeat("./", 1<<20), strings.Repeat("self/../", maxSteps)} {
		if at, err := m.image(t, path); err == nil {
			t.Errorf("%d bytes of a path lead to %q", len(path), at)
		}
	}
	if at, err := m.image(t, strings.Repeat("/", 1<<20)+"l45"); err != nil || at != "/l45" {
		t.Errorf("many slashes lead to %q, %v", at, err)
	}
}
