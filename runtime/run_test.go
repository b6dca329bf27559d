package runtime

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

func TestExit(t *testing.T) {
	eachRuntime(t, func(t *testing.T, path string) {
		r := newRuns(t, path)
		x := r.run(t, Config{}, "echo out; echo err >&2")
		x.want(t, 0, "out\n")
		if x.stderr != "err\n" {
			t.Errorf("stderr %q", x.stderr)
		}
		r.run(t, Config{}, "exit 3").want(t, 3, "")
		r.run(t, Config{}, "sh -c 'kill -9 $$'; exit $?").want(t, 137, "")
		for _, c := range []struct {
			command string
			code    int
			err     error
		}{
			{"nothing-there", ExitNotFound, ErrNotFound},
			{"/nothing/there", ExitNotFound, ErrNotFound},
			{"/noexec/below", ExitNotFound, ErrNotFound},
			{"/noexec", ExitNotExecutable, ErrNotExecutable},
			{"/etc", ExitNotExecutable, ErrNotExecutable},
		} {
			if x := r.run(t, Config{Args: []string{c.command}}, ""); x.code != c.code || !errors.Is(x.err, c.err) {
				t.Errorf("%s: exit code %d, error %v; want %d, %v", c.command, x.code, x.err, c.code, c.err)
			}
		}
		empty(t, r.StateDir)
	})
}

// TestDetachedLower runs from a mount that is attached nowhere, as the
// program's faces hand them out.
func TestDetachedLower(t *testing.T) {
	eachRuntime(t, func(t *testing.T, path string) {
		r := newRuns(t, path)
		fd, err := unix.OpenTree(int(r.lower.Fd()), "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
		if err != nil {
			t.Fatal(err)
		}
		r.lower.Close()
		r.lower = os.NewFile(uintptr(fd), "detached")
		t.Cleanup(func() { r.lower.Close() })
		r.run(t, Config{User: "bob"}, "id -u").want(t, 0, "1000\n")
	})
}

func TestEnvironment(t *testing.T) {
	eachRuntime(t, func(t *testing.T, path string) {
		r := newRuns(t, path)
		r.run(t, Config{Env: []string{"A=b c", "PATH=/bin"}, Cwd: "/tmp", Hostname: "here"},
			"echo $A $PATH $HOME $HOSTNAME; pwd; hostname; cat /etc/hostname; grep -c here /etc/hosts; tty; echo $$").
			want(t, 0, "b c /bin /root here\n/tmp\nhere\nhere\n1\nnot a tty\n1\n")
		r.run(t, Config{Cwd: "/made/up"}, "pwd").want(t, 0, "/made/up\n")
		r.run(t, Config{}, "ls /proc/self/fd | wc -l; grep Seccomp: /proc/self/status; ulimit -n").
			want(t, 0, "4\nSeccomp:\t2\n1024\n")
	})
}

func TestUser(t *testing.T) {
	eachRuntime(t, func(t *testing.T, path string) {
		r := newRuns(t, path)
		const id = "echo $(id -u) $(id -g) $(id -G) $HOME; grep CapEff /proc/self/status"
		none := "CapEff:\t0000000000000000\n"
		r.run(t, Config{}, id).want(t, 0, "0 0 0 10 /root\nCapEff:\t00000000a80425fb\n")
		r.run(t, Config{User: "bob"}, id).want(t, 0, "1000 1001 1001 10 29 /home/bob\n"+none)
		r.run(t, Config{User: "bob:audio"}, id).want(t, 0, "1000 29 29 /home/bob\n"+none)
		r.run(t, Config{User: "5:6"}, id).want(t, 0, "5 6 6 /\n"+none)
		if x := r.run(t, Config{User: "eve"}, id); x.code != ExitFailed || x.err == nil || !strings.Contains(x.err.Error(), `"eve"`) {
			t.Errorf("unknown user: %d, %v", x.code, x.err)
		}
		empty(t, r.StateDir)
	})
}

func TestVolumes(t *testing.T) {
	eachRuntime(t, func(t *testing.T, path string) {
		r := newRuns(t, path)
		src := t.TempDir()
		write(t, filepath.Join(src, "f"), "data", 0o644)
		if err := os.Mkdir(filepath.Join(src, "sub"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("sub", filepath.Join(src, "sub"), "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Unmount(filepath.Join(src, "sub"), unix.MNT_DETACH) })
		r.Mounts = []Mount{{Source: src, Destination: "/new/dir"}}
		r.run(t, Config{}, "cat /new/dir/f; echo x >/new/dir/g").want(t, 0, "data")
		if data, err := os.ReadFile(filepath.Join(src, "g")); string(data) != "x\n" {
			t.Errorf("written to the volume: %q, %v", data, err)
		}
		r.Mounts[0].ReadOnly = true
		r.run(t, Config{}, "cat /new/dir/f; echo x >/new/dir/h || echo y >/new/dir/sub/h || echo ro").
			want(t, 0, "dataro\n")
		r.Mounts = []Mount{{Source: filepath.Join(src, "f"), Destination: "/etc/hosts"}}
		r.run(t, Config{}, "cat /etc/hosts").
			want(t, 0, "data")
		r.Mounts = []Mount{{Source: src + "/missing", Destination: "/x"}}
		if x := r.run(t, Config{}, "true"); !errors.Is(x.err, os.ErrNotExist) {
			t.Errorf("missing source: %d, %v", x.code, x.err)
		}
	})
}

func TestNetworkNone(t *testing.T) {
	eachRuntime(t, func(t *testing.T, path string) {
		r := newRuns(t, path)
		r.run(t, Config{Network: None, Hostname: "alone"},
			"ls /sys/class/net; cat /etc/resolv.conf; grep alone /etc/hosts; ip link | grep -c LOOPBACK,UP").
			want(t, 0, "lo\n127.0.1.1\talone\n1\n")
		host, err := os.ReadFile("/etc/resolv.conf")
		if err != nil {
			t.Skip(err)
		}
		r.run(t, Config{}, "cat /etc/resolv.conf").want(t, 0, string(host))
	})
}

// TestWrites checks where a container's writes go, and that they are kept or
// removed as asked.
func TestWrites(t *testing.T) {
	eachRuntime(t, func(t *testing.T, path string) {
		r := newRuns(t, path)
		if err := os.Chmod(r.lower.Name(), 0o711); err != nil {
			t.Fatal(err)
		}
		const script = "echo new >/tmp/f && echo changed >/noexec && chown 7 /etc/group && stat -c %a /"
		r.run(t, Config{}, script).want(t, 0, "711\n")
		empty(t, r.StateDir)
		r.Remove = false
		r.run(t, Config{}, script).want(t, 0, "711\n")
		for name, want := range map[string]string{"tmp/f": "new\n", "noexec": "changed\n", "etc/group": "root:x:0:\n"} {
			upper, _ := filepath.Glob(filepath.Join(r.StateDir, "*/upper", name))
			if len(upper) != 1 {
				t.Fatalf("%s: found %v", name, upper)
			}
			if data, err := os.ReadFile(upper[0]); err != nil || !strings.HasPrefix(string(data), want) {
				t.Errorf("kept %s: %q, %v", name, data, err)
			}
		}
		if data, err := os.ReadFile(filepath.Join(r.lower.Name(), "noexec")); string(data) != "#!/bin/sh\n" {
			t.Errorf("the lower file is now %q, %v", data, err)
		}
		if _, err := os.Stat(filepath.Join(r.lower.Name(), "tmp/f")); err == nil {
			t.Error("the new file is in lower")
		}
		if cleaned, err := Clean(r.StateDir); len(cleaned) > 0 || err != nil {
			t.Errorf("Clean of a kept container: %v, %v", cleaned, err)
		}
		entries, err := os.ReadDir(r.StateDir)
		if err != nil || len(entries) != 1 {
			t.Fatal(entries, err)
		}
		if err := Remove(r.StateDir, entries[0].Name()); err != nil {
			t.Error(err)
		}
		empty(t, r.StateDir)
		r.Remove = true
		r.run(t, Config{ReadonlyRootfs: true}, "touch /x 2>&1").want(t, 1, "touch: /x: Read-only file system\n")
		r.run(t, Config{}, "grep -c 'overlay / .*metacopy=on' /proc/mounts").want(t, 0, "1\n")
	})
}

// TestDevices checks that the host's devices stay shut, whether the image
// brings the node or the container makes it.
func TestDevices(t *testing.T) {
	eachRuntime(t, func(t *testing.T, path string) {
		r := newRuns(t, path)
		// FUSE's device: anyone may open it. Where it does not exist the
		// error is another one.
		if err := unix.Mknod(filepath.Join(r.lower.Name(), "fuse"), unix.S_IFCHR|0o666, int(unix.Mkdev(10, 229))); err != nil {
			t.Skip(err)
		}
		const script = `mknod /made c 10 229 && mknod /null c 1 3 && echo >/null && echo x >/dev/null
			for f in /fuse /made; do dd if=$f of=/dev/null count=0 2>&1; done | grep -c 'not permitted'`
		for _, cgroup := range []bool{false, true} {
			if cgroup && cgroupVersion() == 0 {
				continue
			}
			r.run(t, Config{Cgroup: cgroup}, script).want(t, 0, "2\n")
		}
	})
}

func TestLimits(t *testing.T) {
	eachRuntime(t, func(t *testing.T, path string) {
		r := newRuns(t, path)
		var script, want string
		switch cgroupVersion() {
		case 0:
			if x := r.run(t, Config{Memory: 64 << 20}, "true"); x.code != ExitFailed || x.err == nil {
				t.Errorf("a limit without cgroups: %d, %v", x.code, x.err)
			}
			return
		case 1:
			script, want = "cd /sys/fs/cgroup; cat memory/memory.limit_in_bytes cpu*/cpu.cfs_quota_us | head -2", "67108864\n150000\n"
		case 2:
			script, want = "cd /sys/fs/cgroup; cat memory.max cpu.max", "67108864\n150000 100000\n"
		}
		x := r.run(t, Config{Memory: 64 << 20, CPUs: 1.5}, script)
		x.want(t, 0, want)
		empty(t, r.StateDir)
		noCgroups(t, x.id)
	})
}

func TestConcurrent(t *testing.T) {
	eachRuntime(t, func(t *testing.T, path string) {
		r := newRuns(t, path)
		var wg sync.WaitGroup
		for i := range 6 {
			wg.Go(func() {
				r.run(t, Config{}, fmt.Sprintf("echo %d >/f; cat /f; exit %d", i, i)).want(t, i, fmt.Sprintln(i))
			})
		}
		wg.Wait()
		empty(t, r.StateDir)
	})
}

func TestStartOnly(t *testing.T) {
	eachRuntime(t, func(t *testing.T, path string) {
		dir := newState(t)
		c, err := Start(Options{Runtime: path, StateDir: dir})
		if err != nil {
			t.Fatal(err)
		}
		if cleaned, err := Clean(dir); len(cleaned) > 0 || err != nil {
			t.Errorf("Clean removed a container that is starting: %v, %v", cleaned, err)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		empty(t, dir)
	})
}

// TestBadRuntime checks that what goes wrong in init is told.
func TestBadRuntime(t *testing.T) {
	needRoot(t)
	r := newRuns(t, "/nonexistent/crun")
	if x := r.run(t, Config{}, "true"); x.code != ExitFailed || x.err == nil || !strings.Contains(x.err.Error(), "exec /nonexistent/crun") {
		t.Errorf("%d, %v", x.code, x.err)
	}
	empty(t, r.StateDir)
}
