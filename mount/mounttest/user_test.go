package mounttest

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/mount"
)

const nobody = 65534

// cannot begins what roleUser prints if this machine lets no user mount.
const cannot = "cannot: "

// TestUser: a user without rights mounts with fusermount3 and sees the tree.
func TestUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to become another user")
	}
	if _, err := exec.LookPath("fusermount3"); err != nil {
		t.Skip(err)
	}
	files := awkward()
	reference := extract(t, files)
	dir, err := os.MkdirTemp("", "shale-user-") // unlike t.TempDir(), others may get here
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	must(t, os.Chmod(dir, 0o755))
	store(t, dir, indexOf(files))
	must(t, os.Mkdir(filepath.Join(dir, "at"), 0o700))
	must(t, filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		return errors.Join(err, os.Lchown(path, nobody, nobody))
	}))
	want, err := list(reference)
	must(t, err)
	got := child(t, "user-setup", dir)
	if why, ok := strings.CutPrefix(got, cannot); ok {
		t.Skip("users cannot mount here: " + why) // no /etc/mtab, for example
	}
	if d := cmp.Diff(strings.Split(want, "\n"), strings.Split(got, "\n")); d != "" {
		t.Error(d)
	}
}

// roleUserSetup makes /dev/fuse open to everyone, as it is on most machines,
// in a mount namespace of its own.
func roleUserSetup(dir string) error {
	if os.Getenv("SHALE_UNSHARED") == "" {
		cmd := command("user-setup", dir)
		cmd.Env = append(cmd.Env, "SHALE_UNSHARED=1")
		cmd.Stdout = os.Stdout
		cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
		return cmd.Run()
	}
	fuse := filepath.Join(dir, "fuse")
	if err := unix.Mknod(fuse, unix.S_IFCHR|0o600, int(unix.Mkdev(10, 229))); err != nil {
		return err
	}
	if err := os.Chmod(fuse, 0o666); err != nil {
		return err
	}
	if err := unix.Mount(fuse, "/dev/fuse", "", unix.MS_BIND, ""); err != nil {
		return err
	}
	cmd := command("user", dir)
	cmd.Stdout = os.Stdout
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	return cmd.Run()
}

// roleUser mounts, prints what it sees, and unmounts.
func roleUser(dir string) error {
	if c := mount.Probe(); !c.Fusermount {
		fmt.Print(cannot, c.Why["Fusermount"])
		return nil
	}
	n, err := open(dir)
	if err != nil {
		return err
	}
	face, why := mount.Choose(mount.Probe(), true, false)
	if face == nil {
		return errors.New(why)
	}
	if _, err := face.Mount(context.Background(), n.image(), options); !errors.Is(err, mount.ErrNeedsDir) {
		return fmt.Errorf("mount without a directory: %v", err)
	}
	o := options
	o.Dir = filepath.Join(dir, "at")
	m, err := face.Mount(context.Background(), n.image(), o)
	if err != nil {
		return err
	}
	if m.FD() != nil || !m.Served() {
		return errors.New("not attached, or not served")
	}
	out, err := list(o.Dir)
	if err != nil {
		return err
	}
	fmt.Print(out)
	if err := os.WriteFile(filepath.Join(o.Dir, "new"), nil, 0o600); !errors.Is(err, unix.EROFS) {
		return fmt.Errorf("create: %v", err)
	}
	f, err := os.Open(o.Dir)
	if err != nil {
		return err
	}
	if err := mount.Detach(o.Dir, false); !errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("detach while busy: %v", err)
	}
	f.Close()
	if err := mount.Detach(o.Dir, false); err != nil {
		return err
	}
	<-m.Done()

	// Aborted, cold reads fail and nothing hangs.
	if m, err = face.Mount(context.Background(), n.image(), o); err != nil {
		return err
	}
	if err := m.Abort(); err != nil {
		return err
	}
	if _, err := os.ReadFile(filepath.Join(o.Dir, "big")); err == nil {
		return errors.New("a cold read succeeded after Abort")
	}
	if err := mount.Detach(o.Dir, true); err != nil {
		return err
	}
	<-m.Done()
	return errors.Join(m.Err(), n.close())
}

// list describes all that a user can see of a tree, one line each.
func list(dir string) (string, error) {
	var b strings.Builder
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, path)
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		fmt.Fprintf(&b, "%q mode=%o own=%d:%d rdev=%x mtime=%d.%09d", rel, st.Mode, st.Uid, st.Gid, st.Rdev, st.Mtim.Sec, st.Mtim.Nsec)
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			fmt.Fprintf(&b, " nlink=%d size=%d", st.Nlink, st.Size)
		}
		names := make([]byte, 4096)
		n, err := unix.Llistxattr(path, names)
		if err != nil {
			return err
		}
		for _, name := range slices.Sorted(strings.SplitSeq(string(names[:n]), "\x00")) {
			if name == "" || strings.HasPrefix(name, "trusted.") {
				continue
			}
			value := make([]byte, 8192)
			n, err := unix.Lgetxattr(path, name, value)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " %s=%x", name, value[:n])
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			f, err := os.Open(path)
			if err != nil {
				return err
			}
			defer f.Close()
			h := sha256.New()
			if _, err := io.Copy(h, f); err != nil {
				return err
			}
			fmt.Fprintf(&b, " %x", h.Sum(nil)[:8])
		case unix.S_IFLNK:
			to, err := os.Readlink(path)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " -> %s", to)
		}
		b.WriteByte('\n')
		return nil
	})
	return b.String(), err
}
