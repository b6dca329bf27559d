package daemon

import (
	"archive/tar"
	"bytes"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

// BenchmarkMountManyFiles measures an image of 100,000 files: the first pull,
// which fetches, reads and links its index; a mount of an image that is linked
// already; and the most memory that the service took for both.
//
//	go test -run '^$' -bench MountManyFiles -benchtime 10x ./daemon
func BenchmarkMountManyFiles(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("mounting needs root")
	}
	var layer bytes.Buffer
	tw := tar.NewWriter(&layer)
	for i := range 100_000 {
		content := fmt.Sprintf("file %d\n", i)
		err := tw.WriteHeader(&tar.Header{
			Name: fmt.Sprintf("usr/lib/d%03d/f%05d", i/250, i), Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(content)),
		})
		if err != nil {
			b.Fatal(err)
		}
		tw.Write([]byte(content))
	}
	tw.Close()
	ref := layoutOf(b, layer.Bytes())
	src := Source{Ref: ref, Platform: "linux/amd64"}
	var pull, mount time.Duration
	var peak int64
	for b.Loop() {
		c := service(b)
		pid := pid(b, c)
		began := time.Now()
		if _, err := c.Pull(background, src, false, nil); err != nil {
			b.Fatal(err)
		}
		pull += time.Since(began)
		began = time.Now()
		m, err := c.Mount(background, src, Place{Where: "nowhere"}, nil)
		if err != nil {
			b.Fatal(err)
		}
		mount += time.Since(began)
		m.FS.Close()
		peak = max(peak, peakRSS(b, pid))
		end(b, c)
	}
	n := float64(b.N)
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(pull.Milliseconds())/n, "ms/pull")
	b.ReportMetric(mount.Seconds()*1000/n, "ms/mount")
	b.ReportMetric(float64(peak)/1000, "MB-peak")
}

// peakRSS is the most memory a process has had, in kB.
func peakRSS(t testing.TB, pid int) (kb int64) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if _, err := fmt.Sscanf(line, "VmHWM: %d kB", &kb); err == nil {
			return kb
		}
	}
	t.Fatal("the kernel does not tell VmHWM")
	return 0
}
