package daemon

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/moby/sys/mountinfo"
)

// leaveCgroups moves this process to the root of each cgroup hierarchy it can.
// A service that a command started would else count against, and die with, the
// session or the job the command ran in.
func leaveCgroups() error {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return err
	}
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return err
	}
	var errs []error
	for line := range strings.Lines(string(b)) {
		// "4:memory:/user.slice", "0::/user.slice"
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) != 3 || f[2] == "/" {
			continue
		}
		for _, m := range mounts {
			if !serves(m, f[1]) || m.Root != "/" {
				continue
			}
			procs := filepath.Join(m.Mountpoint, "cgroup.procs")
			if err := os.WriteFile(procs, []byte(fmt.Sprint(os.Getpid())), 0); err != nil {
				errs = append(errs, err)
			}
			break
		}
	}
	return errors.Join(errs...)
}

// serves tells whether a mount is the hierarchy of a list of controllers as
// /proc/self/cgroup writes it; the empty list is cgroup v2.
func serves(m *mountinfo.Info, controllers string) bool {
	if controllers == "" {
		return m.FSType == "cgroup2"
	}
	if m.FSType != "cgroup" {
		return false
	}
	has := strings.Split(m.VFSOptions, ",")
	for want := range strings.SplitSeq(controllers, ",") {
		found := false
		for _, h := range has {
			found = found || h == want
		}
		if !found {
			return false
		}
	}
	return true
}
