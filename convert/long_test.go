package convert

import (
	"archive/tar"
	"encoding/binary"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/convert/source"
)

// TestMemory converts a layer of 4 GiB that comes out of a pipe, and looks at
// what the process took at most. It takes minutes and 4 GB of disk: set
// SHALE_LONG=1, and run it alone.
func TestMemory(t *testing.T) {
	if os.Getenv("SHALE_LONG") == "" {
		t.Skip("takes minutes: set SHALE_LONG=1")
	}
	const size, limit = 4 << 30, 512 << 20
	for _, o := range []Options{{}, {ChunkSize: 16 << 20}} {
		fifo := filepath.Join(t.TempDir(), "pipe")
		if err := unix.Mkfifo(fifo, 0o600); err != nil {
			t.Fatal(err)
		}
		go feed(t, fifo, size)
		img, err := source.Tar(fifo, amd64)
		if err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		res, err := Image(t.Context(), img, target(t), o)
		if err != nil {
			t.Fatal(err)
		}
		peak := peakMemory(t)
		t.Logf("chunks of %d bytes: %d bytes of content, %d chunks, %d bytes out, %v; at most %d MiB of memory so far",
			o.ChunkSize, res.ContentBytes, res.Chunks, res.Bytes, time.Since(start), peak>>20)
		if peak > limit {
			t.Errorf("%d bytes of memory, want at most %d", peak, limit)
		}
	}
}

// feed writes an archive with two files, of which no two blocks are alike.
func feed(t *testing.T, name string, size int64) {
	f, err := os.OpenFile(name, os.O_WRONLY, 0)
	if err != nil {
		t.Error(err)
		return
	}
	defer f.Close()
	w := tar.NewWriter(f)
	block := []byte(text(1, 1<<20))
	for _, name := range []string{"one", "two"} {
		if err := w.WriteHeader(&tar.Header{Name: name, Size: size / 2, Mode: 0o644}); err != nil {
			t.Error(err)
		}
		for off := int64(0); off < size/2; off += int64(len(block)) {
			for at := 0; at < len(block); at += 64 {
				binary.BigEndian.PutUint64(block[at:], uint64(off+int64(at))*0x9e3779b97f4a7c15+uint64(name[0]))
			}
			if _, err := w.Write(block); err != nil {
				t.Error(err)
				return
			}
		}
	}
	w.Close()
}

// peakMemory returns the most that this process has had in memory.
func peakMemory(t *testing.T) int64 {
	p, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.SplitSeq(string(p), "\n") {
		if s, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			n, err := strconv.ParseInt(strings.Fields(s)[0], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return n << 10
		}
	}
	t.Fatal("no VmHWM")
	return 0
}
