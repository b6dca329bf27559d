package disk

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func newDisk(t *testing.T) *Disk {
	t.Helper()
	d, err := New(t.Context(), filepath.Join(t.TempDir(), "disk"), 64<<20)
	if errors.Is(err, ErrUnsupported) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		if mounts, err := os.ReadFile("/proc/self/mounts"); err != nil || bytes.Contains(mounts, []byte(d.dir)) {
			t.Errorf("left behind: %v\n%s", err, mounts)
		}
	})
	return d
}

func (d *Disk) fault(t *testing.T, kind string, on bool) {
	t.Helper()
	if err := d.Fault(kind, on); err != nil {
		t.Fatal(err)
	}
}

// write writes a file and has it written back.
func write(d *Disk, name string, p []byte) error {
	f, err := os.Create(filepath.Join(d.Dir, name))
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(p); err != nil {
		return err
	}
	return f.Sync()
}

func read(d *Disk, name string) ([]byte, error) {
	f, err := os.Open(filepath.Join(d.Dir, name))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return nil, err
	}
	p := make([]byte, 1<<20)
	n, err := f.Read(p)
	return p[:n], err
}

var some = bytes.Repeat([]byte("some bytes "), 20000)

func TestDisk(t *testing.T) {
	d := newDisk(t)
	if err := write(d, "a", some); err != nil {
		t.Fatal(err)
	}
	if p, err := read(d, "a"); err != nil || !bytes.Equal(p, some) {
		t.Fatalf("%d bytes, %v", len(p), err)
	}

	d.fault(t, "disk full", true)
	if err := write(d, "b", some); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("full: %v", err)
	}
	d.fault(t, "disk full", false)
	if err := write(d, "b", some); err != nil {
		t.Errorf("no longer full: %v", err)
	}

	d.fault(t, "disk read errors", true)
	if p, err := read(d, "a"); !errors.Is(err, syscall.EIO) {
		t.Errorf("read errors: %d bytes, %v", len(p), err)
	}
	d.fault(t, "disk read errors", false)
	if p, err := read(d, "a"); err != nil || !bytes.Equal(p, some) {
		t.Errorf("no longer: %d bytes, %v", len(p), err)
	}

	d.fault(t, "disk hangs", true)
	done := make(chan error, 1)
	go func() { done <- write(d, "c", some) }()
	select {
	case err := <-done:
		t.Errorf("it does not hang: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	d.fault(t, "disk hangs", false)
	if err := <-done; err != nil {
		t.Errorf("no longer: %v", err)
	}
	if err := d.Fault("disk on fire", true); err == nil {
		t.Error("it can be on fire")
	}
}

// TestWriteErrors, and that the file system is read-only then.
func TestWriteErrors(t *testing.T) {
	for _, kind := range []string{"disk write errors", "disk read-only"} {
		d := newDisk(t)
		if err := write(d, "a", some); err != nil {
			t.Fatal(err)
		}
		d.fault(t, kind, true)
		if err := write(d, "b", some); !errors.Is(err, syscall.EIO) && !errors.Is(err, syscall.EROFS) {
			t.Errorf("%s: %v", kind, err)
		}
		d.fault(t, kind, false)
		// It cannot be filled either; what it was filled with comes back with Remount.
		d.fault(t, "disk full", true)
		d.fault(t, "disk full", false)
		if p, err := read(d, "a"); err != nil || !bytes.Equal(p, some) {
			t.Errorf("%s: what was there: %d bytes, %v", kind, len(p), err)
		}
		if err := d.Remount(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := write(d, "b", some); err != nil {
			t.Errorf("%s, mounted anew: %v", kind, err)
		}
		if p, err := read(d, "b"); err != nil || !bytes.Equal(p, some) {
			t.Errorf("%s, mounted anew: %d bytes, %v", kind, len(p), err)
		}
	}
}

// TestFullAndDead: what fills a disk that dies then is gone when it is mounted anew.
func TestFullAndDead(t *testing.T) {
	d := newDisk(t)
	d.fault(t, "disk full", true)
	f, err := os.Open(d.Dir) // or the ballast would be gone as it came
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		t.Fatal(err)
	}
	f.Close()
	for range 2 { // a dead one may die again
		d.fault(t, "disk read-only", true)
	}
	d.fault(t, "disk full", false)
	if err := d.Remount(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := write(d, "a", some); err != nil {
		t.Error(err)
	}
}

func TestUnsupported(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	if _, err := New(context.Background(), filepath.Join(t.TempDir(), "x"), 1<<20); !errors.Is(err, ErrUnsupported) {
		t.Errorf("%v, want ErrUnsupported", err)
	}
}
