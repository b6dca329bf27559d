package inspect

import (
	"errors"
	"strings"
	"syscall"
	"testing"

	"github.com/shale-image/shale/index"
)

func TestResolve(t *testing.T) {
	link := func(to string) *index.Inode { return &index.Inode{Mode: syscall.S_IFLNK | 0o777, Target: to} }
	file := &index.Inode{Mode: syscall.S_IFREG}
	d := func(m map[string]*index.Inode) *index.Inode {
		return &index.Inode{Mode: syscall.S_IFDIR | 0o755, Children: m}
	}
	tree := &index.Tree{Root: d(map[string]*index.Inode{
		"f":   file,
		"d":   d(map[string]*index.Inode{"f": file, "up": link("../f"), "e": d(map[string]*index.Inode{"g": file})}),
		"abs": link("/d/f"), "rel": link("d"), "out": link("../../../../d/f"), "dirlink": link("rel/e/"), "two": link("rel/up"),
		"loop": link("loop"), "a": link("b"), "b": link("a"), "dangling": link("none"), "empty": {Mode: syscall.S_IFLNK},
		"slashfile": link("f/"), "self": link("."), "long": link(strings.Repeat("./", 4000) + "long"),
	})}
	for _, c := range []struct {
		name, want string
		follow     bool
		err        error
	}{
		{"", "", true, nil}, {"/", "", true, nil}, {"//.//", "", false, nil}, {"..", "", true, nil}, {"/../../f", "f", true, nil},
		{"f", "f", true, nil}, {"/d//f", "d/f", true, nil}, {"d/../f", "f", true, nil}, {"d/", "d", true, nil}, {"d/.", "d", true, nil},
		{"abs", "d/f", true, nil}, {"abs", "abs", false, nil}, {"rel/f", "d/f", false, nil}, {"out", "d/f", true, nil},
		{"rel", "rel", false, nil}, {"rel/", "d", false, nil}, {"dirlink/g", "d/e/g", false, nil}, {"dirlink/..", "d", true, nil},
		{"two", "f", true, nil}, {"self/self/self/f", "f", true, nil},
		{"none", "", true, index.ErrNotExist}, {"f/", "", true, index.ErrNotExist}, {"f/..", "", true, index.ErrNotExist},
		{"f/x", "", true, index.ErrNotExist}, {"dangling", "", true, index.ErrNotExist}, {"dangling", "dangling", false, nil},
		{"empty", "", true, index.ErrNotExist}, {"slashfile", "", true, index.ErrNotExist}, {"none/../f", "", true, index.ErrNotExist},
		{"loop", "", true, syscall.ELOOP}, {"loop", "loop", false, nil}, {"a/x", "", false, syscall.ELOOP},
		{"long", "", true, syscall.ELOOP}, {strings.Repeat("x/", 5000), "", true, syscall.ENAMETOOLONG},
	} {
		at, ino, err := Resolve(tree, c.name, c.follow)
		if len(c.name) > 40 {
			c.name = c.name[:40]
		}
		if !errors.Is(err, c.err) || at != c.want || (ino == nil) != (c.err != nil) {
			t.Errorf("%q (%v): %q, %v; want %q, %v", c.name, c.follow, at, err, c.want, c.err)
			continue
		}
		if err == nil {
			if same, _ := tree.Lookup(at); same != ino {
				t.Errorf("%q: not the inode at %q", c.name, at)
			}
		}
	}
}
