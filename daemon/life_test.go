package daemon

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/index"
)

// processes of the service, which is started if need be.
func processes(t testing.TB, c *Client) (keeper, worker int) {
	t.Helper()
	st, err := c.Status(background)
	if err != nil {
		t.Fatal(err)
	}
	if p := st.Processes; len(p) != 2 || p[0].Role != RoleKeeper || p[1].Role != RoleWorker {
		t.Fatalf("processes: %+v", p)
	}
	return st.Processes[0].PID, st.Processes[1].PID
}

// pid of the worker.
func pid(t testing.TB, c *Client) int {
	t.Helper()
	_, worker := processes(t, c)
	return worker
}

func kill(t *testing.T, c *Client, sig syscall.Signal) {
	t.Helper()
	keeper, worker := processes(t, c)
	if err := syscall.Kill(keeper, sig); err != nil {
		t.Fatal(err)
	}
	if sig == syscall.SIGKILL {
		if err := syscall.Kill(worker, sig); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the service is dead", func() bool {
		_, err := (&Client{Root: c.Root}).Status(background)
		return errors.Is(err, ErrNotRunning)
	})
}

// stuck is a reference whose registry accepts connections and never answers, and what
// waits for the first of these.
func stuck(t *testing.T) (src Source, asked func()) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return Source{Ref: l.Addr().String() + "/app:1"}, func() {
		t.Helper()
		l.(*net.TCPListener).SetDeadline(time.Now().Add(20 * time.Second))
		conn, err := l.Accept()
		must(t, err)
		t.Cleanup(func() { conn.Close() })
	}
}

// TestTerminated: a service that is told to end fails its readers and its calls,
// and the next one begins afresh.
func TestTerminated(t *testing.T) {
	c, ref := service(t), layout(t)
	dir, _ := attach(t, c, ref)
	src, asked := stuck(t)
	failed := make(chan error, 1)
	go func() {
		_, err := c.Pull(background, src, false, nil)
		failed <- err
	}()
	asked()
	kill(t, c, syscall.SIGTERM)
	if _, err := os.ReadFile(filepath.Join(dir, "big")); !errors.Is(err, syscall.EIO) {
		t.Errorf("read: %v, want EIO", err)
	}
	if err := <-failed; err == nil || errors.Is(err, context.Canceled) {
		t.Errorf("a call: %v, want that the service ends", err)
	}
	dir, _ = attach(t, c, ref)
	if got, err := os.ReadFile(filepath.Join(dir, "big")); err != nil || !bytes.Equal(got, files["big"]) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

// TestStuckRegistry: while a pull hangs the service answers, does not let
// itself be stopped, and the call ends when its client does.
func TestStuckRegistry(t *testing.T) {
	c := service(t)
	pid(t, c)
	src, asked := stuck(t)
	ctx, cancel := context.WithCancel(background)
	failed := make(chan error, 1)
	go func() {
		_, err := c.Pull(ctx, src, false, nil)
		failed <- err
	}()
	asking := &Client{Root: c.Root}
	asked()
	if err := asking.Stop(background); !errors.Is(err, ErrBusy) {
		t.Errorf("stop during a pull: %v, want ErrBusy", err)
	}
	if _, err := asking.Status(background); err != nil {
		t.Errorf("status during a pull: %v", err)
	}
	cancel()
	if err := <-failed; !errors.Is(err, context.Canceled) {
		t.Errorf("a pull that is cancelled: %v", err)
	}
	eventually(t, "the service has ended the call too", func() bool { return asking.Stop(background) == nil })
}

// TestStopped: a worker that does not answer keeps nobody, and the keeper tells
// what there is.
func TestStopped(t *testing.T) {
	c := service(t)
	keeper, p := processes(t, c)
	if err := syscall.Kill(p, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	defer syscall.Kill(p, syscall.SIGCONT)
	eventually(t, "all its threads are stopped", func() bool {
		tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", p))
		for _, task := range tasks {
			if b, err := os.ReadFile(task); err == nil && !bytes.Contains(b, []byte(") T ")) {
				return false
			}
		}
		return true
	})
	for range 3 {
		st, err := (&Client{Root: c.Root}).Status(background)
		if err != nil || st.Pool != nil || !slices.Equal(st.Processes, []Process{{RoleKeeper, keeper}, {RoleWorker, p}}) {
			t.Errorf("%+v, %v", st, err)
		}
	}
	ctx, cancel := context.WithCancel(background)
	time.AfterFunc(50*time.Millisecond, cancel)
	if _, err := c.Pull(ctx, Source{Ref: "oci:/x:y"}, false, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want Canceled", err)
	}
}

// TestManyConnections: those too many are told, and who asks nothing is not
// waited for.
func TestManyConnections(t *testing.T) {
	c := service(t)
	pid(t, c)
	var all []net.Conn
	defer func() {
		for _, conn := range all {
			conn.Close()
		}
	}()
	for len(all) <= maxCalls {
		conn, _, err := dial(background, c.Root)
		if errors.Is(err, ErrBusy) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, conn)
	}
	if len(all) < maxCalls/2 || len(all) > maxCalls {
		t.Errorf("%d connections, want at most %d", len(all), maxCalls)
	}
	eventually(t, "the silent are dropped", func() bool {
		_, err := (&Client{Root: c.Root}).Status(background)
		return err == nil
	})
}

// TestEndsWhileConnecting: no call fails because the service was just ending.
func TestEndsWhileConnecting(t *testing.T) {
	c := service(t)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 25 {
				if _, err := c.Status(background); err != nil {
					t.Error(err)
					return
				}
				if err := (&Client{Root: c.Root}).Stop(background); err != nil && !errors.Is(err, ErrNotRunning) {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// TestSocketStays ends a service that cannot remove its socket, as on a disk that has
// become read-only, and starts another one.
func TestSocketStays(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	c := service(t)
	for range 2 {
		if _, err := c.Status(background); err != nil {
			t.Fatal(err)
		}
		socket := filepath.Join(c.Root, socketName)
		if err := unix.Mount(socket, socket, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
		defer unix.Unmount(socket, unix.MNT_DETACH)
		ctx, cancel := context.WithTimeout(background, time.Minute)
		defer cancel()
		if err := (&Client{Root: c.Root}).Stop(ctx); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(socket); err != nil {
			t.Errorf("is it tested? %v", err)
		}
		if _, err := (&Client{Root: c.Root}).Status(background); !errors.Is(err, ErrNotRunning) {
			t.Errorf("status: %v, want ErrNotRunning", err)
		}
		if err := unix.Unmount(socket, unix.MNT_DETACH); err != nil {
			t.Fatal(err)
		}
		defer os.Remove(socket)
	}
}

func TestOtherVersion(t *testing.T) {
	root := t.TempDir()
	l, err := listen(root)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	stopped := make(chan string, 1)
	go func() {
		for {
			conn, err := l.AcceptUnix()
			if err != nil {
				return
			}
			js, _ := json.Marshal(hello{protocol + 1, "9.9"})
			send(conn, time.Second, kindHello, js)
			if _, body, _, err := receive(conn, make([]byte, maxPacket+1)); err == nil {
				send(conn, time.Second, kindResult, []byte("null"))
				conn.Close()
				os.Remove(filepath.Join(root, socketName)) // as a service that ends
				stopped <- string(body)
			}
			conn.Close()
		}
	}()
	c := &Client{Root: root}
	if _, err := c.Status(background); !errors.Is(err, index.ErrUnsupported) || !strings.Contains(err.Error(), "9.9") || !strings.Contains(err.Error(), "daemon stop") {
		t.Errorf("%v", err)
	}
	if err := c.Stop(background); err != nil || !strings.Contains(<-stopped, "stop") {
		t.Errorf("stop: %v", err)
	}
}

// TestClientStops: progress that nobody takes holds nothing up.
func TestClientStops(t *testing.T) {
	root := t.TempDir()
	l, err := listen(root)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	addr, dir, err := socketAddr(root)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	client, err := net.DialUnix("unixpacket", nil, addr)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	conn, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	progress := tell(conn)
	for range 400 {
		progress(Progress{Note: strings.Repeat("x", 1000)})
	}
	for i := range int64(1e6) {
		progress(Progress{Done: i, Total: 1e6})
	}
	if err := send(conn, 10*time.Millisecond, kindResult, nil); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%v: the client has taken it all", err)
	}
}

func TestErrorsOnTheWire(t *testing.T) {
	for _, x := range []struct {
		err  error
		want []error
	}{
		{&os.PathError{Op: "write", Path: "x", Err: syscall.ENOSPC}, []error{kinds[0].err}},
		{errors.Join(blob.ErrRange, index.ErrCorrupt), []error{blob.ErrRange, index.ErrCorrupt}},
		{errors.New(strings.Repeat("\x00", 2*maxPacket)), nil},
		{&os.PathError{Op: "open", Path: "x", Err: syscall.EACCES}, []error{os.ErrPermission}},
	} {
		js, err := json.Marshal(encodeError(x.err))
		if err != nil || len(js) > maxPacket {
			t.Fatal(len(js), err)
		}
		var w wireError
		if err := json.Unmarshal(js, &w); err != nil {
			t.Fatal(err)
		}
		for _, want := range x.want {
			if !errors.Is(w.decode(), want) {
				t.Errorf("%v is no %v any more", x.err, want)
			}
		}
	}
}
