package mount

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestDirect(t *testing.T) {
	needRoot(t)
	tree := t.TempDir()
	makeTree(t, tree)
	for _, backing := range []Backing{File, Loop} {
		f, err := Direct(makeImage(t, tree), nil, Options{Backing: backing, ReadAheadKiB: 512})
		if err != nil {
			t.Fatal(err)
		}
		sameTree(t, tree, attach(t, f.FD()))
	}
}

// Metadata in one file, data in others, one of them with a path longer than
// fsconfig(2) takes.
func TestDirectDevices(t *testing.T) {
	needRoot(t)
	tree := t.TempDir()
	makeTree(t, tree)
	long := t.TempDir()
	for range 3 {
		long = filepath.Join(long, strings.Repeat("x", 100))
	}
	if err := os.MkdirAll(long, 0o700); err != nil {
		t.Fatal(err)
	}
	meta, data := filepath.Join(t.TempDir(), "meta"), filepath.Join(long, "data")
	out, err := exec.Command("mkfs.erofs", "--quiet", "--chunksize=65536", "--blobdev="+data, meta, tree).CombinedOutput()
	if err != nil {
		t.Skipf("mkfs.erofs: %v\n%s", err, out)
	}
	for _, backing := range []Backing{Auto, File, Loop} {
		f, err := Direct(meta, []string{data}, Options{Backing: backing})
		if err != nil {
			t.Fatal(err)
		}
		sameTree(t, tree, attach(t, f.FD()))
	}
}

func TestErrorsSayWhy(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	zeros := filepath.Join(dir, "zeros")
	if err := os.WriteFile(zeros, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name, meta, want string
		o                Options
	}{
		{"not an image", zeros, "create super block: invalid argument", Options{}},
		{"no file", filepath.Join(dir, "none"), "no such file", Options{}},
		{"no file, loop", filepath.Join(dir, "none"), "no such file", Options{Backing: Loop}},
	} {
		f, err := Direct(test.meta, nil, test.o)
		if err == nil {
			f.Close()
		}
		t.Log(err)
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want %q in it", test.name, err, test.want)
		}
	}
	fs := openContext("erofs")
	defer fs.close()
	fs.set("nonsense", "x")
	fs.set("source", zeros) // does nothing after an error
	if err := fs.create(); err == nil || !strings.Contains(err.Error(), "nonsense=x: invalid argument (kernel: erofs: Unknown parameter") {
		t.Errorf("a bad option: %v", err)
	}
	if err := Attach(os.Stdin, dir); err == nil || !strings.Contains(err.Error(), dir) {
		t.Errorf("attach of no mount: %v", err)
	}
}
