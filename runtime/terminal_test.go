package runtime

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// openPTY returns the two ends of a new pseudo terminal.
func openPTY(t *testing.T) (master, slave *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skip("needs pseudo terminals: ", err)
	}
	t.Cleanup(func() { master.Close() })
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skip("needs /dev/pts: ", err)
	}
	t.Cleanup(func() { slave.Close() })
	return master, slave
}

// TestTerminal runs a container on a terminal, types at it, and interrupts it
// from the keyboard.
func TestTerminal(t *testing.T) {
	eachRuntime(t, func(t *testing.T, path string) {
		master, slave := openPTY(t)
		before, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
		if err != nil {
			t.Fatal(err)
		}
		state := newState(t)
		arg, err := json.Marshal(caller{Runtime: path, StateDir: state, Root: newRoot(t), Remove: true,
			Config: Config{Terminal: true, Args: []string{"/bin/sh", "-c",
				"trap 'echo interrupted; exit 5' INT; tty; echo $TERM; read line; echo got $line; while :; do sleep 0.05; done"}}})
		if err != nil {
			t.Fatal(err)
		}
		cmd := &exec.Cmd{Path: "/proc/self/exe", Args: []string{callerName, string(arg)},
			Stdin: slave, Stdout: slave, Stderr: slave,
			SysProcAttr: &syscall.SysProcAttr{Setsid: true, Setctty: true}}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() {
			if cmd.ProcessState == nil {
				cmd.Process.Kill()
				cmd.Wait()
			}
		}()
		r := bufio.NewReader(master)
		await(t, r, "/dev/pts/0")
		await(t, r, "xterm")
		fmt.Fprint(master, "hello\r")
		await(t, r, "got hello")
		fmt.Fprint(master, "\x03")
		for line := ""; !strings.Contains(line, "interrupted"); { // after an echoed ^C
			if line, err = r.ReadString('\n'); err != nil {
				t.Fatal(err)
			}
		}
		if cmd.Wait(); cmd.ProcessState.ExitCode() != 5 {
			t.Errorf("%v, want exit code 5", cmd.ProcessState)
		}
		after, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
		if err != nil || *after != *before {
			t.Errorf("the terminal is left changed: %+v, was %+v (%v)", after, before, err)
		}
		empty(t, state)

		x := newRuns(t, path).run(t, Config{Terminal: true}, "true")
		if x.code != ExitFailed || x.err == nil || !strings.Contains(x.err.Error(), "terminal") {
			t.Errorf("without a terminal: %d, %v", x.code, x.err)
		}
	})
}
