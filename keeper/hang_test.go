package keeper

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// TestHung: a worker that is stopped, or waits for itself, is replaced, and what it had
// goes to the next.
func TestHung(t *testing.T) {
	t.Parallel()
	w := start(t, t.TempDir(), []string{"KEEPER_TEST_HANG=3s"})
	files, closed, aborted := pipe(t)
	w.tell(mountOf("a", files...))
	closeAll(files)
	other := func(old int) {
		t.Helper()
		eventually(t, "another worker serves", func() bool { n := w.status().Worker; return n != 0 && n != old })
		if got, want := w.said(), "a {\"id\":\"a\"} \"secret\" 2 true\n"; got != want {
			t.Errorf("given %q, want %q", got, want)
		}
	}
	old := w.status().Worker
	if err := syscall.Kill(old, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	other(old)
	old = w.status().Worker
	lock := filepath.Join(w.dir, "deadlock")
	if err := os.WriteFile(lock, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the worker is gone", func() bool { return w.status().Worker != old })
	os.Remove(lock)
	other(old)
	if closed() || aborted() {
		t.Error("the mount is aborted, or held by nobody")
	}
}

// TestSuspended: a machine that stands still is no reason to kill a worker.
func TestSuspended(t *testing.T) {
	t.Parallel()
	w := start(t, t.TempDir(), []string{"KEEPER_TEST_HANG=3s"})
	worker := w.status().Worker
	for _, sig := range []syscall.Signal{syscall.SIGSTOP, syscall.SIGCONT} {
		for _, pid := range []int{worker, w.cmd.Process.Pid} {
			if err := syscall.Kill(pid, sig); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(5 * time.Second)
	}
	if got := w.status().Worker; got != worker {
		t.Errorf("worker %d, want %d as before", got, worker)
	}
}

// TestPulse: what counts as silence.
func TestPulse(t *testing.T) {
	conn, theirs, err := pair()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	defer theirs.Close()
	w := &worker{conn: conn}
	var p pulse
	look := func(given bool, want int) {
		t.Helper()
		if p.look(w, given); p.silent != want {
			t.Errorf("silent for %d looks, want %d", p.silent, want)
		}
	}
	look(false, 1) // it has not come so far
	look(true, 2)  // nor said hello
	w.said.Store(&hello{Protocol: protocol})
	look(true, 0) // it is of old, and says nothing
	look(true, 0)
	w.said.Store(&hello{Protocol: protocol, Pings: true})
	look(true, 0) // asked now
	look(true, 1)
	look(true, 2)
	w.alive.Store(true)
	look(true, 0) // late, but here
	look(true, 1)
}
