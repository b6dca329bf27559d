package keeper

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestMain is also the keeper and the worker of tests: a worker keeps a pipe for
// each line that a client of the API sends, and says in the file "said" what it was
// given.
func TestMain(m *testing.M) {
	switch w, err := Inherit(); {
	case err != nil:
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	case w != nil:
		testWorker(w)
	case os.Getenv("KEEPER_TEST_DIR") != "":
		testKeeper(os.Getenv("KEEPER_TEST_DIR"))
	}
	os.Exit(m.Run())
}

func testKeeper(dir string) {
	if pid := os.Getenv("KEEPER_TEST_LISTEN"); pid != "" {
		os.Setenv("LISTEN_PID", fmt.Sprint(os.Getpid())) // as a manager does between fork and exec
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	hang, _ := time.ParseDuration(os.Getenv("KEEPER_TEST_HANG"))
	os.Remove(filepath.Join(dir, "api"))
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Net: "unixpacket", Name: filepath.Join(dir, "api")})
	var api, lock *os.File
	if err == nil {
		api, err = l.File()
	}
	if err == nil {
		lock, err = os.Create(filepath.Join(dir, "lock"))
	}
	if err == nil {
		err = Run(ctx, Options{
			API: api, Lock: lock, Dir: dir, Version: "test", Args: os.Args, Logger: slog.New(slog.NewTextHandler(os.Stderr, nil)),
			Ready:   func(failure json.RawMessage) { os.WriteFile(filepath.Join(dir, "ready"), failure, 0o600) },
			Prepare: func() error { return nil }, Patience: 3 * time.Second, Hang: hang,
		})
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func testWorker(w *Worker) {
	dir := os.Getenv("KEEPER_TEST_DIR")
	w.Check = func() {
		for {
			if _, err := os.Stat(filepath.Join(dir, "deadlock")); err != nil {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	mounts, err := w.Hello("test")
	if err != nil {
		os.Exit(1)
	}
	if why, err := os.ReadFile(filepath.Join(dir, "broken")); err == nil {
		w.Fail(why)
		os.Exit(1)
	}
	var said bytes.Buffer
	have := map[string][]*os.File{}
	for _, m := range mounts {
		have[m.ID] = m.Files
		fmt.Fprintf(&said, "%s %s %s %d %v\n", m.ID, m.Show, m.Rest, len(m.Files), m.Settled)
	}
	os.WriteFile(filepath.Join(dir, "said"), said.Bytes(), 0o600)
	l, err := net.FileListener(w.API)
	if err != nil {
		os.Exit(1)
	}
	w.Ready()
	go func() {
		for o := range w.Orders {
			if o == Stop {
				w.End()
			}
			os.Exit(0)
		}
	}()
	for {
		c, err := l.(*net.UnixListener).AcceptUnix()
		if err != nil {
			os.Exit(1)
		}
		_, body, files, err := readPacket(c, make([]byte, maxPacket))
		if err != nil {
			continue
		}
		var m Mount
		json.Unmarshal(body, &m)
		m.Files = files
		switch {
		case m.ID == "end":
			w.End()
			os.Exit(0)
		case string(m.Show) == "null":
			closeAll(have[m.ID])
			w.Drop(m.ID)
		default:
			have[m.ID] = append(have[m.ID], m.Files...)
			if err := w.Keep(m); err != nil {
				fmt.Fprintln(os.Stderr, err)
			}
		}
		writePacket(c, kindResult, nil)
		c.Close()
	}
}

// world is a keeper and where it is.
type world struct {
	t   *testing.T
	dir string
	cmd *exec.Cmd
}

func start(t *testing.T, dir string, env []string, files ...*os.File) *world {
	t.Helper()
	w := &world{t: t, dir: dir}
	w.cmd = exec.Command("/proc/self/exe")
	w.cmd.Env = append(append(os.Environ(), "KEEPER_TEST_DIR="+dir), env...)
	w.cmd.ExtraFiles = files
	log, err := os.OpenFile(filepath.Join(dir, "log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	w.cmd.Stderr = log
	if err := w.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		w.cmd.Process.Signal(syscall.SIGTERM)
		w.cmd.Wait()
		if t.Failed() {
			said, _ := os.ReadFile(log.Name())
			t.Logf("keeper:\n%s", said)
		}
	})
	eventually(t, "it is ready", func() bool { _, err := os.Stat(filepath.Join(dir, "ready")); return err == nil })
	return w
}

func (w *world) status() *Status {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	st, err := Ask(ctx, w.dir)
	if err != nil {
		w.t.Fatal(err)
	}
	return st
}

// tell has the worker keep or drop a mount.
func (w *world) tell(m Mount) {
	w.t.Helper()
	c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Net: "unixpacket", Name: filepath.Join(w.dir, "api")})
	if err != nil {
		w.t.Fatal(err)
	}
	defer c.Close()
	if err := writePacket(c, kindMount, m, m.Files...); err != nil {
		w.t.Fatal(err)
	}
	if _, _, _, err := readPacket(c, make([]byte, maxPacket)); err != nil && m.ID != "end" {
		w.t.Fatal(err)
	}
}

// kill kills the worker and waits for the next.
func (w *world) kill() {
	w.t.Helper()
	old := w.status().Worker
	if err := syscall.Kill(old, syscall.SIGKILL); err != nil {
		w.t.Fatal(err)
	}
	eventually(w.t, "another worker serves", func() bool { n := w.status().Worker; return n != 0 && n != old })
}

// said is what the last worker was given.
func (w *world) said() string {
	w.t.Helper()
	p, err := os.ReadFile(filepath.Join(w.dir, "said"))
	if err != nil {
		w.t.Fatal(err)
	}
	return string(p)
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

// pipe gives two files to keep, and what tells that nobody has the first any more.
func pipe(t *testing.T) (files []*os.File, closed func() bool, aborted func() bool) {
	t.Helper()
	r1, w1, err := os.Pipe()
	r2, w2, err2 := os.Pipe()
	if err := errors.Join(err, err2); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeAll([]*os.File{r1, r2, w1, w2}) })
	read := func(f *os.File) (string, error) {
		f.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
		p := make([]byte, 10)
		n, err := f.Read(p)
		return string(p[:n]), err
	}
	closed = func() bool { _, err := read(r1); return err != nil && strings.Contains(err.Error(), "EOF") }
	aborted = func() bool { s, _ := read(r2); return s == "1" }
	return []*os.File{w1, w2}, closed, aborted
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func deadline() time.Time { return time.Now().Add(50 * time.Millisecond) }
