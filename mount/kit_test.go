package mount

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/mount/fusedev"
)

func TestMain(m *testing.M) {
	if role := os.Getenv(roleEnv); role != "" {
		runRole(role, os.Args[1:])
	}
	goleak.VerifyTestMain(m)
}

var quiet = slog.New(slog.DiscardHandler)

// memContent is an image in memory. Hooks, if set, decide what is at hand and
// what goes wrong; they may be exchanged at any time.
type memContent struct {
	data []byte
	try  atomic.Pointer[func(off int64, n int) bool]                       // is it at hand? default yes
	read atomic.Pointer[func(ctx context.Context, off int64, n int) error] // before a miss is served
}

func (c *memContent) Size() int64 { return int64(len(c.data)) }

func (c *memContent) TryReadAt(p []byte, off int64) (bool, error) {
	if f := c.try.Load(); f != nil && !(*f)(off, len(p)) {
		return false, nil
	}
	copy(p, c.data[off:])
	return true, nil
}

func (c *memContent) ReadAt(ctx context.Context, p []byte, off int64) error {
	if f := c.read.Load(); f != nil {
		if err := (*f)(ctx, off, len(p)); err != nil {
			return err
		}
	}
	copy(p, c.data[off:])
	return nil
}

func (c *memContent) onTry(f func(off int64, n int) bool) { c.try.Store(&f) }

func (c *memContent) onRead(f func(ctx context.Context, off int64, n int) error) { c.read.Store(&f) }

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skip("needs /dev/fuse")
	}
}

// makeTree writes a tree with a bit of everything.
func makeTree(t testing.TB, dir string) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	rnd := rand.NewChaCha8([32]byte{1})
	write := func(name string, size int) {
		p := make([]byte, size)
		rnd.Read(p)
		must(os.WriteFile(filepath.Join(dir, name), p, 0o644))
	}
	must(os.Chmod(dir, 0o755))
	for i := range 5 {
		must(os.MkdirAll(filepath.Join(dir, fmt.Sprintf("d%d/sub", i)), 0o755))
		for j := range 40 {
			write(fmt.Sprintf("d%d/sub/f%d", i, j), j*997)
		}
	}
	write("big", 8<<20)
	write("odd", 1<<20+123)
	write("empty", 0)
	must(os.Symlink("d1/sub/f7", filepath.Join(dir, "link")))
	must(os.Link(filepath.Join(dir, "odd"), filepath.Join(dir, "d2/hard")))
	must(unix.Mknod(filepath.Join(dir, "null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	must(unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600))
	self, err := os.ReadFile("/proc/self/exe")
	must(err)
	must(os.WriteFile(filepath.Join(dir, "prog"), self, 0o755))
}

// makeImage packs dir as an uncompressed EROFS image with all file data in
// blocks of its own.
func makeImage(t testing.TB, dir string) string {
	t.Helper()
	if _, err := exec.LookPath("mkfs.erofs"); err != nil {
		t.Skip("needs mkfs.erofs")
	}
	img := filepath.Join(t.TempDir(), "img")
	out, err := exec.Command("mkfs.erofs", "--quiet", "-Enoinline_data", img, dir).CombinedOutput()
	if err != nil {
		t.Fatalf("mkfs.erofs: %v\n%s", err, out)
	}
	return img
}

// image returns a tree, and its image in memory.
func image(t testing.TB) (tree string, c *memContent) {
	t.Helper()
	needRoot(t)
	tree = t.TempDir()
	makeTree(t, tree)
	data, err := os.ReadFile(makeImage(t, tree))
	if err != nil {
		t.Fatal(err)
	}
	return tree, &memContent{data: data}
}

// mounted mounts c and attaches it to a directory, without keeping FD.
func mounted(t testing.TB, c fusedev.Content, o Options) (string, *Mounted) {
	t.Helper()
	if o.Logger == nil {
		o.Logger = quiet
	}
	m, err := Device(t.Context(), c, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		m.Close()
		m.Abort()
		wait(t, "the connection's end", m.Done())
	})
	return attach(t, m.FD()), m
}

// attach attaches a mount and closes its descriptor. The cleanup unmounts, lazily
// if something is still open.
func attach(t testing.TB, f *os.File) string {
	t.Helper()
	dir := t.TempDir()
	if err := Attach(f, dir); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if isMounted(t, dir) && unix.Unmount(dir, 0) != nil {
			unix.Unmount(dir, unix.MNT_DETACH)
		}
	})
	return dir
}

func isMounted(t testing.TB, dir string) bool {
	t.Helper()
	p, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Contains(string(p), " "+dir+" ")
}

// wait fails the test if ch is not closed; the time only bounds a hang.
func wait(t testing.TB, what string, ch <-chan struct{}) {
	t.Helper()
	select {
	case <-ch:
	case <-time.After(30 * time.Second):
		t.Fatalf("%s: nothing after 30 s", what)
	}
}

// within fails the test if f hangs.
func within(t testing.TB, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	wait(t, what, done)
}

// dropCaches forgets what the kernel cached of one file.
func dropCache(t testing.TB, path string) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
}

// list describes every file below dir, one line each, contents by digest.
func list(dir string) (string, error) {
	var b bytes.Buffer
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, path)
		var st syscall.Stat_t
		if err := syscall.Lstat(path, &st); err != nil {
			return err
		}
		fmt.Fprintf(&b, "%s mode=%o own=%d:%d rdev=%x", rel, st.Mode, st.Uid, st.Gid, st.Rdev)
		switch st.Mode & syscall.S_IFMT {
		case syscall.S_IFREG:
			p, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			sum := sha256.Sum256(p)
			fmt.Fprintf(&b, " nlink=%d size=%d %s", st.Nlink, st.Size, hex.EncodeToString(sum[:8]))
		case syscall.S_IFLNK:
			to, err := os.Readlink(path)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " -> %s", to)
		}
		b.WriteByte('\n')
		return nil
	})
	return b.String(), err
}

func sameTree(t testing.TB, want, got string) {
	t.Helper()
	a, err := list(want)
	if err != nil {
		t.Fatal(err)
	}
	b, err := list(got)
	if err != nil {
		t.Fatal(err)
	}
	if a != b {
		t.Fatalf("trees differ\nwant:\n%s\ngot:\n%s", a, b)
	}
}
