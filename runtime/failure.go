package runtime

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
)

// runtimeError returns the last error an OCI runtime has logged, or "".
func runtimeError(log string) string {
	f, err := os.Open(log)
	if err != nil {
		return ""
	}
	defer f.Close()
	last := ""
	sc := bufio.NewScanner(io.LimitReader(f, 1<<20))
	for sc.Scan() {
		var line struct{ Level, Msg string }
		if json.Unmarshal(sc.Bytes(), &line) == nil && (line.Level == "error" || line.Level == "fatal") {
			last = line.Msg
		}
	}
	return last
}

// classify turns a runtime's message into docker run's exit codes. The
// messages are all there is to tell by, and docker does the same:
//
//	runc: exec: "x": executable file not found in $PATH
//	runc: exec: "/x": stat /x: no such file or directory
//	runc: exec: "/etc/passwd": permission denied
//	crun: executable file `x` not found in $PATH: No such file or directory
//	crun: open executable: Permission denied
func classify(msg string) (int, error) {
	text := strings.ToLower(msg)
	has := func(parts ...string) bool {
		for _, p := range parts {
			if strings.Contains(text, p) {
				return true
			}
		}
		return false
	}
	switch {
	case !has("exec"): // a mount that failed, not the command
	case has("not found", "no such file", "not a directory"):
		return ExitNotFound, fmt.Errorf("%w: %s", ErrNotFound, msg)
	case has("permission denied", "is a directory", "exec format error", "operation not permitted"):
		return ExitNotExecutable, fmt.Errorf("%w: %s", ErrNotExecutable, msg)
	}
	return ExitFailed, errors.New(msg)
}
