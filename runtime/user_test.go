package runtime

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

const testPasswd = `# comment
root:x:0:0:root:/root:/bin/sh
+::::::
broken:x:zero:0::/:
bob:x:1000:1001:Bob,,,:/home/bob:/bin/sh
big:x:4294967295:1::/:
4:x:77:78:a user whose name is a number:/four:
nohome:x:5:6:::
`

const testGroup = `root:x:0:
wheel:x:10:root,bob
bob:x:1001:
audio:x:29:alice,bob
again:x:29:bob
`

func TestLookup(t *testing.T) {
	for in, want := range map[string]string{
		"":          "0 0 [0 10] /root",
		"root":      "0 0 [0 10] /root",
		"bob":       "1000 1001 [1001 10 29] /home/bob",
		"1000":      "1000 1001 [1001 10 29] /home/bob",
		"bob:":      "1000 1001 [1001 10 29] /home/bob",
		"bob:audio": "1000 29 [29] /home/bob",
		"bob:500":   "1000 500 [500] /home/bob",
		":audio":    "0 29 [29] /root",
		"4":         "77 78 [78] /four",
		"9:9":       "9 9 [9] /",
		"9":         "9 0 [0] /",
		"nohome":    "5 6 [6] /",
	} {
		id, err := lookup(in, []byte(testPasswd), []byte(testGroup))
		if got := fmt.Sprintf("%d %d %d %s", id.uid, id.gid, id.groups, id.home); err != nil || got != want {
			t.Errorf("%q: %q, %v; want %q", in, got, err, want)
		}
	}
	for _, in := range []string{"eve", "bob:eve", "broken", "big", "-1", "4294967295", "2147483648", "0:-1", "bob:x:y"} {
		if id, err := lookup(in, []byte(testPasswd), []byte(testGroup)); err == nil {
			t.Errorf("%q: %+v", in, id)
		}
	}
	if id, err := lookup("", nil, nil); err != nil || id.uid != 0 || id.home != "/" {
		t.Errorf("an image without passwd: %+v, %v", id, err)
	}
}

func FuzzLookup(f *testing.F) {
	f.Add("bob:audio", []byte(testPasswd), []byte(testGroup))
	f.Add("", []byte(testPasswd), []byte(testGroup))
	f.Add("1:2", []byte(":::::::"), []byte(":::"))
	f.Fuzz(func(t *testing.T, spec string, passwd, group []byte) {
		id, err := lookup(spec, passwd, group)
		if err != nil {
			return
		}
		if len(id.groups) == 0 || id.groups[0] != id.gid || len(id.groups) > maxGroups || id.home == "" {
			t.Errorf("%+v", id)
		}
		for _, g := range append(id.groups, id.uid) {
			if g >= 1<<31 {
				t.Errorf("%+v", id)
			}
		}
	})
}

// TestReadIn checks that an image's files can neither lead out of it nor hold
// the reader up.
func TestReadIn(t *testing.T) {
	root := t.TempDir()
	write(t, filepath.Join(filepath.Dir(root), "secret"), "secret", 0o644)
	for _, dir := range []string{"etc", "private/etc"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write(t, filepath.Join(root, "private/etc/passwd"), "found", 0o644)
	write(t, filepath.Join(root, "secret"), "inside", 0o644)
	big := filepath.Join(root, "etc/big")
	write(t, big, "", 0o644)
	if err := os.Truncate(big, 11); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(filepath.Join(root, "etc/fifo"), 0o644); err != nil {
		t.Fatal(err)
	}
	for name, target := range map[string]string{"absolute": "/private/etc/passwd", "up": "../../../../secret",
		"loop": "loop", "magic": "/proc/self/root/etc/passwd", "dangling": "nowhere"} {
		if err := os.Symlink(target, filepath.Join(root, "etc", name)); err != nil {
			t.Fatal(err)
		}
	}
	dir, err := os.Open(root)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	for name, want := range map[string]string{"absolute": "found", "up": "inside"} {
		if got, err := readIn(dir, "etc/"+name, 10); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	for name, missing := range map[string]bool{"big": false, "fifo": false, "loop": true, "magic": true, "dangling": true, "none": true} {
		got, err := readIn(dir, "etc/"+name, 10)
		if err == nil || errors.Is(err, os.ErrNotExist) != missing {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
}
