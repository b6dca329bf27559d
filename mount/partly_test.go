package mount

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/mount/fusedev"
)

// Some blocks cannot be had, and those around them can. Readers get EIO for them, or
// less than they asked for; never zeros, however the kernel reads.
func TestPartlyMissing(t *testing.T) {
	tree, c := image(t)
	want, err := os.ReadFile(filepath.Join(tree, "big"))
	if err != nil {
		t.Fatal(err)
	}
	big := int64(bytes.Index(c.data, want[:4096]))
	for _, test := range []struct {
		name string
		o    Options
	}{
		{"default", Options{Backing: File}},
		{"buffered", Options{Backing: File, Buffered: true}},
		{"buffered, little readahead", Options{Backing: File, Buffered: true, ReadAheadKiB: 4}},
		{"loop", Options{Backing: Loop}},
		{"loop, buffered", Options{Backing: Loop, Buffered: true}},
	} {
		t.Run(test.name, func(t *testing.T) {
			c.onTry(func(int64, int) bool { return true })
			dir, m := mounted(t, c, test.o)
			r := rand.New(rand.NewPCG(1, 2))
			missing := map[int64]bool{} // by 4 KiB block
			for range len(want) / 4096 / 20 {
				missing[(big+r.Int64N(int64(len(want))))/4096] = true
			}
			has := func(off int64, n int) bool {
				for b := off / 4096; b*4096 < off+int64(n); b++ {
					if missing[b] {
						return false
					}
				}
				return true
			}
			c.onTry(has)
			c.onRead(func(context.Context, int64, int) error { return errors.New("not to be had") })
			f, err := os.Open(filepath.Join(dir, "big"))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			failed, wrong := 0, 0
			for _, size := range []int{4096, 16 << 10, 64 << 10, 256 << 10, 1 << 20} {
				for _, advice := range []int{unix.FADV_NORMAL, unix.FADV_RANDOM, unix.FADV_SEQUENTIAL} {
					if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
						t.Fatal(err)
					}
					if err := unix.Fadvise(int(f.Fd()), 0, 0, advice); err != nil {
						t.Fatal(err)
					}
					p := make([]byte, size)
					for off := 0; off < len(want); off += size {
						n, err := unix.Pread(int(f.Fd()), p, int64(off))
						if err != nil {
							failed++
							continue
						}
						if !bytes.Equal(p[:n], want[off:off+n]) {
							wrong++
						}
					}
				}
			}
			if wrong > 0 || failed == 0 {
				t.Errorf("%d reads were wrong, %d failed; the kernel tells errors: %v; %+v", wrong, failed, tellsErrors(), m.Stats())
			}
		})
	}
}

// On a kernel that hides errors, of which this may be none, no page cache of a file is in
// the way: nothing is pushed to a Device, and Direct bypasses it, or reads loop devices.
func TestHiddenErrors(t *testing.T) {
	defer func(f func() error) { tellsErrors = f }(tellsErrors)
	tellsErrors = func() error { return errHidden }
	tree, c := image(t)
	options := func(dir string) string {
		t.Helper()
		p, err := os.ReadFile("/proc/self/mounts")
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(p)) {
			if strings.Contains(line, " "+dir+" erofs ") {
				return line
			}
		}
		t.Fatalf("%s is not mounted", dir)
		return ""
	}
	a := &around{c: c, missing: func(int64, int) bool { return false }}
	dir, _ := mounted(t, a.c, Options{Backing: File, Buffered: true, Options: fusedev.Options{Around: a}})
	sameTree(t, tree, dir)
	if n := a.peeked.Load(); n > 0 || !strings.Contains(options(dir), "directio") {
		t.Errorf("%d bytes were pushed to %s", n, options(dir))
	}
	im := Image{Meta: makeImage(t, tree), Complete: true}
	for _, test := range []struct {
		verified bool
		want     string
	}{{false, "directio"}, {true, "/dev/loop"}} {
		im.Verified = test.verified
		m, err := im.direct(Options{})
		if err != nil {
			t.Fatal(err)
		}
		dir := attach(t, m.FD())
		sameTree(t, tree, dir)
		if o := options(dir); !strings.Contains(o, test.want) {
			t.Errorf("verified %v: no %s in %s", test.verified, test.want, o)
		}
	}
}
