package source

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// read reads all of an image's only layer: a line for each entry.
func read(t *testing.T, img *Image, err error) ([]string, error) {
	t.Helper()
	if err != nil {
		return nil, err
	}
	r, err := img.Layers[0].Open(t.Context(), func(int64) {})
	if err != nil {
		return nil, err
	}
	defer r.Close()
	var lines []string
	for {
		e, err := r.Next()
		if err == io.EOF {
			return lines, nil
		}
		if err != nil {
			return lines, err
		}
		line := fmt.Sprintf("%d %s %s", e.Op, e.Path, e.Target)
		if e.Inode != nil && e.Inode.IsRegular() {
			p, err := io.ReadAll(r)
			if err != nil {
				return lines, fmt.Errorf("%s: %w", e.Path, err)
			}
			line += fmt.Sprintf(" %d %q", e.Inode.Size, p)
		}
		lines = append(lines, line)
	}
}

func write(t *testing.T, name, data string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(data), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestDir(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"b", "a", "d/z", "d/y", "d-"} {
		os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755)
		write(t, filepath.Join(dir, name), name)
	}
	if err := os.Link(filepath.Join(dir, "d/z"), filepath.Join(dir, "e")); err != nil {
		t.Fatal(err)
	}
	img, err := Dir(dir, image.Platform{})
	lines, err := read(t, img, err)
	want := []string{"0  ", `0 a  1 "a"`, `0 b  1 "b"`, "0 d ", `0 d/y  3 "d/y"`, `0 d/z  3 "d/z"`, `0 d-  2 "d-"`, "1 e d/z"}
	if err != nil || !slices.Equal(lines, want) {
		t.Errorf("%v\n%q, want\n%q", err, lines, want)
	}
	if img.Platform.OS != "linux" || img.Platform.Architecture == "" || !strings.Contains(string(img.Config), `"os":"linux"`) {
		t.Errorf("platform %v, config %s", img.Platform, img.Config)
	}
}

func TestDirRefuses(t *testing.T) {
	for name, prepare := range map[string]func(at string) error{
		"a socket": func(at string) error {
			l, err := net.Listen("unix", at)
			if err == nil {
				l.(*net.UnixListener).SetUnlinkOnClose(false)
				l.Close()
			}
			return err
		},
		"a character device 0:0": func(at string) error { return unix.Mknod(at, unix.S_IFCHR, 0) },
		"trusted.overlay.opaque": func(at string) error {
			write(t, at, "")
			return unix.Setxattr(at, "trusted.overlay.opaque", []byte("y"), 0)
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := prepare(filepath.Join(dir, "it")); errors.Is(err, unix.EPERM) {
				t.Skip("needs root")
			} else if err != nil {
				t.Fatal(err)
			}
			img, err := Dir(dir, image.Platform{})
			if _, err := read(t, img, err); !errors.Is(err, index.ErrUnsupported) || !strings.Contains(err.Error(), "/it: ") || !strings.Contains(err.Error(), name) {
				t.Errorf("got error %v, want one about %s", err, name)
			}
		})
	}
	if _, err := Dir("/nowhere", image.Platform{}); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

// TestDirChanges changes a file between its entry and its data.
func TestDirChanges(t *testing.T) {
	for name, change := range map[string]func(string) error{
		"shorter":  func(f string) error { return os.Truncate(f, 100) },
		"longer":   func(f string) error { return os.Truncate(f, 1<<20) },
		"replaced": func(f string) error { return os.WriteFile(f, bytes.Repeat([]byte("b"), 100000), 0) },
	} {
		dir := t.TempDir()
		write(t, filepath.Join(dir, "f"), strings.Repeat("a", 100000))
		img, err := Dir(dir, image.Platform{})
		if err != nil {
			t.Fatal(err)
		}
		r, err := img.Layers[0].Open(t.Context(), func(int64) {})
		if err != nil {
			t.Fatal(err)
		}
		for range 2 { // the root, f
			if _, err := r.Next(); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(20 * time.Millisecond) // the clock of file systems has ticks
		if err := change(filepath.Join(dir, "f")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadAll(r); !errors.Is(err, errChanged) {
			t.Errorf("%s: got error %v", name, err)
		}
		r.Close()
	}
}

// TestTarPipe reads an archive from a pipe that stays silent, until it is
// cancelled.
func TestTarPipe(t *testing.T) {
	fifo := filepath.Join(t.TempDir(), "pipe")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	w, err := os.OpenFile(fifo, os.O_RDWR, 0) // keeps it open
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	img, err := Tar(fifo, image.Platform{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	failed := make(chan error)
	go func() {
		r, err := img.Layers[0].Open(ctx, func(int64) {})
		if err == nil {
			_, err = r.Next()
			r.Close()
		}
		failed <- err
	}()
	select {
	case err := <-failed:
		t.Fatalf("ended before it was cancelled: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	cancel()
	if err := <-failed; err == nil {
		t.Error("no error")
	}
}

func TestSum(t *testing.T) {
	p := bytes.Repeat([]byte("0123456789"), 100000)
	s := newSum(bytes.NewReader(p))
	if q, err := io.ReadAll(s); err != nil || !bytes.Equal(p, q) {
		t.Error("other bytes, or", err)
	}
	if got, want := s.digest(), "sha256:ec21d64624228af3ecd4bdaa8239e32ed943b01e26934cd5610fddb361426dc6"; got != want {
		t.Errorf("digest %s, want %s", got, want)
	}
	s.close()
	s = newSum(bytes.NewReader(p))
	s.close() // unread
}
