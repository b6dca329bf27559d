package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/mount"
	"github.com/shale-image/shale/runtime"
)

// diagnosis is what this machine can do for the calling user.
type diagnosis struct {
	Kernel     string  `json:"kernel"`
	AsRoot     bool    `json:"as_root"`
	Checks     []check `json:"checks"`
	Incomplete choice  `json:"auto_incomplete"` // the face of an image whose data are not all here
	Complete   choice  `json:"auto_complete"`
	Containers bool    `json:"containers"` // shale run can work
	Mounts     bool    `json:"mounts"`     // shale mount can
}

// check is one thing that was tried.
type check struct {
	Name   string `json:"name"`
	OK     bool   `json:"ok"`
	Detail string `json:"detail"`
	Hint   string `json:"hint,omitempty"` // what to do if it is not OK
}

// choice is what --face auto is.
type choice struct {
	Face string `json:"face"` // "" if there is none
	Why  string `json:"why"`
}

func newDoctor(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Tell what this machine can do",
		Long: `Try out what this machine's kernel and programs can do for the calling user, and
tell which face --face auto is and why. It leaves nothing behind. The exit code
is 0 if containers can run and 1 if not.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			d := diagnose(g.root)
			if g.json {
				if err := printJSON(cmd.OutOrStdout(), d); err != nil {
					return err
				}
			} else if err := d.print(cmd.OutOrStdout()); err != nil {
				return err
			}
			if !d.Containers {
				return exitStatus(codeFailure)
			}
			return nil
		},
	}
	g.jsonFlag(cmd)
	return cmd
}

func diagnose(root string) diagnosis {
	c := mount.Probe()
	d := diagnosis{Kernel: c.KernelRelease, AsRoot: os.Geteuid() == 0}
	capability := func(name, field string, ok bool, detail, hint string) {
		if !ok {
			detail = fmt.Sprint(c.Why[field])
		}
		d.add(check{name, ok, detail, hint})
	}
	capability("EROFS on files", "FileBackedEROFS", c.FileBackedEROFS, "works", "needs root and Linux 6.12, or loop devices")
	capability("errors of files", "TellsErrors", c.TellsErrors, "reach readers of EROFS", "mounts do without the page cache of files, and are a little slower; later kernels of the same series have it mended")
	capability("EROFS on loop", "Loop", c.Loop, "works", "needs root, and loop devices where EROFS cannot mount files")
	capability("detached FUSE", "DetachedFUSE", c.DetachedFUSE, "works", "needs root and /dev/fuse (modprobe fuse)")
	capability("pre-access events", "Fanotify", c.Fanotify, "work, for --face fanotify on ext4, xfs and btrfs", "only needed for --face fanotify: root and Linux 6.14")
	capability("FUSE handover", "Resend", c.Resend, "works", "needs root and Linux 6.9")
	capability("fusermount3", "Fusermount", c.Fusermount, "works", fusermountHint(c.Why["Fusermount"]))
	overlay := checkOverlay()
	oci := checkRuntime()
	d.add(overlay)
	d.add(oci)
	d.add(checkCgroups())
	state := checkRoot(root)
	d.add(state)
	choose := func(complete bool) choice {
		face, why := mount.Choose(c, complete, d.AsRoot)
		if face == nil {
			return choice{"", why}
		}
		return choice{face.Name(), why}
	}
	d.Incomplete, d.Complete = choose(false), choose(true)
	d.Mounts = d.Incomplete.Face != "" && state.OK
	d.Containers = d.AsRoot && d.Mounts && overlay.OK && oci.OK
	return d
}

func (d *diagnosis) add(c check) {
	if c.OK {
		c.Hint = ""
	}
	d.Checks = append(d.Checks, c)
}

func (d *diagnosis) print(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	user := "root"
	if !d.AsRoot {
		user = fmt.Sprintf("user %d", os.Geteuid())
	}
	fmt.Fprintf(w, "kernel\t%s, as %s\n", d.Kernel, user)
	for _, c := range d.Checks {
		mark := ""
		if !c.OK {
			mark = "no: "
		}
		fmt.Fprintf(w, "%s\t%s%s\n", c.Name, mark, c.Detail)
		if c.Hint != "" {
			fmt.Fprintf(w, "\t  hint: %s\n", c.Hint)
		}
	}
	for _, c := range []struct {
		name string
		choice
	}{{"auto, incomplete image", d.Incomplete}, {"auto, complete image", d.Complete}} {
		face := c.Face
		if face == "" {
			face = "none"
		}
		fmt.Fprintf(w, "%s\t%s: %s\n", c.name, face, c.Why)
	}
	yes := map[bool]string{true: "yes", false: "no"}
	fmt.Fprintf(w, "images can be mounted\t%s\n", yes[d.Mounts])
	fmt.Fprintf(w, "containers can run\t%s\n", yes[d.Containers])
	return w.Flush()
}

func fusermountHint(err error) string {
	if err != nil && strings.Contains(err.Error(), "/dev/fuse") {
		return "users need access to /dev/fuse: it is mode 0666 where udev makes it"
	}
	return "only needed without root: install fuse3"
}

func checkOverlay() check {
	c := check{Name: "overlay", Detail: "works", Hint: "needs root, and the kernel's overlay (modprobe overlay)"}
	fd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		c.Detail = err.Error()
		return c
	}
	c.OK = unix.Close(fd) == nil
	return c
}

func checkRuntime() check {
	path, err := runtime.Find()
	if err != nil {
		return check{Name: "OCI runtime", Detail: err.Error(), Hint: "install crun or runc"}
	}
	return check{Name: "OCI runtime", OK: true, Detail: path}
}

func checkCgroups() check {
	c := check{Name: "cgroups", Hint: "--memory and --cpus need cgroups, mounted at /sys/fs/cgroup"}
	var st unix.Statfs_t
	err := unix.Statfs("/sys/fs/cgroup", &st)
	switch {
	case err != nil:
		c.Detail = err.Error()
	case st.Type == unix.CGROUP2_SUPER_MAGIC:
		c.OK, c.Detail = true, "version 2"
	case st.Type == unix.TMPFS_MAGIC:
		c.OK, c.Detail = true, "version 1"
	default:
		c.Detail = "/sys/fs/cgroup is no cgroup file system"
	}
	return c
}

// checkRoot tells about the file system that root is on, or will be.
func checkRoot(root string) check {
	c := check{Name: "root directory", Hint: "choose another with --root or SHALE_ROOT"}
	dir, err := filepath.Abs(root)
	if err != nil {
		c.Detail = err.Error()
		return c
	}
	at := dir
	for {
		if _, err = os.Stat(at); !errors.Is(err, os.ErrNotExist) || at == filepath.Dir(at) {
			break
		}
		at = filepath.Dir(at)
	}
	var st unix.Statfs_t
	if err == nil {
		err = unix.Statfs(at, &st)
	}
	if err == nil {
		err = unix.Access(at, unix.W_OK|unix.X_OK)
	}
	if err != nil {
		c.Detail = fmt.Sprintf("%s: %v", at, err)
		return c
	}
	free := int64(st.Bavail) * st.Bsize
	c.OK = free > 0
	c.Detail = fmt.Sprintf("%s on %s, %s free", dir, fsType(at), size(free))
	return c
}

// fsType names the file system a path is on.
func fsType(path string) string {
	var st unix.Statx_t
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || unix.Statx(unix.AT_FDCWD, path, 0, unix.STATX_MNT_ID, &st) != nil {
		return "an unknown file system"
	}
	for line := range strings.Lines(string(table)) {
		if !strings.HasPrefix(line, fmt.Sprintf("%d ", st.Mnt_id)) {
			continue
		}
		if _, rest, ok := strings.Cut(line, " - "); ok {
			name, _, _ := strings.Cut(rest, " ")
			return name
		}
	}
	return "an unknown file system"
}
