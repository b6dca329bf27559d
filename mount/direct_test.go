package mount

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
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

// An image that the kernel would read wrong from loop devices is never shown by them.
func TestDirectMeets(t *testing.T) {
	needRoot(t)
	tree := t.TempDir()
	makeTree(t, tree)
	im := Image{Meta: makeImage(t, tree), Complete: true, Meets: true}
	if m, err := im.direct(Options{Backing: Loop}); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("mounted by loop devices: %v, %v", m, err)
	}
	m, err := im.direct(Options{})
	if err != nil {
		t.Fatal(err)
	}
	sameTree(t, tree, attach(t, m.FD()))
	none := im
	none.Meta = os.DevNull // the kernel says of it what it says of any file before Linux 6.12
	if m, err := none.direct(Options{}); !errors.Is(err, unix.ENOTBLK) {
		t.Errorf("where files cannot be mounted: %v, %v", m, err)
	}
	defer func(f func() error) { tellsErrors = f }(tellsErrors)
	tellsErrors, im.Verified = func() error { return errHidden }, true
	if m, err := im.direct(Options{}); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("mounted where errors are hidden: %v, %v", m, err)
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
