package mounttest

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/fill"
	"github.com/shale-image/shale/link"
	"github.com/shale-image/shale/mount"
)

// BenchmarkComplete reads a file of 128 MiB of a complete image through EROFS, which
// has forgotten it, where the kernel reads segments: with nobody to ask (direct, and
// fanotify when it is released), and, for comparison, where each read is asked for.
func BenchmarkComplete(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("needs root")
	}
	const size = 128 << 20
	data := make([]byte, size)
	rand.NewChaCha8([32]byte{3}).Read(data)
	files := []file{
		{Header: tar.Header{Typeflag: tar.TypeDir, Name: ".", Mode: 0o755}},
		{Header: tar.Header{Typeflag: tar.TypeReg, Name: hung, Mode: 0o644, Size: 1}, data: []byte("x")},
		{Header: tar.Header{Typeflag: tar.TypeReg, Name: "large", Mode: 0o644, Size: size}, data: data},
	}
	dir := b.TempDir()
	store(b, dir, indexOf(files))
	n, err := open(dir)
	must(b, err)
	defer n.close()
	lazy, whole := n.image(), n.image()
	whole.Complete = true // soon
	direct, _ := show(b, named(b, "direct"), whole)
	must(b, n.fill.Complete(b.Context(), nil))
	must(b, n.pool.Sync())
	asked, _ := show(b, named(b, "fanotify"), lazy) // made while nothing was here
	released, m := show(b, named(b, "fanotify"), lazy)
	read := func(dir string, random bool) {
		f, err := os.Open(filepath.Join(dir, "large"))
		must(b, err)
		defer f.Close()
		must(b, unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
		buf := make([]byte, 1<<20)
		for off := int64(0); !random && off < size; off += int64(len(buf)) {
			_, err := f.ReadAt(buf, off)
			must(b, err)
		}
		for range 4096 {
			if random {
				_, err := f.ReadAt(buf[:4096], rand.Int64N(size/4096)*4096)
				must(b, err)
			}
		}
	}
	// In turn, and medians of the time that a processor was busy with it: the machine
	// does other things, too.
	compare := func(other string, random bool) func(b *testing.B) {
		return func(b *testing.B) {
			goruntime.LockOSThread()
			defer goruntime.UnlockOSThread()
			var both [2][]float64
			for b.Loop() {
				for i, dir := range []string{direct, other} {
					before := busy(b)
					read(dir, random)
					both[i] = append(both[i], (busy(b) - before).Seconds())
				}
			}
			for i := range both {
				slices.Sort(both[i])
			}
			d, o := both[0][len(both[0])/2], both[1][len(both[1])/2]
			bytes := float64(size)
			if random {
				bytes = 4096 * 4096
			}
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(bytes/d/1e6, "direct-MB/s")
			b.ReportMetric(bytes/o/1e6, "MB/s")
			b.ReportMetric(d/o, "of-direct")
		}
	}
	read(direct, false)
	b.Run("asked/sequential", compare(asked, false))
	b.Run("asked/random", compare(asked, true))
	must(b, unix.Unmount(asked, 0))
	m.Release()
	b.Run("released/sequential", compare(released, false))
	b.Run("released/random", compare(released, true))
}

// busy is the time that a processor was busy with what this thread does.
func busy(b *testing.B) time.Duration {
	var u unix.Rusage
	must(b, unix.Getrusage(unix.RUSAGE_THREAD, &u))
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func named(b *testing.B, name string) mount.Face {
	f, err := mount.FaceNamed(name)
	must(b, err)
	return f
}

// BenchmarkCold reads a file of 64 MiB one after the other that is not here, from where
// each request takes 20 ms, by the kernel's readahead in KiB.
func BenchmarkCold(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("needs root")
	}
	const size = 64 << 20
	data := make([]byte, size)
	rand.NewChaCha8([32]byte{4}).Read(data)
	s := indexOf([]file{
		{Header: tar.Header{Typeflag: tar.TypeDir, Name: ".", Mode: 0o755}},
		{Header: tar.Header{Typeflag: tar.TypeReg, Name: "other", Mode: 0o644, Size: 1}, data: []byte("x")},
		{Header: tar.Header{Typeflag: tar.TypeReg, Name: hung, Mode: 0o644, Size: size}, data: data},
	})
	for _, name := range []string{"device", "fanotify"} {
		for _, kib := range []int{128, 1024, 4096} {
			b.Run(fmt.Sprintf("%s/%d", name, kib), func(b *testing.B) {
				b.SetBytes(size)
				for b.Loop() {
					b.StopTimer()
					dir := b.TempDir()
					store(b, dir, s)
					n, err := open(dir)
					must(b, err)
					slow := slowly{n.source}
					n.fill.Close()
					l, err := link.Open(n.linked.Dir)
					must(b, err)
					n.fill, err = fill.New(n.pool, fill.Options{}).Open(l, slow)
					must(b, err)
					o := options
					o.ReadAheadKiB = kib
					at, _ := showWith(b, named(b, name), n.image(), o)
					f, err := os.Open(filepath.Join(at, hung))
					must(b, err)
					b.StartTimer()
					_, err = io.Copy(io.Discard, struct{ io.Reader }{f})
					must(b, err)
					b.StopTimer()
					f.Close()
					b.StartTimer()
				}
			})
		}
	}
}

type slowly struct{ *source }

func (s slowly) Range(ctx context.Context, ref blob.Ref, off, n int64) (io.ReadCloser, error) {
	time.Sleep(20 * time.Millisecond)
	return s.source.Range(ctx, ref, off, n)
}
