package runtime

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// await reads lines until one is want.
func await(t *testing.T, r *bufio.Reader, want string) {
	t.Helper()
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			t.Fatalf("waiting for %q: %v", want, err)
		}
		if strings.TrimSpace(line) == want {
			return
		}
	}
}

// eventually waits until ok; twenty seconds are for ever.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for range 2000 {
		if ok() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal(what)
}

// noCgroups checks that no cgroup of the container is left.
func noCgroups(t *testing.T, id string) {
	t.Helper()
	for _, parent := range []string{cgroupRoot, cgroupRoot + "/*"} {
		if left, _ := filepath.Glob(parent + "/shale-" + id + "*"); len(left) > 0 {
			t.Errorf("cgroups left: %v", left)
		}
	}
}

func TestSignals(t *testing.T) {
	eachRuntime(t, func(t *testing.T, path string) {
		for _, sig := range []syscall.Signal{unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGUSR1, unix.SIGQUIT} {
			state := newState(t)
			cmd, r := caller{Runtime: path, StateDir: state, Root: newRoot(t), Remove: true, Config: Config{
				Args: []string{"/bin/sh", "-c", fmt.Sprintf("trap 'echo got; exit 42' %d; echo ready; while :; do sleep 0.05; done", sig)},
			}}.start(t)
			await(t, r, "ready")
			if err := cmd.Process.Signal(sig); err != nil {
				t.Fatal(err)
			}
			await(t, r, "got")
			if cmd.Wait(); cmd.ProcessState.ExitCode() != 42 {
				t.Errorf("%v: %v", sig, cmd.ProcessState)
			}
			empty(t, state)
		}
	})
}

// TestSignalAtOnce sends a signal when the container may not even have been
// made: it must not get lost. The third one kills a container that ignores
// them.
func TestSignalAtOnce(t *testing.T) {
	eachRuntime(t, func(t *testing.T, path string) {
		state := newState(t)
		cmd, _ := caller{Runtime: path, StateDir: state, Root: newRoot(t), Remove: true,
			Config: Config{Args: []string{"/bin/sleep", "1000"}}}.start(t)
		// By now the handler is set up.
		var found []string
		eventually(t, "no runtime was started", func() bool {
			found, _ = filepath.Glob(state + "/*/state")
			return len(found) > 0
		})
		ended := make(chan struct{})
		go func() {
			cmd.Wait()
			close(ended)
		}()
		// Equal signals merge while they are pending, so three may not do.
		for alive := true; alive; {
			_ = cmd.Process.Signal(unix.SIGTERM)
			select {
			case <-ended:
				alive = false
			case <-time.After(10 * time.Millisecond):
			}
		}
		// runc's own program in the container, which then becomes sleep,
		// ends with 2 if a signal is early enough to reach it.
		if code := cmd.ProcessState.ExitCode(); code != 137 && (isCrun(path) || code != 2) {
			t.Errorf("%v, want exit code 137", cmd.ProcessState)
		}
		empty(t, state)
		noCgroups(t, filepath.Base(filepath.Dir(found[0])))
	})
}

func TestCancel(t *testing.T) {
	eachRuntime(t, func(t *testing.T, path string) {
		r := newRuns(t, path)
		pr, pw, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer pr.Close()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go func() {
			bufio.NewReader(pr).ReadString('\n')
			cancel()
		}()
		r.Stdout = pw
		code, err := Run(ctx, r.Options, r.lower, Config{StopSignal: "USR2",
			Args: []string{"/bin/sh", "-c", "trap 'exit 9' USR2; echo ready; while :; do sleep 0.05; done"}})
		pw.Close()
		if code != 9 || err != nil {
			t.Errorf("%d, %v", code, err)
		}
		empty(t, r.StateDir)
	})
}

// TestKilled kills the caller with SIGKILL: no process, no mount may be left,
// and Clean must remove the rest.
func TestKilled(t *testing.T) {
	eachRuntime(t, func(t *testing.T, path string) {
		for _, keep := range []bool{false, true} {
			state, root := newState(t), newRoot(t)
			// The volume is a mark by which the container's processes can
			// be told.
			mark := filepath.Join(t.TempDir(), "mark")
			write(t, mark, "", 0o644)
			cmd, r := caller{Runtime: path, StateDir: state, Root: root, Remove: !keep, Mounts: []Mount{{Source: mark, Destination: "/mark"}}, Config: Config{
				Cgroup: cgroupVersion() != 0,
				Args:   []string{"/bin/sh", "-c", "echo >/kept; sleep 1000 & trap '' TERM; echo ready; wait"},
			}}.start(t)
			await(t, r, "ready")
			if n := processesWith(mark); n < 2 {
				t.Fatalf("%d processes of the container found, want sh and sleep", n)
			}
			if cleaned, err := Clean(state); len(cleaned) > 0 || err != nil {
				t.Errorf("Clean of a running container: %v, %v", cleaned, err)
			}
			if m := mountsBelow(t, state); m != "" {
				t.Errorf("mounts are seen outside: %s", m)
			}
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			cmd.Wait()
			eventually(t, "the container outlives its caller", func() bool { return processesWith(mark) == 0 })
			if m := mountsBelow(t, state); m != "" {
				t.Errorf("mounts left: %s", m)
			}
			var cleaned []string
			eventually(t, "nothing cleaned", func() bool {
				var err error
				if cleaned, err = Clean(state); err != nil {
					t.Fatal(err)
				}
				return len(cleaned) > 0
			})
			kept, _ := filepath.Glob(state + "/*/upper/kept")
			if keep != (len(kept) == 1) || len(cleaned) != 1 {
				t.Errorf("keep %v: cleaned %v, kept %v", keep, cleaned, kept)
			}
			if !keep {
				empty(t, state)
			}
			noCgroups(t, cleaned[0])
		}
	})
}

// processesWith counts the processes that have file bound to /mark.
func processesWith(file string) int {
	n := 0
	tables, _ := filepath.Glob("/proc/[0-9]*/mountinfo")
	for _, name := range tables {
		data, err := os.ReadFile(name)
		if err == nil && strings.Contains(string(data), file+" /mark ") {
			n++
		}
	}
	return n
}
