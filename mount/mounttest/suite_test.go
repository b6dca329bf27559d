package mounttest

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/bench/treecmp"
	"github.com/shale-image/shale/mount"
)

// TestFaces runs the suite on every face of the package.
func TestFaces(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	files := awkward()
	reference := extract(t, files)
	for _, face := range mount.Faces() {
		t.Run(face.Name(), func(t *testing.T) { Run(t, face, indexOf(files), files, reference) })
	}
}

// Run holds a face to an image of the awkward tree, which GNU tar has unpacked at
// reference.
func Run(t *testing.T, face mount.Face, s stored, files []file, reference string) {
	dir := t.TempDir()
	store(t, dir, s)
	n, err := open(dir)
	must(t, err)
	t.Cleanup(func() { must(t, n.close()) })
	lazy := n.fill.Missing().Chunks > 0
	switch m, err := face.Mount(t.Context(), n.image(), options); {
	case face.Name() == "fanotify" && errors.Is(err, errors.ErrUnsupported):
		t.Skip(err)
	case errors.Is(err, mount.ErrIncomplete):
		lazy = false
		must(t, n.fill.Complete(t.Context(), nil))
	case err != nil:
		t.Fatal(err)
	default:
		must(t, m.Close())
		wait(t, "Done", m.Done())
	}
	if lazy {
		t.Run("failures", func(t *testing.T) { failures(t, face, n, files) })
		t.Run("late", func(t *testing.T) { late(t, face, n) })
		t.Run("cold", func(t *testing.T) { cold(t, face, n, files) })
	}
	t.Run("tree", func(t *testing.T) {
		at, m := show(t, face, n.image())
		same(t, reference, at)
		if m.Served() && m.Stats().Hits+m.Stats().Misses == 0 {
			t.Error("nothing was counted")
		}
		var st unix.Stat_t
		must(t, unix.Lstat(at, &st))
		if st.Dev != m.Dev() {
			t.Errorf("st_dev is %d, Dev tells %d", st.Dev, m.Dev())
		}
	})
	t.Run("read-only", func(t *testing.T) { readOnly(t, face, n) })
	t.Run("mapped", func(t *testing.T) { mapped(t, face, n, files) })
	t.Run("umount", func(t *testing.T) { umount(t, face, n) })
	if lazy || face.Name() == "direct" {
		t.Run("killed", func(t *testing.T) { killed(t, face, s, dir, reference) })
	}
}

func same(t *testing.T, a, b string) {
	t.Helper()
	found, err := treecmp.Compare(a, b, treecmp.Options{Limit: 20})
	for _, d := range found {
		t.Error(d)
	}
	must(t, err)
}

// content returns what a file must have.
func content(files []file, name string) []byte {
	i := slices.IndexFunc(files, func(f file) bool { return f.Name == name })
	return files[i].data
}

// failures: while data cannot be had readers get EIO; afterwards, data.
func failures(t *testing.T, face mount.Face, n *node, files []file) {
	at, m := show(t, face, n.image())
	n.source.failing.Store(true)
	for range 3 {
		p, err := os.ReadFile(filepath.Join(at, "size4097"))
		if !errors.Is(err, unix.EIO) || len(p) > 0 {
			t.Errorf("%d bytes and %v, want EIO", len(p), err)
		}
	}
	if m.Stats().Errors == 0 {
		t.Error("no error was counted")
	}
	n.source.failing.Store(false)
	p, err := os.ReadFile(filepath.Join(at, "size4097"))
	if err != nil || !bytes.Equal(p, content(files, "size4097")) {
		t.Errorf("afterwards: %d bytes, %v", len(p), err)
	}
}

// late: a read whose data do not come in time gets EIO, and a reader that was
// killed meanwhile does not keep the mount from ending.
func late(t *testing.T, face mount.Face, n *node) {
	release := make(chan struct{})
	n.source.hanging.Store(&hanging{func() {}, release})
	o := options
	o.ReadTimeout = 100 * time.Millisecond
	at, m := showWith(t, face, n.image(), o)
	within(t, "a read that is late", func() {
		if p, err := os.ReadFile(filepath.Join(at, hung)); !errors.Is(err, unix.EIO) || len(p) > 0 {
			t.Errorf("%d bytes and %v, want EIO", len(p), err)
		}
	})
	must(t, unix.Unmount(at, unix.MNT_DETACH))
	wait(t, "Done", m.Done())

	at, m = show(t, face, n.image())
	cat := exec.Command("cat", filepath.Join(at, hung))
	must(t, cat.Start())
	for m.Stats().Misses == 0 {
		time.Sleep(time.Millisecond)
	}
	must(t, cat.Process.Kill())
	if face.Name() == "fuse" {
		unix.Unmount(at, unix.MNT_FORCE) // the connection ends without our doing, whether the mount is busy or not
	} else {
		must(t, m.Abort())
	}
	within(t, "the killed reader", func() { cat.Wait() })
	if face.Name() == "fanotify" { // whoever reads from it is refused as long as it is there
		if _, err := os.ReadFile(filepath.Join(at, hung)); !errors.Is(err, unix.EIO) {
			t.Errorf("after Abort: %v, want EIO", err)
		}
		must(t, unix.Unmount(at, 0))
	}
	wait(t, "Done", m.Done())
	n.source.hanging.Store(nil)
	close(release)
}

// cold: many read what is not here yet, at random.
func cold(t *testing.T, face mount.Face, n *node, files []file) {
	at, _ := show(t, face, n.image())
	names := []string{"big", "sparse", "size1048583", "size65537", "program"}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(1, uint64(i)))
			for range 100 {
				name := names[rnd.IntN(len(names))]
				want := content(files, name)
				off := rnd.IntN(len(want))
				want = want[off:min(len(want), off+1+rnd.IntN(200000))]
				f, err := os.Open(filepath.Join(at, name))
				if err != nil {
					t.Error(err)
					return
				}
				unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
				got := make([]byte, len(want))
				if _, err := f.ReadAt(got, int64(off)); err != nil || !bytes.Equal(got, want) {
					t.Errorf("%s: %d bytes at %d: %v", name, len(want), off, err)
				}
				f.Close()
			}
		})
	}
	wg.Wait()
}

func readOnly(t *testing.T, face mount.Face, n *node) {
	at, _ := show(t, face, n.image())
	p := func(name string) string { return filepath.Join(at, name) }
	for what, err := range map[string]error{
		"create":   os.WriteFile(p("new"), nil, 0o600),
		"write":    os.WriteFile(p("size1"), []byte("x"), 0o600),
		"mkdir":    os.Mkdir(p("new"), 0o700),
		"unlink":   unix.Unlink(p("size1")),
		"rename":   unix.Rename(p("size1"), p("new")),
		"chmod":    os.Chmod(p("size1"), 0o600),
		"chown":    os.Chown(p("size1"), 1, 1),
		"truncate": os.Truncate(p("big"), 1),
		"setxattr": unix.Setxattr(p("size1"), "user.x", []byte("x"), 0),
		"link":     os.Link(p("size1"), p("new")),
		"mknod":    unix.Mknod(p("new"), unix.S_IFIFO, 0),
		"utimes":   unix.Utimes(p("size1"), make([]unix.Timeval, 2)),
	} {
		if !errors.Is(err, unix.EROFS) {
			t.Errorf("%s: %v, want EROFS", what, err)
		}
	}
	if _, err := os.Stat(p("none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a name that is not there: %v", err)
	}
	if v, err := unix.Getxattr(p("attrs"), "user.none", nil); !errors.Is(err, unix.ENODATA) {
		t.Errorf("an attribute that is not there: %d, %v", v, err)
	}
}

// mapped: page faults, execution, and reading past the end.
func mapped(t *testing.T, face mount.Face, n *node, files []file) {
	at, _ := show(t, face, n.image())
	must(t, exec.Command(filepath.Join(at, "program")).Run())
	out := child(t, "mmap", filepath.Join(at, "size1048583"))
	if want := digest(content(files, "size1048583")); out != want+"\n" {
		t.Errorf("mapped: %q, want %s", out, want)
	}
	f, err := os.Open(filepath.Join(at, "size65537"))
	must(t, err)
	defer f.Close()
	p := make([]byte, 100)
	if got, err := f.ReadAt(p, 65536); got != 1 || err != io.EOF || p[0] != content(files, "size65537")[65536] || p[1] != 0 {
		t.Errorf("the last byte: %d, %v", got, err)
	}
}

// umount: Done comes with the last user of a mount, not before.
func umount(t *testing.T, face mount.Face, n *node) {
	at, m := show(t, face, n.image())
	f, err := os.Open(filepath.Join(at, "size1"))
	must(t, err)
	must(t, unix.Unmount(at, unix.MNT_DETACH))
	select {
	case <-m.Done():
		t.Error("done while a file is open")
	default:
	}
	must(t, f.Close())
	wait(t, "Done after the last close", m.Done())
	must(t, m.Err())

	m, err = face.Mount(t.Context(), n.image(), options) // never attached
	must(t, err)
	must(t, m.Close())
	must(t, m.Close())
	wait(t, "Done after Close", m.Done())
	must(t, m.Abort())
}
