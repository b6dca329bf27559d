package runtime

import (
	"os"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// defaultCapabilities are the 14 that Docker leaves to a container's root:
// enough to install packages and run daemons, nothing that reaches the host's
// kernel, clock, modules or mounts.
var defaultCapabilities = []string{
	"CAP_AUDIT_WRITE",      // write to the audit log: sshd, login
	"CAP_CHOWN",            // give files away
	"CAP_DAC_OVERRIDE",     // pass over permission bits
	"CAP_FOWNER",           // act as the owner of any file
	"CAP_FSETID",           // keep set-id bits on change
	"CAP_KILL",             // signal any process of the container
	"CAP_MKNOD",            // make device nodes, of which only defaultDevices open
	"CAP_NET_BIND_SERVICE", // ports below 1024
	"CAP_NET_RAW",          // ping
	"CAP_SETFCAP",          // file capabilities
	"CAP_SETGID",
	"CAP_SETPCAP",
	"CAP_SETUID",
	"CAP_SYS_CHROOT",
}

// capabilities returns the sets for a user: a user other than root has them
// in the bounding set only, so that set-uid programs work.
func capabilities(uid uint32) *specs.LinuxCapabilities {
	l := &specs.LinuxCapabilities{Bounding: defaultCapabilities}
	if uid == 0 {
		l.Effective, l.Permitted = defaultCapabilities, defaultCapabilities
	}
	return l
}

// maskedPaths show nothing in the container: they tell about the host or
// reach into it.
var maskedPaths = []string{
	"/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys",
	"/proc/latency_stats", "/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats",
	"/sys/devices/virtual/powercap", "/sys/firmware",
}

// readonlyPaths are settings of the host's kernel.
var readonlyPaths = []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}

// defaultMounts are the file systems every container has, in mount order.
func defaultMounts() []specs.Mount {
	return []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs",
			Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts",
			Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
		{Destination: "/dev/shm", Type: "tmpfs", Source: "shm",
			Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=65536k"}},
		{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
	}
}

// rlimits are systemd's for services: a low soft limit, because select(2)
// ends at 1024 and old daemons close every descriptor up to it, and a hard one
// that databases may raise themselves to. The caller's own is not exceeded:
// that takes CAP_SYS_RESOURCE.
func rlimits() []specs.POSIXRlimit {
	hard := uint64(524288)
	var l unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &l) == nil {
		hard = min(hard, l.Max)
	}
	return []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: min(1024, hard), Hard: hard}}
}

// oomScore keeps a caller's protection from the kernel's out-of-memory killer
// from its containers. Otherwise they inherit the caller's score.
func oomScore() *int {
	data, err := os.ReadFile("/proc/self/oom_score_adj")
	if err != nil || !strings.HasPrefix(string(data), "-") {
		return nil
	}
	return new(int)
}
