package runtime

import (
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// systemDirs are what an OCI runtime may look for on the host, besides its own file, the
// bundle and the volumes.
var systemDirs = []string{"/bin", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/libx32", "/proc", "/run", "/sbin", "/sys", "/usr"}

// letGo unmounts in init's mount namespace what is not needed there. The namespace began
// as a copy of the caller's, and a copy of a mount keeps its file system in use until the
// container ends, also when the host has long unmounted it: an image would stay mounted, a
// disk busy. Where mounts are shared, as under systemd, the host's umount ends the copies
// too, so those are left alone.
//
// needed are paths; what is mounted on the way to them and below them stays.
func letGo(needed []string) error {
	needed = slices.Concat(systemDirs, needed)
	for _, path := range needed {
		if real, err := filepath.EvalSymlinks(path); err == nil {
			needed = append(needed, real)
		}
	}
	mounts, err := mountinfo.GetMounts(nil)
	if err != nil {
		return err
	}
	for _, path := range copies(mounts, needed) {
		// An error is most often that it went with one above it. Whatever it is, the
		// container can do with the mount as it can without.
		_ = unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	}
	return nil
}

// copies lists where the mounts are that nobody needs and no umount of the host's ends.
func copies(mounts []*mountinfo.Info, needed []string) (paths []string) {
	follows := map[int]bool{} // an umount on it by the host shows here
	for _, m := range mounts {
		follows[m.ID] = slices.ContainsFunc(strings.Fields(m.Optional), func(o string) bool { return strings.HasPrefix(o, "master:") })
	}
	for _, m := range mounts {
		if !follows[m.Parent] && !slices.ContainsFunc(needed, func(path string) bool { return within(path, m.Mountpoint) || within(m.Mountpoint, path) }) {
			paths = append(paths, m.Mountpoint)
		}
	}
	return paths
}

// within tells whether a path is dir or below it.
func within(path, dir string) bool {
	rest, ok := strings.CutPrefix(path, strings.TrimSuffix(dir, "/"))
	return ok && (rest == "" || rest[0] == '/')
}
