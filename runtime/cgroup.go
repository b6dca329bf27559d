package runtime

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

const cgroupRoot = "/sys/fs/cgroup"

// cgroupVersion returns 2 for the unified hierarchy, 1 for a tmpfs with a
// hierarchy a controller (and perhaps a unified one beside them), 0 if there
// are none or they cannot be written.
func cgroupVersion() int {
	var fs unix.Statfs_t
	if unix.Statfs(cgroupRoot, &fs) != nil {
		return 0
	}
	if fs.Type == unix.CGROUP2_SUPER_MAGIC {
		if fs.Flags&unix.ST_RDONLY != 0 {
			return 0
		}
		return 2
	}
	// Device rules are what no container's cgroup may lack.
	if unix.Statfs(cgroupRoot+"/devices", &fs) != nil || fs.Type != unix.CGROUP_SUPER_MAGIC ||
		fs.Flags&unix.ST_RDONLY != 0 {
		return 0
	}
	return 1
}

// cgroupPath is where in every hierarchy a container's cgroup is. It lies flat
// in the root, so that removing it leaves no parent behind.
func cgroupPath(id string) string { return "/shale-" + id }

// limit gives the container a cgroup of its own.
func limit(s *specs.Spec, c *Config, version int) error {
	if version == 0 {
		return errors.New("limits need cgroups, and this machine has none that can be written below " + cgroupRoot)
	}
	r := s.Linux.Resources
	if c.Memory > 0 {
		r.Memory = &specs.LinuxMemory{Limit: &c.Memory}
		if swapAccounted(version) {
			swap := 2 * c.Memory // memory and swap together, as docker run
			r.Memory.Swap = &swap
		}
	}
	if c.CPUs > 0 {
		period := uint64(100_000) // microseconds
		quota := int64(c.CPUs * float64(period))
		if quota < 1000 {
			return fmt.Errorf("%g processors: the least is 0.01", c.CPUs)
		}
		r.CPU = &specs.LinuxCPU{Quota: &quota, Period: &period}
	}
	s.Mounts = append(s.Mounts, specs.Mount{Destination: cgroupRoot, Type: "cgroup", Source: "cgroup",
		Options: []string{"nosuid", "noexec", "nodev", "ro"}})
	if version == 2 {
		s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.CgroupNamespace})
	}
	return nil
}

// swapAccounted tells whether the kernel limits swap by cgroup; setting a
// limit fails where it does not.
func swapAccounted(version int) bool {
	pattern := cgroupRoot + "/memory/memory.memsw.limit_in_bytes"
	if version == 2 {
		pattern = cgroupRoot + "/*/memory.swap.max" // the root itself has none
	}
	found, _ := filepath.Glob(pattern)
	return len(found) > 0
}

// removeCgroups removes what a killed runtime has left of a container's
// cgroups. Its processes are dying: the kernel refuses until they are gone.
func removeCgroups(id string) error {
	var dirs []string
	for _, parent := range []string{cgroupRoot, cgroupRoot + "/*"} {
		found, err := filepath.Glob(parent + cgroupPath(id))
		if err != nil {
			return err
		}
		dirs = append(dirs, found...)
	}
	for _, dir := range dirs {
		err := whileBusy(func() error { return os.Remove(dir) })
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// whileBusy repeats what the dying processes of a killed container may still
// stand in the way of, for a second at most.
func whileBusy(f func() error) error {
	var err error
	for range 100 {
		err = f()
		if !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENOTEMPTY) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	return err
}
