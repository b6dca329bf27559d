package main

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
)

// binary is the program under test: $SHALE, or built from this directory.
var binary string

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	dir, err := os.MkdirTemp("", "shale-script-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	binary = filepath.Join(dir, "shale")
	if given := os.Getenv("SHALE"); given != "" {
		if given, err = filepath.Abs(given); err == nil {
			err = os.Symlink(given, binary)
		}
	} else {
		build := exec.Command("go", "build", "-o", binary, ".")
		build.Env = append(os.Environ(), "CGO_ENABLED=0") // a script runs it in a container of nothing else
		if out, berr := build.CombinedOutput(); berr != nil {
			err = fmt.Errorf("%w\n%s", berr, out)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// TestScripts runs testdata/*.txtar against the program. Besides the commands
// of testscript they have:
//
//	code N CMD...            run CMD, which must exit with N
//	mktar OUT SPEC           an archive; SPEC see mktar
//	mkoci DIR TAG TAR...     an image in a layout, a layer for each archive
//	mkimage REF TAR...       the same anywhere
//	                         both: -platform P, -config MEDIATYPE, -compress zstd before
//	registry VAR [USER:PW]   a registry in this process, at $VAR; noranges: it
//	                         gives all of an object to who asks for a part
//	down HOST                ends such a registry: nobody answers there any more
//	stuck VAR                a registry, at $VAR, that never answers
//	login HOST USER:PW       what docker login would write
//	flip FILE OFFSET         change a byte; negative: from the end
//	blobfile VAR REF N       the file of layer N of an image in a layout
//	same FILE FILE           compare bytes
//
// and the condition [root]. Each has a root directory of its own, $SHALE_ROOT;
// whatever runs or is mounted at the end is taken down.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:   "testdata",
		Setup: setup,
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"code": cmdCode, "mktar": cmdMktar, "mkoci": cmdMkoci, "mkimage": cmdMkimage, "registry": cmdRegistry, "stuck": cmdStuck,
			"login": cmdLogin, "down": cmdDown, "flip": cmdFlip, "blobfile": cmdBlobfile, "same": cmdSame,
		},
		Condition: func(cond string) (bool, error) {
			if cond == "root" {
				return os.Geteuid() == 0, nil
			}
			return false, fmt.Errorf("unknown condition %q", cond)
		},
		RequireUniqueNames: true,
	})
}

func setup(env *testscript.Env) error {
	root := filepath.Join(env.WorkDir, "root")
	env.Setenv("SHALE_ROOT", root)
	env.Setenv("SHALE_BINARY", binary)
	env.Setenv("HOME", env.WorkDir)
	env.Setenv("DOCKER_CONFIG", filepath.Join(env.WorkDir, "docker"))
	env.Setenv("XDG_RUNTIME_DIR", filepath.Join(env.WorkDir, "run"))
	env.Setenv("PATH", filepath.Dir(binary)+":"+os.Getenv("PATH")+":/usr/sbin:/sbin")
	env.Defer(func() { takeDown(env.T(), env.WorkDir, root) })
	return nil
}

// takeDown leaves no mount below dir and no service on root.
func takeDown(t testscript.T, dir, root string) {
	unmountBelow(dir)
	if _, err := os.Stat(root); err != nil {
		return // no verb needed a service
	}
	// The service sees a moment later that its mounts are gone.
	var out []byte
	var err error
	for range 50 {
		out, err = exec.Command(binary, "--root", root, "daemon", "stop").CombinedOutput()
		if err == nil {
			unmountBelow(dir)
			return
		}
		time.Sleep(100 * time.Millisecond)
		unmountBelow(dir)
	}
	t.Log(fmt.Sprintf("daemon stop: %v\n%s", err, out))
	t.FailNow()
}

// unmountBelow takes away all mounts below dir, lazily, the innermost first.
func unmountBelow(dir string) {
	p, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return
	}
	if real, err := filepath.EvalSymlinks(dir); err == nil {
		dir = real
	}
	var at []string
	for line := range strings.Lines(string(p)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			at = append(at, f[4])
		}
	}
	slices.Reverse(at)
	for _, m := range at {
		_ = unix.Unmount(m, unix.MNT_DETACH)
	}
}

func cmdCode(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: code N CMD...")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	var exit *exec.ExitError
	if err := ts.Exec(args[1], args[2:]...); errors.As(err, &exit) {
		got = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

func cmdFlip(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: flip FILE OFFSET")
	}
	off, err := strconv.ParseInt(args[1], 10, 64)
	ts.Check(err)
	ts.Check(flip(ts.MkAbs(args[0]), off))
}

// flip changes one byte of a file; a negative offset counts from the end.
func flip(name string, off int64) error {
	p, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	if off < 0 {
		off += int64(len(p))
	}
	p[off] ^= 0x20
	return os.WriteFile(name, p, 0o644)
}

func cmdSame(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: [!] same FILE FILE")
	}
	a, b := []byte(ts.ReadFile(args[0])), []byte(ts.ReadFile(args[1]))
	if bytes.Equal(a, b) == neg {
		ts.Fatalf("%s has %d bytes, %s %d; the same: %v", args[0], len(a), args[1], len(b), !neg)
	}
}

func cmdStuck(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: stuck VAR")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	ts.Defer(func() { l.Close() }) // the kernel accepts, nobody reads
	ts.Setenv(args[0], l.Addr().String())
}
