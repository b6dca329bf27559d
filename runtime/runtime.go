// Package runtime runs one container in the foreground through an OCI runtime
// (crun or runc) from a read-only root: a directory, or a mount that is not
// attached anywhere. What the container writes goes to an overlay's upper
// directory.
//
// It must know nothing of image formats, registries, pools or how the root
// comes to be; it is given a descriptor.
//
// # How a container starts
//
//	caller (signals, exit code)
//	  └─ init: this program again, pid 1 of new pid and mount namespaces;
//	     mounts /proc, lets go of what else the host has mounted, mounts the
//	     lower root and the overlay, then execs ...
//	       └─ crun or runc in the foreground, still pid 1 of that namespace
//	            └─ the container, in its own namespaces below
//
// All mounts are in init's mount namespace and all processes in its pid
// namespace, and init dies with its parent (PR_SET_PDEATHSIG). So whatever
// way the caller ends, kill -9 included, the kernel kills every process of
// the container and drops its mounts. Only files below the state directory,
// and a cgroup if limits were asked for, can be left over; Clean removes them.
//
// Init is started by Start, before it is known what to run, so that its few
// milliseconds pass while the caller fetches the image's manifest.
//
// # Cgroups
//
// A container without limits stays, as far as the host's hierarchies are
// concerned, in the caller's cgroup: attaching it to another costs 10 ms on an
// idle two-core machine (an RCU grace period), and the caller's own limits
// should hold for it. What else a cgroup does for Docker, keeping devices
// shut, is done by a cgroup of the unified hierarchy that init is born into.
// With limits, or if Config.Cgroup asks for it, the OCI runtime makes a cgroup
// in all hierarchies. (runc always does: it cannot be told not to.)
package runtime

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Network is what a container sees of the network.
type Network string

// The networks.
const (
	Host Network = "host" // the caller's network namespace; also the zero value's meaning
	None Network = "none" // a loopback device only
)

// Mount is a bind mount of a host path, submounts included.
type Mount struct {
	Source      string // absolute, must exist
	Destination string // absolute, in the container; created if missing
	ReadOnly    bool   // for the submounts too
}

// Config is what to run: what the image says merged with what the user wants.
// Merge makes one.
type Config struct {
	Args           []string // at least one; looked up in the container's PATH
	Env            []string // "K=V"; PATH, HOME, HOSTNAME and TERM get defaults
	Cwd            string   // absolute; "" is "/"
	User           string   // "name", "uid", "name:group", "uid:gid"; "" is root
	Hostname       string   // "" is the host's with Host, the id with None
	Terminal       bool     // stdin must be a terminal
	ReadonlyRootfs bool
	Network        Network
	Memory         int64   // bytes; 0 is no limit
	CPUs           float64 // 1.5 is one and a half processors; 0 is no limit
	Cgroup         bool    // a cgroup in all hierarchies even without limits
	StopSignal     string  // "SIGTERM", "TERM" or "15"; sent when Run's context ends
}

// limited tells whether the container needs a cgroup of its own.
func (c *Config) limited() bool { return c.Cgroup || c.Memory != 0 || c.CPUs != 0 }

// Options say where and through what containers run.
type Options struct {
	Runtime  string  // path of the OCI runtime; see Find
	StateDir string  // created if missing; not on overlayfs, not shared between hosts
	Remove   bool    // remove what the container wrote when it ends
	Mounts   []Mount // besides those that each container has; later ones lie on top
	// The container's streams; nil is the null device. They stay the caller's.
	Stdin, Stdout, Stderr *os.File
}

// Exit codes of Run that are not the container's own, as docker run has them.
const (
	ExitFailed        = 125 // the container could not be started
	ExitNotExecutable = 126 // the command is no executable file
	ExitNotFound      = 127 // there is no such command
)

// Errors that Run's error wraps with the exit codes 127 and 126.
var (
	ErrNotFound      = errors.New("command not found")
	ErrNotExecutable = errors.New("command cannot be executed")
)

// Find returns the path of the first of the given OCI runtimes that is
// installed; a name may be a path. Without names it looks for crun, then for
// runc: crun takes 6 ms for a container on the machine where runc takes 22.
func Find(names ...string) (string, error) {
	if len(names) == 0 {
		names = []string{"crun", "runc"}
	}
	for _, name := range names {
		if p, err := exec.LookPath(name); err == nil {
			return filepath.Abs(p)
		}
	}
	return "", fmt.Errorf("no OCI runtime is installed: looked for %s", strings.Join(names, ", "))
}

// isCrun tells whether the runtime understands crun's own options. Everything
// else is taken for runc, whose command line others follow.
func isCrun(path string) bool { return strings.Contains(filepath.Base(path), "crun") }
