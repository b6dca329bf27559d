package fusedev

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

const roleEnv = "SHALE_FUSEDEV_TEST" // hang, or answer

func TestMain(m *testing.M) {
	if role := os.Getenv(roleEnv); role != "" {
		serveThere(role)
	}
	goleak.VerifyTestMain(m)
}

// serveThere serves descriptor 3 until it is killed. Its reads hang, or all are hits.
func serveThere(role string) {
	c := &bytesContent{data: pattern(testSize)}
	if role == "hang" {
		c.to, c.read = testSize, func(ctx context.Context) error {
			fmt.Println("hangs")
			<-ctx.Done()
			return ctx.Err()
		}
	}
	s, err := New(c, Options{Threads: 64, DirectIO: role == "answer"})
	if err != nil {
		panic(err)
	}
	if err := s.Serve(os.NewFile(3, "fuse")); err != nil {
		panic(err)
	}
}

// another makes a process that serves dev in a role.
func another(role string, dev *os.File) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), roleEnv+"="+role)
	cmd.ExtraFiles = []*os.File{dev}
	cmd.Stderr = os.Stderr
	return cmd
}

const testSize = 5<<20 + 77

// connect mounts a FUSE file system that nobody serves yet.
func connect(t *testing.T) (dev *os.File, dir string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	dev, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		t.Skip(err)
	}
	dir = t.TempDir()
	opts := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,max_read=%d", dev.Fd(), MaxRead)
	if err := unix.Mount("shale-test", dir, "fuse", unix.MS_RDONLY|unix.MS_NODEV|unix.MS_NOSUID, opts); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		unix.Unmount(dir, unix.MNT_FORCE) // wakes what hangs, if a test failed
		unix.Unmount(dir, unix.MNT_DETACH)
		dev.Close()
	})
	return dev, dir
}

// openAt opens a file that this process serves. Not by os.Open: it makes the runtime wait for
// an answer to POLL, in a call during which nothing of this process can stop, so that a
// collection of garbage that begins then waits for it, and it for the collection's end.
func openAt(path string, flags int) (*os.File, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|flags, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), path), nil
}

func serve(t *testing.T, s *Server, dev *os.File) (ended chan error) {
	ended = make(chan error, 1)
	go func() { ended <- s.Serve(dev) }()
	return ended
}

func receive[T any](t *testing.T, what string, ch <-chan T) T {
	t.Helper()
	select {
	case v := <-ch:
		return v
	case <-time.After(30 * time.Second):
		t.Fatalf("%s: nothing after 30 s", what)
		panic("unreachable")
	}
}

// The file alone, without EROFS: through the page cache, direct, and at its end.
func TestServe(t *testing.T) {
	for _, o := range []Options{{}, {DirectIO: true, Threads: 4}} {
		dev, dir := connect(t)
		data := pattern(testSize)
		s := newServer(t, &bytesContent{data: data, from: 1 << 20, to: 3 << 20}, o)
		ended := serve(t, s, dev)
		path := filepath.Join(dir, s.Name())
		st, err := os.Stat(path)
		if err != nil || st.Size() != testSize || st.Mode() != 0o400 {
			t.Fatalf("stat: %v %v", st, err)
		}
		if _, err := os.Stat(path + "x"); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("another name: %v", err)
		}
		for _, flag := range []int{0, unix.O_DIRECT} {
			f, err := openAt(path, flag)
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(f)
			if err != nil || !bytes.Equal(got, data) {
				t.Errorf("flag %#x: %d bytes, %v", flag, len(got), err)
			}
			p := make([]byte, 4096)
			if n, err := f.ReadAt(p, testSize-77); n != 77 || err != io.EOF || !bytes.Equal(p[:n], data[testSize-77:]) {
				t.Errorf("last bytes: %d, %v", n, err)
			}
			f.Close()
		}
		if _, err := os.OpenFile(path, os.O_RDWR, 0); err == nil {
			t.Error("opened for writing")
		}
		if err := unix.Unmount(dir, 0); err != nil {
			t.Fatal(err)
		}
		if err := receive(t, "end after umount", ended); err != nil {
			t.Error(err)
		}
		if err := s.Serve(dev); err == nil {
			t.Error("served twice")
		}
		if stats := s.Stats(); stats.Misses == 0 || stats.Hits == 0 || stats.Errors != 0 {
			t.Errorf("stats %+v", stats)
		}
	}
}

// Another process serves, has reads in work, and is killed. This one takes the
// connection over, and the readers get their bytes without noticing.
func TestTakeover(t *testing.T) {
	dev, dir := connect(t)
	cmd := another("hang", dev)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	data := pattern(testSize)
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			f, err := openAt(filepath.Join(dir, "image"), 0)
			if err != nil {
				t.Error(err)
				return
			}
			defer f.Close()
			p := make([]byte, 8192)
			if _, err := f.ReadAt(p, int64(i)<<20); err != nil || !bytes.Equal(p, data[i<<20:i<<20+8192]) {
				t.Errorf("read across the takeover: %v", err)
			}
		})
	}
	hangs := make(chan error, 1)
	go func() {
		_, err := io.ReadFull(out, make([]byte, len("hangs\n")))
		hangs <- err
	}()
	if err := receive(t, "a read to hang", hangs); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	resend(t, dev)
	s := newServer(t, &bytesContent{data: data}, Options{})
	ended := serve(t, s, dev)
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	receive(t, "readers", done)
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	if err := receive(t, "end", ended); err != nil {
		t.Error(err)
	}
}

func resend(t *testing.T, dev *os.File) {
	t.Helper()
	if err := Resend(dev); errors.Is(err, unix.EINVAL) {
		t.Skip("the kernel cannot resend (before 6.9)")
	} else if err != nil {
		t.Fatal(err)
	}
}

// Processes that answer are killed, one after the other. Each has threads that have
// not read a request before: the kernel must not fail to hand them one.
func TestKilledWhileReading(t *testing.T) {
	dev, dir := connect(t)
	data := pattern(testSize)
	stop := make(chan struct{})
	var readers sync.WaitGroup
	for i := range 8 {
		readers.Go(func() {
			// Not os.Open: it makes the runtime wait for an answer to POLL, with a
			// processor that those need who start what answers.
			fd, err := unix.Open(filepath.Join(dir, "image"), unix.O_RDONLY, 0)
			if err != nil {
				t.Error(err)
				return
			}
			defer unix.Close(fd)
			p := make([]byte, 4096)
			for off := int64(i) * 4096; ; off = (off + 8*4096) % (testSize - 4096) {
				select {
				case <-stop:
					return
				default:
				}
				if n, err := unix.Pread(fd, p, off); err != nil || !bytes.Equal(p[:n], data[off:off+4096]) {
					t.Errorf("read at %d: %d bytes, %v", off, n, err)
				}
			}
		})
	}
	for range 20 {
		cmd := another("answer", dev)
		if err := cmd.Start(); err != nil {
			t.Error(err)
			break
		}
		time.Sleep(50 * time.Millisecond)
		cmd.Process.Kill()
		cmd.Wait()
		resend(t, dev)
	}
	s := newServer(t, &bytesContent{data: data}, Options{})
	ended := serve(t, s, dev)
	close(stop)
	readers.Wait()
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	if err := receive(t, "end", ended); err != nil {
		t.Error(err)
	}
}

// Misses that cannot run yet expire in time too, and leave the queue.
func TestWaitingMissesExpire(t *testing.T) {
	dev, dir := connect(t)
	stuck := make(chan struct{})
	c := &bytesContent{data: pattern(testSize), to: testSize, read: func(context.Context) error { <-stuck; return nil }}
	s := newServer(t, c, Options{MaxInflight: 1, ReadTimeout: 50 * time.Millisecond})
	ended := serve(t, s, dev)
	f, err := openAt(filepath.Join(dir, "image"), unix.O_DIRECT)
	if err != nil {
		t.Fatal(err)
	}
	results := make(chan error)
	for i := range 10 {
		go func() {
			_, err := f.ReadAt(make([]byte, 4096), int64(i)*4096)
			results <- err
		}()
	}
	for range 10 {
		if err := receive(t, "a read that times out", results); !errors.Is(err, unix.EIO) {
			t.Errorf("%v, want EIO", err)
		}
	}
	s.queue.mu.Lock()
	if n := s.queue.waiting.Len(); n != 0 || s.queue.running != 1 {
		t.Errorf("%d misses wait, %d run; want 0 and 1", n, s.queue.running)
	}
	s.queue.mu.Unlock()
	f.Close()
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-ended:
		t.Errorf("Serve returned %v while Content was in use", err)
	case <-time.After(20 * time.Millisecond):
	}
	close(stuck)
	if err := receive(t, "end", ended); err != nil {
		t.Error(err)
	}
}

func TestServeOfNoConnection(t *testing.T) {
	dev, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		t.Skip(err)
	}
	defer dev.Close()
	s := newServer(t, &bytesContent{}, Options{})
	if err := receive(t, "end", serve(t, s, dev)); !errors.Is(err, unix.EPERM) {
		t.Errorf("%v, want EPERM", err)
	}
}
