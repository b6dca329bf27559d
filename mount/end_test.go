package mount

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Ways in which a mount ends.

func TestUmountByAnyone(t *testing.T) {
	for _, backing := range []Backing{File, Loop} {
		tree, c := image(t)
		dir, m := mounted(t, c, Options{Backing: backing})
		sameTree(t, tree, dir)
		select {
		case <-m.Done():
			t.Fatal("done while mounted")
		default:
		}
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			t.Fatalf("umount: %v %s", err, out)
		}
		wait(t, "Done after umount", m.Done())
		if m.Err() != nil {
			t.Error(m.Err())
		}
		if err := m.Abort(); err != nil {
			t.Errorf("abort afterwards: %v", err)
		}
	}
}

// A mount that is detached while a file is open lives as long as the file.
func TestLazyUmountKeepsServing(t *testing.T) {
	tree, c := image(t)
	dir, m := mounted(t, c, Options{})
	f, err := os.Open(filepath.Join(dir, "big"))
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	want, _ := os.ReadFile(filepath.Join(tree, "big"))
	got := make([]byte, len(want))
	if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(want, got) {
		t.Errorf("read after a lazy umount: %v", err)
	}
	select {
	case <-m.Done():
		t.Fatal("done while a file is open")
	default:
	}
	f.Close()
	wait(t, "Done after the last close", m.Done())
}

func TestCloseUnattached(t *testing.T) {
	_, c := image(t)
	m, err := Device(t.Context(), c, Options{})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	}
	wait(t, "Done after Close", m.Done())
}

// Nothing is left of many mounts: no descriptor, no mount, no loop device.
func TestNothingLeft(t *testing.T) {
	_, c := image(t)
	count := func() int {
		t.Helper()
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(fds)
	}
	before := count()
	bad := &memContent{data: make([]byte, 1<<20)}
	for i := range 20 {
		o := Options{Backing: Backing(i % 3)}
		o.Name = "left-image"
		m, err := Device(t.Context(), c, o)
		if err != nil {
			t.Fatal(err)
		}
		m.Close()
		wait(t, "Done", m.Done())
		if _, err := Device(t.Context(), bad, o); err == nil {
			t.Fatal("zeros were mounted")
		}
	}
	if after := count(); after > before {
		t.Errorf("%d descriptors are open, %d were before", after, before)
	}
	files, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, f := range files {
		p, err := os.ReadFile(f) // fails if the device is free
		if err == nil && filepath.Base(string(bytes.TrimSpace(p))) == "left-image" {
			t.Errorf("%s: a loop device is left", f)
		}
	}
}

func TestAbortFreesReaders(t *testing.T) {
	for _, obedient := range []bool{true, false} {
		_, c := image(t)
		dir, m := mounted(t, c, Options{})
		stuck, reading := make(chan struct{}), make(chan struct{}, 100)
		c.onTry(func(off int64, n int) bool { return false })
		c.onRead(func(ctx context.Context, off int64, n int) error {
			reading <- struct{}{}
			if obedient {
				<-ctx.Done()
				return ctx.Err()
			}
			<-stuck
			return nil
		})
		done := make(chan error)
		go func() {
			_, err := os.ReadFile(filepath.Join(dir, "big"))
			done <- err
		}()
		<-reading
		if err := m.Abort(); err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-done:
			if err == nil {
				t.Error("a read that never had its bytes succeeded")
			}
		case <-time.After(30 * time.Second):
			t.Fatal("a reader hangs after Abort")
		}
		within(t, "cold read after Abort", func() {
			if _, err := os.ReadFile(filepath.Join(dir, "odd")); err == nil {
				t.Error("a cold read after Abort succeeded")
			}
		})
		close(stuck)
		wait(t, "Done after Abort", m.Done())
	}
}

func TestMountIsCancelled(t *testing.T) {
	_, c := image(t)
	ctx, cancel := context.WithCancel(t.Context())
	c.onTry(func(off int64, n int) bool { return false })
	c.onRead(func(ctx context.Context, off int64, n int) error {
		cancel()
		<-ctx.Done()
		return ctx.Err()
	})
	within(t, "mount", func() {
		if _, err := Device(ctx, c, Options{Backing: File}); !errors.Is(err, context.Canceled) {
			t.Errorf("%v, want canceled", err)
		}
	})
}

// The serving process is killed: errors, never zeros, and nobody hangs.
func TestServerKilled(t *testing.T) {
	needRoot(t)
	tree := t.TempDir()
	makeTree(t, tree)
	hang := bytes.Repeat([]byte{0xee}, 1<<20)
	if err := os.WriteFile(filepath.Join(tree, "hang"), hang, 0o644); err != nil {
		t.Fatal(err)
	}
	img, dir := makeImage(t, tree), t.TempDir()
	cmd := exec.Command("/proc/self/exe", img, dir, "hang")
	cmd.Env = append(os.Environ(), roleEnv+"=serve")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		unix.Unmount(dir, unix.MNT_DETACH)
	})
	lines := bufio.NewScanner(out)
	within(t, "server to start", func() {
		if !lines.Scan() || lines.Text() != "ready" {
			t.Errorf("server says %q", lines.Text())
		}
	})
	warm, err := os.ReadFile(filepath.Join(dir, "odd"))
	if err != nil {
		t.Fatal(err)
	}
	pending := make(chan error, 1)
	go func() {
		_, err := os.ReadFile(filepath.Join(dir, "hang"))
		pending <- err
	}()
	within(t, "a reader to hang", func() { lines.Scan() })
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	within(t, "the pending read", func() {
		if err := <-pending; err == nil {
			t.Error("pending read succeeded")
		}
	})
	within(t, "reads without a server", func() {
		if p, err := os.ReadFile(filepath.Join(dir, "big")); err == nil {
			t.Error("cold read succeeded")
		} else if bytes.Contains(p, make([]byte, 4096)) {
			t.Error("cold read gave zeros")
		}
		if p, err := os.ReadFile(filepath.Join(dir, "odd")); err == nil && !bytes.Equal(p, warm) {
			t.Error("cached bytes changed")
		}
		if out := child(t, "mmap", filepath.Join(dir, "big")); out != "fault\n" && out[:5] != "error" {
			t.Errorf("mmap: %s", out)
		}
	})
	if err := unix.Unmount(dir, 0); err != nil {
		t.Errorf("umount: %v", err)
	}
}
