package runtime

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestRun(t *testing.T) {
	eachRuntime(t, func(t *testing.T, path string) {
		r := newRuns(t, path)
		r.run(t, Config{}, "echo out; echo err >&2").want(t, 0, "out\n")
		r.run(t, Config{}, "exit 3").want(t, 3, "")
		r.run(t, Config{}, "kill -9 $$; sleep 9").want(t, 0, "")
		for _, a := range []string{"nothing-there", "/nothing/there", "/noexec/x", "/noexec", "/etc", "/bin"} {
			x := r.run(t, Config{Args: []string{a}}, "")
			t.Log(a, x.code, x.err, x.stderr)
		}
		x := r.run(t, Config{}, "cat /proc/mounts; ls -l /proc/self/fd; id; env; pwd; ls -la /; cat /etc/resolv.conf; ls -l /dev; cat /proc/self/status; cat /proc/self/cgroup")
		t.Log(x.stdout, x.stderr, x.err)
		empty(t, r.StateDir)
	})
	_ = errors.New
	_ = os.Open
	_ = filepath.Join
	_ = strings.Join
}
