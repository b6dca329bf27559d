package mount

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/mount/fusedev"
)

const bdiDir = "/sys/class/bdi"

// setReadAhead sets the readahead of a backing device, "0:52" or "erofs-3". It
// is a matter of speed only: in a container /sys is often read-only.
func setReadAhead(bdi string, kib int) {
	_ = os.WriteFile(filepath.Join(bdiDir, bdi, "read_ahead_kb"), []byte(strconv.Itoa(kib)), 0)
}

// SetReadAhead sets the kernel's readahead of a mount that was made with one
// (Options.ReadAheadKiB); else it does nothing. Files that are open keep theirs.
func (m *Mounted) SetReadAhead(kib int) {
	if m.bdi != "" {
		setReadAhead(m.bdi, kib)
	}
}

// Steady says that a start with fusedev.Options.Around is over.
func (m *Mounted) Steady() {
	if m.conn == nil {
		return
	}
	if s, ok := m.conn.server.(*fusedev.Server); ok {
		s.Steady()
	}
}

// createWithReadAhead makes an EROFS super block and sets its readahead. An
// EROFS on a file has a backing device named "erofs-N", and nothing tells
// which N belongs to which mount: it is the one that was not there before. If
// somebody who knows nothing of lockDevices mounts EROFS at the same moment there
// may be two; then the readahead is left alone. It returns the device whose
// readahead it has set.
func createWithReadAhead(fs *fsContext, kib int) (bdi string, err error) {
	if kib <= 0 {
		defer lockDevices(unix.LOCK_SH)()
		return "", fs.create()
	}
	defer lockDevices(unix.LOCK_EX)()
	before := erofsDevices()
	if err := fs.create(); err != nil {
		return "", err
	}
	var added []string
	for name := range erofsDevices() {
		if !before[name] {
			added = append(added, name)
		}
	}
	if len(added) != 1 {
		return "", nil
	}
	setReadAhead(added[0], kib)
	return added[0], nil
}

// lockDevices keeps other mounts of ours, of any process, from making devices at the
// same time, and returns what ends that. It goes without if it has to wait for long.
func lockDevices(how int) (unlock func()) {
	const patience, look = 250 * time.Millisecond, time.Millisecond
	dir, err := os.Open(bdiDir)
	if err != nil {
		return func() {}
	}
	for end := time.Now().Add(patience); ; time.Sleep(look) {
		err := unix.Flock(int(dir.Fd()), how|unix.LOCK_NB)
		if err == nil || err != unix.EWOULDBLOCK && err != unix.EINTR || time.Now().After(end) {
			return func() { _ = dir.Close() }
		}
	}
}

func erofsDevices() map[string]bool {
	names := map[string]bool{}
	entries, _ := os.ReadDir(bdiDir)
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "erofs-") {
			names[e.Name()] = true
		}
	}
	return names
}
