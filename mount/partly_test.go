package mount

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
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
