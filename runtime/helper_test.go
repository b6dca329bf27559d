package runtime

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// callerName is the argv[0] that makes the test binary a caller of Run of its
// own, to be signalled and killed.
const callerName = "test-caller"

// caller is what such a process is told on its command line, as JSON.
type caller struct {
	Runtime, StateDir, Root string
	Remove                  bool
	Mounts                  []Mount
	Config                  Config
}

func TestMain(m *testing.M) {
	Init()
	if os.Args[0] == callerName {
		var c caller
		if err := json.Unmarshal([]byte(os.Args[1]), &c); err != nil {
			panic(err)
		}
		// A signal after the container's end shall not be this one's.
		signal.Notify(make(chan os.Signal, 1), unix.SIGTERM)
		root, err := os.Open(c.Root)
		if err != nil {
			panic(err)
		}
		code, err := Run(context.Background(), Options{Runtime: c.Runtime, StateDir: c.StateDir, Remove: c.Remove, Mounts: c.Mounts,
			Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr}, root, c.Config)
		if err != nil {
			os.Stderr.WriteString(err.Error() + "\n")
		}
		os.Exit(code)
	}
	os.Exit(m.Run())
}

// start starts a process that runs a container, and returns what the container
// writes.
func (c caller) start(t *testing.T) (*exec.Cmd, *bufio.Reader) {
	t.Helper()
	arg, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := &exec.Cmd{Path: "/proc/self/exe", Args: []string{callerName, string(arg)}, Stdout: w, Stderr: os.Stderr}
	err = cmd.Start()
	w.Close() // so that the reader sees the end
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if cmd.ProcessState == nil {
			cmd.Process.Kill()
			cmd.Wait()
		}
		r.Close()
	})
	return cmd, bufio.NewReader(r)
}

// needRoot skips a test where containers cannot be run.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	if _, err := os.Stat("/bin/busybox"); err != nil {
		t.Skip("needs /bin/busybox, statically linked: Debian's busybox-static")
	}
}

// eachRuntime runs a test once with every OCI runtime that is installed.
func eachRuntime(t *testing.T, fn func(t *testing.T, path string)) {
	t.Helper()
	needRoot(t)
	found := false
	for _, name := range []string{"crun", "runc"} {
		if path, err := Find(name); err == nil {
			found = true
			t.Run(name, func(t *testing.T) { fn(t, path) })
		}
	}
	if !found {
		t.Skip("needs crun or runc")
	}
}

// newRoot makes a small image root.
func newRoot(t testing.TB) string {
	t.Helper()
	// Named so that an overlay option string would be cut at it.
	root := filepath.Join(t.TempDir(), "a,b:c")
	for _, dir := range []string{"bin", "etc", "tmp", "home/bob", "run"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(root, "bin/busybox"), string(busybox), 0o755)
	for _, name := range strings.Fields("sh cat echo id pwd env ls true sleep hostname touch chown stat kill mknod ip wc grep readlink head tty dd chroot") {
		if err := os.Symlink("busybox", filepath.Join(root, "bin", name)); err != nil {
			t.Fatal(err)
		}
	}
	write(t, filepath.Join(root, "etc/passwd"), "root:x:0:0:root:/root:/bin/sh\nbob:x:1000:1001:Bob:/home/bob:/bin/sh\n", 0o644)
	write(t, filepath.Join(root, "etc/group"), "root:x:0:\nbob:x:1001:\nwheel:x:10:bob,root\naudio:x:29:bob\n", 0o644)
	write(t, filepath.Join(root, "etc/resolv.conf"), "image's own\n", 0o644)
	write(t, filepath.Join(root, "noexec"), "#!/bin/sh\n", 0o644)
	return root
}

func write(t testing.TB, name, data string, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(name, []byte(data), mode); err != nil {
		t.Fatal(err)
	}
}

// result is what a container left.
type result struct {
	code           int
	err            error
	stdout, stderr string
	id             string
}

// runs runs containers of one root.
type runs struct {
	Options
	lower *os.File
}

func newRuns(t *testing.T, runtime string) *runs {
	t.Helper()
	root, err := os.Open(newRoot(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.Close() })
	return &runs{Options{Runtime: runtime, StateDir: newState(t), Remove: true}, root}
}

// newState returns a state directory. Its name is as awkward as newRoot's.
func newState(t testing.TB) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "st,a:te")
	var fs unix.Statfs_t
	if err := unix.Statfs(filepath.Dir(dir), &fs); err != nil {
		t.Fatal(err)
	}
	if fs.Type == unix.OVERLAYFS_SUPER_MAGIC {
		t.Skip("needs a TMPDIR that is not on overlayfs")
	}
	return dir
}

// run runs a shell command, or cfg.Args if there is none.
func (r *runs) run(t *testing.T, cfg Config, script string) result {
	t.Helper()
	if script != "" {
		cfg.Args = []string{"/bin/sh", "-c", script}
	}
	var res result
	o := r.Options
	dir := t.TempDir()
	for name, f := range map[string]**os.File{"out": &o.Stdout, "err": &o.Stderr} {
		var err error
		if *f, err = os.Create(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
		defer (*f).Close()
	}
	c, err := Start(o)
	if err != nil {
		t.Fatal(err)
	}
	res.id = c.ID
	res.code, res.err = c.Run(t.Context(), r.lower, cfg)
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	for name, s := range map[string]*string{"out": &res.stdout, "err": &res.stderr} {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		*s = string(data)
	}
	return res
}

// want checks a container's end.
func (r result) want(t *testing.T, code int, stdout string) {
	t.Helper()
	if r.code != code || r.stdout != stdout {
		t.Errorf("exit code %d, output %q; want %d, %q (error %v, stderr %q)", r.code, r.stdout, code, stdout, r.err, r.stderr)
	}
}

// empty checks that a state directory has nothing in it.
func empty(t *testing.T, dir string) {
	t.Helper()
	left, err := filepath.Glob(dir + "/*/*")
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v (%v)", left, err)
	}
}

// mountsBelow returns this process's mounts at or below dir.
func mountsBelow(t *testing.T, dir string) string {
	t.Helper()
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for line := range bytes.Lines(data) {
		if bytes.Contains(line, []byte(dir)) {
			found = append(found, string(line))
		}
	}
	return strings.Join(found, "")
}
