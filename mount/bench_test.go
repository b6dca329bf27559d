package mount

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/mount/fusedev"
)

// fileContent is an image on disk, all at hand.
type fileContent struct {
	memContent
	f *os.File
}

func (c *fileContent) TryReadAt(p []byte, off int64) (bool, error) {
	_, err := c.f.ReadAt(p, off)
	return err == nil, err
}

// BenchmarkRead reads through EROFS what is at hand, with EROFS' own page
// cache cold. "plain" is the same image mounted from its file: the bound.
func BenchmarkRead(b *testing.B) {
	needRoot(b)
	const size = 256 << 20
	tree := b.TempDir()
	p := make([]byte, size)
	rand.NewChaCha8([32]byte{2}).Read(p)
	if err := os.WriteFile(filepath.Join(tree, "big"), p, 0o644); err != nil {
		b.Fatal(err)
	}
	img := makeImage(b, tree)
	f, err := os.Open(img)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		b.Fatal(err)
	}
	content := &fileContent{memContent{data: make([]byte, info.Size())}, f}
	if _, err := f.ReadAt(content.data, 0); err != nil {
		b.Fatal(err)
	}

	faces := []struct {
		name string
		dir  func(b *testing.B) string
	}{{"plain", func(b *testing.B) string {
		m, err := Direct(img, nil, Options{Backing: File})
		if err != nil {
			b.Fatal(err)
		}
		return attach(b, m.FD())
	}}}
	device := func(name string, o Options) {
		faces = append(faces, struct {
			name string
			dir  func(b *testing.B) string
		}{name, func(b *testing.B) string { dir, _ := mounted(b, content, o); return dir }})
	}
	device("device", Options{})
	for _, n := range []int{1, 3, 4} {
		device(fmt.Sprint("device-threads-", n), Options{Options: fusedev.Options{Threads: n}})
	}
	device("device-ra-1024", Options{ReadAheadKiB: 1024})
	device("device-buffered", Options{Buffered: true})
	faces = append(faces, struct {
		name string
		dir  func(b *testing.B) string
	}{"device-pushed", func(b *testing.B) string { // as after a start with a pack
		a := &around{c: &memContent{data: content.data}, missing: func(int64, int) bool { return false }}
		dir, m := mounted(b, content, Options{Buffered: true, ReadAheadKiB: 4, Options: fusedev.Options{Around: a}})
		m.SetReadAhead(128)
		m.Steady()
		return dir
	}})
	device("device-open-direct", Options{Buffered: true, Options: fusedev.Options{DirectIO: true}})
	device("device-loop", Options{Backing: Loop})

	for _, face := range faces {
		for _, readers := range []int{1, 4} {
			for _, w := range []struct {
				name   string
				n      int
				random bool
			}{{"seq1M", 1 << 20, false}, {"rand4K", 4096, true}} {
				b.Run(fmt.Sprintf("%s/%s/readers-%d", face.name, w.name, readers), func(b *testing.B) {
					dir := face.dir(b)
					path := filepath.Join(dir, "big")
					work := make(chan int64, 1024)
					b.SetBytes(int64(w.n))
					b.ResetTimer()
					go func() {
						for i := range b.N {
							off := int64(i) * int64(w.n) % size
							if w.random {
								off = rand.Int64N(size/4096) * 4096
							}
							work <- off
						}
						close(work)
					}()
					done := make(chan error)
					for range readers {
						go func() { done <- readAll(path, w.n, w.random, work, size) }()
					}
					for range readers {
						if err := <-done; err != nil {
							b.Error(err)
						}
					}
				})
			}
		}
	}
}

func readAll(path string, n int, random bool, work <-chan int64, size int64) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	p := make([]byte, n)
	if random {
		unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_RANDOM)
	}
	var last int64
	for off := range work {
		if random || off < last { // a new round
			unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
		}
		last = off
		if _, err := f.ReadAt(p, off); err != nil {
			return err
		}
	}
	return nil
}
