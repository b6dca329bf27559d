package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/moby/sys/mountinfo"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/daemon"
	"github.com/shale-image/shale/mount"
)

func newMount(g *globals) *cobra.Command {
	var (
		platform, face string
		noComplete     bool
	)
	cmd := &cobra.Command{
		Use:   "mount REF DIR",
		Short: "Mount an image, read-only, without waiting for its data",
		Long: `Mount an image on DIR, read-only. Only its index is fetched; data come when they
are read. DIR, a directory that need not be empty, is in the mount namespace of
the caller. With --json: {ref, manifest_digest, platform, config, content_bytes,
missing_bytes, id, face}; config is the image's own, and bytes are those of
chunks: content_bytes in files, missing_bytes stored and not yet on the node.
When no reader had to wait for 30 s the rest is fetched, too, in the time that readers
leave, unless --no-complete or the configuration says otherwise; and then, if the index was
somebody else's, the layers once more, to compare them with it.

Credentials are found as Docker's and Podman's are. A credential helper is asked only if
the registry is, and what the node knows starts without its answer after 20 s. When the
registry refuses credentials later, the service has them looked up again where they were
found, by a process of the caller's.

With --face fanotify (root, Linux 6.14, the root directory on ext4, xfs or btrfs) the
kernel reads the chunk store itself, and asks the service before. When all of the image is
here it asks no more, and the mount needs no process of the service ("detached" in shale
status); until then both processes must live: if they are killed at once, readers see
zeros where they would get EIO with the face device. It is refused where there is no room
for all of the image, which is then set aside.`,
		Example: `  shale mount localhost:5000/debian:12-shale /mnt
  shale mount oci:./layout:tag /mnt`,
		Args: args(cobra.ExactArgs(2)),
		RunE: func(cmd *cobra.Command, a []string) error {
			dir, err := filepath.Abs(a[1])
			if err != nil {
				return err
			}
			if st, err := os.Stat(dir); err != nil {
				return err
			} else if !st.IsDir() {
				return usageError{fmt.Errorf("%s is not a directory", dir)}
			}
			if err := checkFace(face); err != nil {
				return err
			}
			src, err := g.source(a[0], platform)
			if err != nil {
				return err
			}
			m, err := g.client().Mount(cmd.Context(), src, daemon.Place{Where: dir, Dir: dir, Face: face, AnyCommand: true, NoComplete: noComplete}, tellNotes)
			if err != nil {
				return err
			}
			if m.FS != nil {
				defer m.FS.Close()
				if err := mount.Attach(m.FS, dir); err != nil {
					return err
				}
			}
			if g.json {
				return printJSON(cmd.OutOrStdout(), m)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&platform, "platform", "", "platform of the image (default: this node's)")
	g.trustFlag(cmd)
	g.shareIndexFlag(cmd)
	faceFlag(cmd, &face)
	completeFlag(cmd, &noComplete)
	g.jsonFlag(cmd)
	return cmd
}

// completeFlag adds --no-complete.
func completeFlag(cmd *cobra.Command, no *bool) {
	cmd.Flags().BoolVar(no, "no-complete", false, "do not fetch the rest of the image when nobody waits for anything")
}

// faceFlag adds --face.
func faceFlag(cmd *cobra.Command, face *string) {
	cmd.Flags().StringVar(face, "face", mount.FaceAuto, "how to show the image: "+mount.FaceNames()+" (see shale doctor)")
}

// checkFace refuses a face that is none.
func checkFace(face string) error {
	if face == mount.FaceAuto {
		return nil
	}
	if _, err := mount.FaceNamed(face); err != nil {
		return usageError{err}
	}
	return nil
}

func newUmount(g *globals) *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:     "umount DIR",
		Aliases: []string{"unmount"},
		Short:   "Take a mounted image away",
		Long: `Take a mounted image away. With --force its readers get EIO, and the mount goes
even while it is in use, a read hangs or the service does not answer.`,
		Example: `  shale umount /mnt
  shale umount --force /mnt`,
		Args: args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			return umount(cmd.Context(), g, a[0], force)
		},
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "abort the mount: readers get EIO")
	return cmd
}

func umount(ctx context.Context, g *globals, dir string, force bool) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	dev, root, err := mountAt(dir)
	if err != nil {
		return err
	}
	if !root {
		return fmt.Errorf("%s: nothing is mounted here: %w", dir, blob.ErrNotFound)
	}
	if err := isImage(dir, dev); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	client := &daemon.Client{Root: g.root}
	if force {
		// Aborting comes first: afterwards nothing can hang. A service that is
		// gone has aborted already.
		err := client.Abort(ctx, dev)
		switch {
		case err == nil, errors.Is(err, daemon.ErrNotRunning), errors.Is(err, blob.ErrNotFound):
		case errors.Is(err, context.Canceled):
			return err
		default:
			fmt.Fprintf(os.Stderr, "shale: %s is taken away, but reads that wait cannot be ended: %v\n", dir, err)
		}
	}
	if err := mount.Detach(dir, force); err != nil {
		if errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("%s: %w (something has files of it open, or its working directory there)", dir, daemon.ErrBusy)
		}
		return err
	}
	// It may be visible elsewhere still, or the service gone: then there is
	// nothing to wait for.
	ctx, cancel = context.WithTimeout(ctx, time.Second)
	defer cancel()
	err = client.WaitGone(ctx, dev)
	if err == nil || force || errors.Is(err, daemon.ErrNotRunning) || errors.Is(err, blob.ErrNotFound) || errors.Is(err, context.DeadlineExceeded) {
		return nil
	}
	return err
}

// isImage refuses to take away what is mounted at dir and was certainly not
// mounted by shale.
func isImage(dir string, dev uint64) error {
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return m.Major != int(unix.Major(dev)) || m.Minor != int(unix.Minor(dev)), false
	})
	if err != nil {
		return err
	}
	for _, m := range mounts {
		if m.FSType != "erofs" && m.FSType != "fuse.shale" {
			return usageError{fmt.Errorf("%s is no image but a file system of type %s", dir, m.FSType)}
		}
	}
	return nil
}

// mountAt tells the device number of what is at dir and whether it is the root
// of a mount, without asking the file system behind it.
func mountAt(dir string) (dev uint64, root bool, err error) {
	var st unix.Statx_t
	err = unix.Statx(unix.AT_FDCWD, dir, unix.AT_NO_AUTOMOUNT|unix.AT_STATX_DONT_SYNC|unix.AT_SYMLINK_NOFOLLOW, 0, &st)
	if err != nil {
		return 0, false, &os.PathError{Op: "statx", Path: dir, Err: err}
	}
	return unix.Mkdev(st.Dev_major, st.Dev_minor), st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0, nil
}
