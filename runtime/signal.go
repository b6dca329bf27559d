package runtime

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// grace is how long a container may take to end after its stop signal.
const grace = 10 * time.Second

// stopSignal reads an image's StopSignal; "" is SIGTERM.
func stopSignal(s string) (syscall.Signal, error) {
	if s == "" {
		return syscall.SIGTERM, nil
	}
	if n, err := strconv.Atoi(s); err == nil && n > 0 && n <= 64 {
		return syscall.Signal(n), nil
	}
	name := strings.ToUpper(s)
	if !strings.HasPrefix(name, "SIG") {
		name = "SIG" + name
	}
	if sig := unix.SignalNum(name); sig != 0 {
		return sig, nil
	}
	// SIGRTMIN+3 is systemd's.
	for prefix, base := range map[string]int{"SIGRTMIN": 34, "SIGRTMAX": 64} {
		if off, ok := strings.CutPrefix(name, prefix); ok {
			n, err := strconv.Atoi(either(off, "+0"))
			if n += base; err == nil && n >= 34 && n <= 64 {
				return syscall.Signal(n), nil
			}
		}
	}
	return 0, fmt.Errorf("stop signal %q is unknown", s)
}

// signals are this process's while a container runs.
type signals chan os.Signal

func catchSignals() signals {
	s := make(signals, 16)
	signal.Notify(s, unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2, unix.SIGWINCH)
	return s
}

func (s signals) release() { signal.Stop(s) }

// forward passes signals on until the container has ended.
func (s signals) forward(ctx context.Context, c *Container, stop syscall.Signal) {
	var kill <-chan time.Time
	cancelled := ctx.Done()
	for urgent := 0; ; {
		select {
		case <-c.done:
			return
		case sig := <-s:
			if sig == unix.SIGINT || sig == unix.SIGTERM {
				urgent++
			}
			if urgent >= 3 {
				_ = c.cmd.Process.Kill()
				urgent = 0
				continue
			}
			c.signal(sig)
		case <-cancelled:
			cancelled = nil
			kill = time.After(grace)
			c.signal(stop)
		case <-kill:
			_ = c.cmd.Process.Kill()
		}
	}
}

// signal sends a signal to the OCI runtime, which passes it on. If that was
// just started the signal waits: as pid 1 of its namespace a runtime loses
// those that it is not yet prepared for.
func (c *Container) signal(sig os.Signal) {
	for range 2000 {
		if c.prepared() {
			_ = c.cmd.Process.Signal(sig)
			return
		}
		select {
		case <-c.done:
			return
		case <-time.After(time.Millisecond):
		}
	}
	_ = c.cmd.Process.Kill() // it hangs
}

// prepared tells from its state whether the OCI runtime passes signals on:
// crun writes "status" once it holds them, runc removes "exec.fifo" once the
// container is told to become its command.
func (c *Container) prepared() bool {
	has := func(name string) bool {
		_, err := os.Stat(filepath.Join(c.Dir, "state", c.ID, name))
		return err == nil
	}
	return has("status") || has("state.json") && !has("exec.fifo")
}
