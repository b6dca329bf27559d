package treecmp

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// must fails the test on an error of preparing it.
func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

var then = time.Unix(1600000000, 123456789)

func setTime(t *testing.T, name string, at time.Time) {
	t.Helper()
	ts := unix.NsecToTimespec(at.UnixNano())
	must(t, unix.UtimesNanoAt(unix.AT_FDCWD, name, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW))
}

// sample makes a tree with one of each that needs no root:
//
//	big  dir/  dir/file  dir/link -> file  dir/same (a hard link of file)  fifo
func sample(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	at := func(name string) string { return filepath.Join(root, name) }
	must(t, os.Chmod(root, 0o755))
	must(t, os.Mkdir(at("dir"), 0o755))
	must(t, os.WriteFile(at("dir/file"), []byte("hello"), 0o644))
	must(t, os.Link(at("dir/file"), at("dir/same")))
	must(t, os.Symlink("file", at("dir/link")))
	must(t, os.WriteFile(at("big"), make([]byte, 1<<20), 0o600))
	must(t, unix.Mkfifo(at("fifo"), 0o600))
	for _, name := range []string{"dir/file", "dir/link", "dir", "big", "fifo", "."} {
		setTime(t, at(name), then)
	}
	return root
}

// render is one line a difference.
func render(ds []Difference) string {
	var b strings.Builder
	for _, d := range ds {
		fmt.Fprintln(&b, d)
	}
	return b.String()
}

func TestSameTrees(t *testing.T) {
	ds, err := Compare(sample(t), sample(t), Options{})
	if err != nil || len(ds) != 0 {
		t.Errorf("%v\n%s", err, render(ds))
	}
}

func TestEveryDifferenceIsFound(t *testing.T) {
	tests := []struct {
		name   string
		root   bool                                       // needs root
		change func(t *testing.T, at func(string) string) // of the second tree
		want   string
	}{
		{"missing", false, func(t *testing.T, at func(string) string) {
			must(t, os.Remove(at("fifo")))
			setTime(t, at("."), then)
		}, "fifo: missing: present != absent\n"},
		{"more", false, func(t *testing.T, at func(string) string) {
			must(t, os.WriteFile(at("dir/a\nb"), nil, 0o600))
			setTime(t, at("dir"), then)
		}, "\"dir/a\\nb\": missing: absent != present\n"},
		{"type", false, func(t *testing.T, at func(string) string) {
			must(t, os.Remove(at("fifo")))
			must(t, os.Mkdir(at("fifo"), 0o600))
			must(t, os.WriteFile(at("fifo/x"), nil, 0o600))
			setTime(t, at("."), then)
		}, "fifo: type: fifo != directory\n"},
		{"mode", false, func(t *testing.T, at func(string) string) {
			must(t, os.Chmod(at("big"), 0o600|os.ModeSetuid))
		}, "big: mode: 0600 != 4600\n"},
		{"mode of the root", false, func(t *testing.T, at func(string) string) {
			must(t, os.Chmod(at("."), 0o700))
		}, ".: mode: 0755 != 0700\n"},
		{"owner", true, func(t *testing.T, at func(string) string) {
			must(t, os.Lchown(at("dir/link"), 0, 12))
			must(t, os.Lchown(at("fifo"), 70000, 0))
		}, "dir/link: owner: 0:0 != 0:12\nfifo: owner: 0:0 != 70000:0\n"},
		{"size", false, func(t *testing.T, at func(string) string) {
			must(t, os.Truncate(at("big"), 1<<20-1))
			setTime(t, at("big"), then)
		}, "big: size: 1048576 != 1048575\n"},
		{"content in the middle", false, func(t *testing.T, at func(string) string) {
			f, err := os.OpenFile(at("big"), os.O_WRONLY, 0)
			must(t, err)
			_, err = f.WriteAt([]byte{1, 2}, 700000)
			must(t, errors.Join(err, f.Close()))
			setTime(t, at("big"), then)
		}, "big: content: at 700000: 00 00 00 00 00 00 00 00 != at 700000: 01 02 00 00 00 00 00 00\n"},
		{"last byte, both names", false, func(t *testing.T, at func(string) string) {
			must(t, os.WriteFile(at("dir/file"), []byte("hellO"), 0))
			setTime(t, at("dir/file"), then)
		}, "dir/file: content: at 4: 6f != at 4: 4f\ndir/same: content: at 4: 6f != at 4: 4f\n"},
		{"mtime by a nanosecond", false, func(t *testing.T, at func(string) string) {
			for _, name := range []string{"big", "dir", "dir/link"} {
				setTime(t, at(name), then.Add(1))
			}
		}, "big: mtime: 1600000000.123456789 != 1600000000.123456790\n" +
			"dir: mtime: 1600000000.123456789 != 1600000000.123456790\n" +
			"dir/link: mtime: 1600000000.123456789 != 1600000000.123456790\n"},
		{"xattr", false, func(t *testing.T, at func(string) string) {
			must(t, unix.Setxattr(at("big"), "user.k", []byte("v\x00"), 0))
			must(t, unix.Setxattr(at("dir"), "user.long", []byte(strings.Repeat("x", 300)), 0))
		}, "big: xattr: user.k absent != user.k=\"v\\x00\"\n" +
			"dir: xattr: user.long absent != user.long=\"" + strings.Repeat("x", 300) + "\"\n"},
		{"xattr of a link", true, func(t *testing.T, at func(string) string) {
			must(t, unix.Lsetxattr(at("dir/link"), "trusted.k", nil, 0))
		}, "dir/link: xattr: trusted.k absent != trusted.k=\"\"\n"},
		{"target", false, func(t *testing.T, at func(string) string) {
			must(t, os.Remove(at("dir/link")))
			must(t, os.Symlink("fil.", at("dir/link")))
			setTime(t, at("dir/link"), then)
			setTime(t, at("dir"), then)
		}, "dir/link: target: \"file\" != \"fil.\"\n"},
		{"copy for a link", false, func(t *testing.T, at func(string) string) {
			must(t, os.Remove(at("dir/same")))
			must(t, os.WriteFile(at("dir/same"), []byte("hello"), 0o644))
			setTime(t, at("dir/same"), then)
			setTime(t, at("dir"), then)
		}, "dir/file: link count: 2 != 1\n" +
			"dir/same: hard link: dir/file != dir/same\ndir/same: link count: 2 != 1\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if tt.root && os.Geteuid() != 0 {
				t.Skip("needs root")
			}
			a, b := sample(t), sample(t)
			tt.change(t, func(name string) string { return filepath.Join(b, name) })
			ds, err := Compare(a, b, Options{})
			if got := render(ds); err != nil || got != tt.want {
				t.Errorf("%v, got\n%swant\n%s", err, got, tt.want)
			}
		})
	}
}

// Three links in two groups: the link counts are the same, the groups not.
func TestHardLinkGroups(t *testing.T) {
	twins := func(pairs ...[2]string) string {
		root := t.TempDir()
		for _, p := range pairs {
			must(t, os.WriteFile(filepath.Join(root, p[0]), nil, 0o600))
			must(t, os.Link(filepath.Join(root, p[0]), filepath.Join(root, p[1])))
			setTime(t, filepath.Join(root, p[0]), then)
		}
		setTime(t, root, then)
		return root
	}
	a, b := twins([2]string{"1", "2"}, [2]string{"3", "4"}), twins([2]string{"1", "3"}, [2]string{"2", "4"})
	ds, err := Compare(a, b, Options{})
	const want = "2: hard link: 1 != 2\n3: hard link: 3 != 1\n4: hard link: 3 != 2\n"
	if got := render(ds); err != nil || got != want {
		t.Errorf("%v, got\n%swant\n%s", err, got, want)
	}
}

func TestDevices(t *testing.T) {
	a, b := t.TempDir(), t.TempDir()
	for i, root := range []string{a, b} {
		err := unix.Mknod(filepath.Join(root, "null"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, uint32(3+2*i))))
		if errors.Is(err, unix.EPERM) {
			t.Skip("needs the right to make device nodes")
		}
		must(t, err)
		setTime(t, filepath.Join(root, "null"), then)
		setTime(t, root, then)
	}
	ds, err := Compare(a, b, Options{})
	if got := render(ds); err != nil || got != "null: device: 1:3 != 1:5\n" {
		t.Errorf("%v, got\n%s", err, got)
	}
}

func TestOptions(t *testing.T) {
	a, b := sample(t), sample(t)
	must(t, unix.Setxattr(filepath.Join(b, "big"), "user.k", nil, 0))
	must(t, unix.Setxattr(filepath.Join(b, "big"), "user.l", nil, 0))
	must(t, os.Chmod(filepath.Join(b, "dir"), 0o700))
	must(t, os.Chmod(filepath.Join(b, "dir/file"), 0o600))

	ds, err := Compare(a, b, Options{
		IgnoreXattrs: []string{"user.k"},
		Skip:         func(name string) bool { return name == "dir" },
	})
	if got := render(ds); err != nil || got != "big: xattr: user.l absent != user.l=\"\"\n" {
		t.Errorf("%v, got\n%s", err, got)
	}

	ds, err = Compare(a, b, Options{Limit: 2})
	if !errors.Is(err, ErrLimit) || len(ds) != 2 {
		t.Errorf("%v, %d differences, want 2 and ErrLimit", err, len(ds))
	}
}

func TestErrorsAreToldNotSkipped(t *testing.T) {
	a := sample(t)
	missing := filepath.Join(a, "nothing")
	if _, err := Compare(a, missing, Options{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("error %v, want that %s does not exist", err, missing)
	}
	if os.Geteuid() == 0 {
		t.Skip("root may read everything")
	}
	b := sample(t)
	must(t, os.Chmod(filepath.Join(a, "big"), 0))
	must(t, os.Chmod(filepath.Join(b, "big"), 0))
	if _, err := Compare(a, b, Options{}); !errors.Is(err, os.ErrPermission) {
		t.Errorf("error %v, want that big cannot be read", err)
	}
}

func TestManyFiles(t *testing.T) {
	a, b := t.TempDir(), t.TempDir()
	var want []string
	for i := range 500 {
		name := fmt.Sprintf("%03d", i)
		content := []byte(strings.Repeat(name, i))
		for _, root := range []string{a, b} {
			if i%50 == 7 && root == b {
				content[0] ^= 1
				want = append(want, name)
			}
			must(t, os.WriteFile(filepath.Join(root, name), content, 0o600))
			setTime(t, filepath.Join(root, name), then)
		}
	}
	setTime(t, a, then)
	setTime(t, b, then)
	ds, err := Compare(a, b, Options{})
	var got []string
	for _, d := range ds {
		got = append(got, d.Path)
	}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, got %v, want %v", err, got, want)
	}
}
