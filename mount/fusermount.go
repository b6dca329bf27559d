package mount

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/mount/fusetree"
)

// fusermountPath is libfuse's helper that mounts FUSE for users. It is
// set-user-ID root: /dev/fuse itself may be for root only.
func fusermountPath() (string, error) {
	path, err := exec.LookPath("fusermount3")
	if err != nil {
		return "", fmt.Errorf("fusermount3 is needed to mount without root (Debian: apt install fuse3): %w", err)
	}
	return path, nil
}

// fusermount mounts FUSE at dir and returns /dev/fuse. The helper passes it
// over the socket whose number _FUSE_COMMFD has.
func fusermount(dir, source string) (*os.File, error) {
	path, err := fusermountPath()
	if err != nil {
		return nil, err
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("fusermount3: socketpair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "fusermount3"), os.NewFile(uintptr(pair[1]), "fusermount3")
	defer ours.Close()
	options := fmt.Sprintf("ro,nosuid,nodev,fsname=%s,subtype=shale,max_read=%d", escapeOption(source), fusetree.MaxRead)
	cmd := exec.Command(path, "-o", options, "--", dir)
	cmd.Env = append(os.Environ(), "_FUSE_COMMFD=3")
	cmd.ExtraFiles = []*os.File{theirs}
	var said bytes.Buffer
	cmd.Stderr = &said
	err = cmd.Run()
	_ = theirs.Close()
	if err != nil {
		return nil, fmt.Errorf("fusermount3 %s: %w (%s)", dir, err, strings.TrimSpace(said.String()))
	}
	dev, err := receiveFile(ours)
	if err != nil {
		_ = Detach(dir, true)
		return nil, fmt.Errorf("fusermount3 passed no connection: %w", err)
	}
	return dev, nil
}

// receiveFile receives one file over a socket.
func receiveFile(from *os.File) (*os.File, error) {
	buf, oob := make([]byte, 16), make([]byte, unix.CmsgSpace(4))
	var n int
	err := retryEINTR(func() (err error) {
		_, n, _, _, err = unix.Recvmsg(int(from.Fd()), buf, oob, unix.MSG_CMSG_CLOEXEC)
		return err
	})
	if err != nil {
		return nil, err
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(messages) != 1 {
		return nil, fmt.Errorf("%d messages: %w", len(messages), errors.Join(err, unix.EBADMSG))
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return nil, fmt.Errorf("%d files: %w", len(fds), errors.Join(err, unix.EBADMSG))
	}
	return os.NewFile(uintptr(fds[0]), "/dev/fuse"), nil
}

// escapeOption quotes what separates mount options.
func escapeOption(v string) string {
	return strings.NewReplacer(`\`, `\\`, ",", `\,`).Replace(v)
}

// connectAt mounts FUSE at dir with fusermount3 and starts to serve. Only the
// calling user sees the mount.
func connectAt(server server, dir, source string) (*conn, error) {
	dev, err := fusermount(dir, source)
	if err != nil {
		return nil, err
	}
	k := &conn{server: server, dev: dev, done: make(chan struct{})}
	if k.number, err = device(unix.AT_FDCWD, dir); err != nil {
		_ = dev.Close()
		_ = Detach(dir, true)
		return nil, err
	}
	// It is there if somebody has mounted fusectl, as systemd does. Without it
	// the server alone can end what waits.
	if f, err := os.OpenFile("/sys/fs/fuse/connections/"+abortName(k.number), os.O_WRONLY, 0); err == nil {
		k.abort = f
	}
	go k.serve()
	return k, nil
}

// Detach takes the mount at dir away, whoever attached it: as root by
// umount2(2), otherwise by fusermount3. A busy mount is an error that wraps
// EBUSY, unless lazy; then it goes when it is not used any longer.
func Detach(dir string, lazy bool) error {
	flags := unix.UMOUNT_NOFOLLOW
	if lazy {
		flags |= unix.MNT_DETACH
	}
	err := unix.Unmount(dir, flags)
	if err == nil {
		return nil
	}
	if !errors.Is(err, unix.EPERM) || os.Geteuid() == 0 {
		return &os.PathError{Op: "umount", Path: dir, Err: err}
	}
	path, err := fusermountPath()
	if err != nil {
		return err
	}
	args := []string{"-u", "--", dir}
	if lazy {
		args = []string{"-u", "-z", "--", dir}
	}
	out, err := exec.Command(path, args...).CombinedOutput()
	if err != nil {
		if bytes.Contains(out, []byte("busy")) {
			err = unix.EBUSY
		}
		return fmt.Errorf("fusermount3 -u %s: %w (%s)", strconv.Quote(dir), err, bytes.TrimSpace(out))
	}
	return nil
}
