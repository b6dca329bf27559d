package keeper

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

func mountOf(id string, files ...*os.File) Mount {
	return Mount{ID: id, Show: json.RawMessage(`{"id":"` + id + `"}`), Rest: json.RawMessage(`"secret"`), Settled: true, Files: files}
}

// TestKept: what a worker gave is given to the next, as it was last.
func TestKept(t *testing.T) {
	w := start(t, t.TempDir(), nil)
	files, closed, _ := pipe(t)
	m := mountOf("a", files...)
	m.Settled = false
	w.tell(m)
	closeAll(files)
	w.kill()
	if got, want := w.said(), "a {\"id\":\"a\"} \"secret\" 2 false\n"; got != want {
		t.Errorf("given %q, want %q", got, want)
	}
	w.tell(mountOf("a"))
	w.tell(mountOf("b")) // without files it is of one that has ended
	w.kill()
	if got, want := w.said(), "a {\"id\":\"a\"} \"secret\" 2 true\n"; got != want {
		t.Errorf("given %q, want %q", got, want)
	}
	if closed() {
		t.Error("the files are closed")
	}
	st := w.status()
	if js, _ := json.Marshal(st); len(st.Mounts) != 1 || strings.Contains(string(js), "secret") {
		t.Errorf("status %s", js)
	}
	w.tell(Mount{ID: "a"})
	eventually(t, "the files are closed", closed)
	w.kill()
	if got := w.said(); got != "" {
		t.Errorf("given %q", got)
	}
}

// TestManyKept: more than fits into one packet, or a socket's buffer.
func TestManyKept(t *testing.T) {
	w := start(t, t.TempDir(), nil)
	files, _, _ := pipe(t)
	for i := range 250 {
		m := mountOf(fmt.Sprint("mount", i), files...)
		m.Rest = json.RawMessage(`"` + strings.Repeat("x", 4000) + `"`)
		w.tell(m)
	}
	w.kill()
	if n := strings.Count(w.said(), "\n"); n != 250 {
		t.Errorf("%d mounts are given, want 250", n)
	}
	if n := len(w.status().Mounts); n != 250 {
		t.Errorf("%d mounts are told of, want 250", n)
	}
}

// TestEnd: a worker's end is the service's, and so is a signal; nothing is held then.
func TestEnd(t *testing.T) {
	for name, end := range map[string]func(w *world){
		"worker": func(w *world) { w.tell(Mount{ID: "end"}) },
		"signal": func(w *world) { w.cmd.Process.Signal(syscall.SIGTERM) },
	} {
		t.Run(name, func(t *testing.T) {
			w := start(t, t.TempDir(), nil)
			files, closed, aborted := pipe(t)
			w.tell(mountOf("a", files...))
			closeAll(files)
			eventually(t, "it is kept", func() bool { return len(w.status().Mounts) == 1 })
			end(w)
			if err := w.cmd.Wait(); err != nil {
				t.Error(err)
			}
			if !aborted() || !closed() {
				t.Error("the mount is not aborted, or still held")
			}
		})
	}
}

// TestCannotStart: readers do not wait for ever, and somebody answers meanwhile.
func TestCannotStart(t *testing.T) {
	w := start(t, t.TempDir(), nil)
	files, _, aborted := pipe(t)
	w.tell(mountOf("a", files...))
	broken := filepath.Join(w.dir, "broken")
	if err := os.WriteFile(broken, []byte(`{"text":"no"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	old := w.status().Worker
	syscall.Kill(old, syscall.SIGKILL)
	eventually(t, "no worker is up", func() bool { return w.status().Worker == 0 })
	if n := len(w.status().Mounts); n != 1 {
		t.Errorf("%d mounts, want 1", n)
	}
	// It is mended in time.
	os.Remove(broken)
	eventually(t, "a worker serves", func() bool { return w.status().Worker != 0 })
	if aborted() {
		t.Fatal("aborted")
	}
	if err := os.WriteFile(broken, []byte(`{"text":"no"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	syscall.Kill(w.status().Worker, syscall.SIGKILL)
	if err := w.cmd.Wait(); err == nil {
		t.Error("the keeper has ended well")
	}
	if !aborted() {
		t.Error("the mount is not aborted")
	}
}

// TestNeverStarts: with nothing to lose there is no second try.
func TestNeverStarts(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "broken"), []byte(`{"text":"no"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	w := start(t, dir, nil)
	if err := w.cmd.Wait(); err == nil {
		t.Error("the keeper has ended well")
	}
	if p, err := os.ReadFile(filepath.Join(dir, "ready")); string(p) != `{"text":"no"}` || err != nil {
		t.Errorf("told %q, %v", p, err)
	}
}

func TestPause(t *testing.T) {
	for _, x := range []struct {
		died, failed int
		want         time.Duration
	}{
		{1, 0, 0}, {10, 0, 0}, {20, 0, 200 * time.Millisecond}, {1000, 0, time.Second},
		{1, 1, 40 * time.Millisecond}, {5, 1000, time.Second},
	} {
		if got := pause(x.died, x.failed); got != x.want {
			t.Errorf("after %d deaths, %d before serving: %v, want %v", x.died, x.failed, got, x.want)
		}
	}
}

// TestUpgradeWithout: there is a keeper, but no worker that could be exchanged.
func TestUpgradeFails(t *testing.T) {
	w := start(t, t.TempDir(), nil)
	old := w.status().Worker
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	if _, err := Upgrade(context.Background(), w.dir, null); err == nil {
		t.Error("upgraded to nothing")
	}
	if got := w.status().Worker; got != old {
		t.Errorf("worker %d, want %d as before", got, old)
	}
}
