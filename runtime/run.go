package runtime

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// Run is Start, Container.Run and Close in one.
func Run(ctx context.Context, o Options, lower *os.File, cfg Config) (int, error) {
	c, err := Start(o)
	if err != nil {
		return ExitFailed, err
	}
	defer c.Close()
	return c.Run(ctx, lower, cfg)
}

// Run runs the container and returns its exit code, 128+n if signal n killed
// it. An error means that there was no container: then the code is
// ExitFailed, ExitNotExecutable or ExitNotFound, and the error for people. If it
// is the OCI runtime's, that has written it to Stderr already.
//
// lower is the container's root directory before it writes anything; any kind
// of descriptor will do, O_PATH or a detached mount (fsmount, open_tree). It
// stays the caller's to close, but before Linux 6.15 a detached mount is used
// up: it can serve one container.
//
// While the container runs, SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2
// and SIGWINCH of this process go to it; a third SIGINT or SIGTERM kills it.
// Until Close they have no other effect, so that nothing is left half removed.
// When ctx ends it gets its stop signal and, ten seconds later, SIGKILL. Run
// must be called once.
func (c *Container) Run(ctx context.Context, lower *os.File, cfg Config) (int, error) {
	if c.socket == nil || c.done == nil {
		return ExitFailed, errors.New("container was run already, or closed")
	}
	if cfg.Terminal {
		if !isTerminal(c.o.Stdin) {
			return ExitFailed, errors.New("a terminal was asked for, but standard input is none")
		}
		// Whatever ends the runtime, the terminal must not stay raw.
		saved, err := unix.IoctlGetTermios(int(c.o.Stdin.Fd()), unix.TCGETS)
		if err != nil {
			return ExitFailed, err
		}
		defer unix.IoctlSetTermios(int(c.o.Stdin.Fd()), unix.TCSETS, saved)
	}
	stop, err := stopSignal(cfg.StopSignal)
	if err != nil {
		return ExitFailed, err
	}
	o, err := c.prepare(&cfg, lower)
	if err != nil {
		return ExitFailed, err
	}
	c.signals = catchSignals()
	if err := c.command(o, lower); err != nil {
		return ExitFailed, err
	}
	c.keep = !c.o.Remove
	c.signals.forward(ctx, c, stop)
	return c.result()
}

// prepare writes the bundle and returns the order that makes init run it.
func (c *Container) prepare(cfg *Config, lower *os.File) (*order, error) {
	spec, err := Spec(*cfg, c.o.Mounts, c.ID, lower)
	if err != nil {
		return nil, err
	}
	if err := writeEtc(c.Dir, spec.Hostname, cfg.Network); err != nil {
		return nil, err
	}
	config, err := json.Marshal(spec)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(c.Dir, "config.json"), config, 0o600); err != nil {
		return nil, err
	}
	// The root directory of an overlay is upper itself: make it look like
	// the image's.
	var st unix.Stat_t
	if err := unix.Fstat(int(lower.Fd()), &st); err != nil {
		return nil, fmt.Errorf("the image's root: %w", err)
	}
	upper := filepath.Join(c.Dir, "upper")
	if err := unix.Chown(upper, int(st.Uid), int(st.Gid)); err != nil {
		return nil, &os.PathError{Op: "chown", Path: upper, Err: err}
	}
	if err := unix.Chmod(upper, st.Mode&0o7777); err != nil {
		return nil, &os.PathError{Op: "chmod", Path: upper, Err: err}
	}
	if !c.filtered && !cfg.limited() && spec.Linux.CgroupsPath == "" {
		return nil, errors.New("neither a device filter (Linux 5.7 with CONFIG_CGROUP_BPF) nor cgroups below " +
			cgroupRoot + " can be had: the container could open the host's disks")
	}
	crun := isCrun(c.o.Runtime)
	argv := []string{c.o.Runtime, "--root", "state", "--log", "log", "--log-format", "json"}
	switch {
	case crun && c.filtered && !cfg.limited():
		argv = append(argv, "--cgroup-manager", "disabled")
	case crun:
		argv = append(argv, "--cgroup-manager", "cgroupfs")
	case spec.Linux.CgroupsPath == "":
		argv = append(argv, "--rootless", "true") // which lets runc do without cgroups
	}
	return &order{
		Dir:      c.Dir,
		Overlay:  overlayOptions(c.o.Remove),
		Crun:     crun,
		OwnGroup: !cfg.Terminal,
		Argv:     append(argv, "run", c.ID),
	}, nil
}

// overlayOptions returns what to add to the overlay's directories, the best
// first, for kernels that do not know it all.
//
// If upper is removed anyway, nothing in it need be synced (volatile, 5.10),
// and chown -R need not copy file contents up, which for an image that is
// fetched lazily means need not fetch them (metacopy, 4.19). An upper that is
// kept shall be a plain directory that anyone can read.
func overlayOptions(remove bool) []string {
	if remove {
		return []string{",index=off,metacopy=on,volatile", ",index=off,metacopy=on", ""}
	}
	return []string{",index=off,metacopy=off,redirect_dir=off", ""}
}

// result returns what the ended container amounts to.
func (c *Container) result() (int, error) {
	status := c.cmd.ProcessState.Sys().(syscall.WaitStatus)
	if status.Signaled() {
		return 128 + int(status.Signal()), nil
	}
	code := status.ExitStatus()
	if code == 0 {
		return 0, nil
	}
	// The runtimes exit with a code of their own if they fail; that it is
	// theirs only their log tells.
	if msg := runtimeError(filepath.Join(c.Dir, "log")); msg != "" {
		return classify(msg)
	}
	return code, nil
}
