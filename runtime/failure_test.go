package runtime

import (
	"errors"
	"path/filepath"
	"testing"
)

func TestRuntimeError(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	if msg := runtimeError(log); msg != "" {
		t.Errorf("without a log: %q", msg)
	}
	write(t, log, `{"level":"warning","msg":"harmless"}
rubbish
{"level":"error","msg":"first"}
{"level":"error","msg":"last","time":"now"}
{"level":"debug","msg":"bye"}
`, 0o600)
	if msg := runtimeError(log); msg != "last" {
		t.Errorf("%q", msg)
	}
}

func TestClassify(t *testing.T) {
	for msg, want := range map[string]int{
		"executable file `x` not found in $PATH: No such file or directory":                   ExitNotFound,
		"open executable: Not a directory":                                                    ExitNotFound,
		`unable to start container process: exec: "/x": stat /x: no such file or directory`:   ExitNotFound,
		`unable to start container process: exec: "/etc/passwd": permission denied`:           ExitNotExecutable,
		"exec container process `/bin/x`: Exec format error":                                  ExitNotExecutable,
		"mount `/src` to `/dst`: No such file or directory":                                   ExitFailed,
		"creating cgroup directory `/sys/fs/cgroup/memory/shale-1`: Read-only file system":    ExitFailed,
		"exec container process (missing dynamic library?) `/x`: No such file or directory":   ExitNotFound,
		"error setting rlimits for ready process: error setting rlimit type 7: not permitted": ExitFailed,
	} {
		code, err := classify(msg)
		if code != want || errors.Is(err, ErrNotFound) != (want == ExitNotFound) ||
			errors.Is(err, ErrNotExecutable) != (want == ExitNotExecutable) {
			t.Errorf("%q: %d, %v; want %d", msg, code, err, want)
		}
	}
}
