package runtime

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// A container's state directory:
//
//	lock           flock'ed as long as the caller or the runtime lives
//	keep           present if upper outlives the container
//	upper/         what the container writes
//	work/          overlay's own
//	lower/ rootfs/ mount points, empty outside the container's namespaces
//	config.json    the OCI configuration; has the environment, hence 0600
//	state/         the OCI runtime's --root
//	log            the OCI runtime's messages, JSON lines
//	resolv.conf hosts hostname
const (
	lockFile = "lock"
	keepFile = "keep"
)

// newStateDir makes a state directory below root, locked.
func newStateDir(root string, keep bool) (id, dir string, lock *os.File, err error) {
	if err := os.MkdirAll(root, 0o700); err != nil {
		return "", "", nil, err
	}
	// Clean must not see the directory without its lock.
	unlock, err := flock(root, unix.O_DIRECTORY, unix.LOCK_EX)
	if err != nil {
		return "", "", nil, err
	}
	defer unlock.Close()
	id, dir, err = uniqueDir(root)
	if err != nil {
		return "", "", nil, err
	}
	lock, err = flock(filepath.Join(dir, lockFile), unix.O_CREAT|unix.O_RDWR, unix.LOCK_EX|unix.LOCK_NB)
	if err == nil && keep {
		err = os.WriteFile(filepath.Join(dir, keepFile), nil, 0o600)
	}
	for _, name := range []string{"upper", "work", "lower", "rootfs"} {
		if err == nil {
			err = os.Mkdir(filepath.Join(dir, name), 0o700)
		}
	}
	if err != nil {
		os.RemoveAll(dir)
		if lock != nil {
			lock.Close()
		}
		return "", "", nil, err
	}
	return id, dir, lock, nil
}

func uniqueDir(root string) (id, dir string, err error) {
	for range 10 {
		var b [8]byte
		rand.Read(b[:])
		id = hex.EncodeToString(b[:])
		dir = filepath.Join(root, id)
		if err = os.Mkdir(dir, 0o700); !errors.Is(err, os.ErrExist) {
			break
		}
	}
	return id, dir, err
}

// flock opens and locks a file. The lock lasts until every duplicate of the
// descriptor is closed.
func flock(name string, flags, how int) (*os.File, error) {
	f, err := os.OpenFile(name, flags|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err = unix.Flock(int(f.Fd()), how)
		if err != unix.EINTR {
			break
		}
	}
	if err != nil {
		f.Close()
		return nil, &os.PathError{Op: "flock", Path: name, Err: err}
	}
	return f, nil
}

// Clean removes what containers have left below stateDir whose caller was
// killed: all of it, or all but the upper directory of a container that was
// to keep it. It returns the ids of those it found. Running containers and
// those being started are left alone; concurrent calls do no harm.
func Clean(stateDir string) ([]string, error) {
	stateDir, err := filepath.Abs(stateDir)
	if err != nil {
		return nil, err
	}
	dead, locks, err := leftovers(stateDir)
	defer func() {
		for _, l := range locks {
			l.Close()
		}
	}()
	errs := []error{err}
	for _, id := range dead {
		dir := filepath.Join(stateDir, id)
		_, err := os.Lstat(filepath.Join(dir, keepFile))
		errs = append(errs, tidy(dir, id, err == nil))
	}
	return dead, errors.Join(errs...)
}

// leftovers returns the ids of dead containers and their locks, now held.
func leftovers(stateDir string) (dead []string, locks []*os.File, err error) {
	unlock, err := flock(stateDir, unix.O_DIRECTORY, unix.LOCK_EX)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			err = nil
		}
		return nil, nil, err
	}
	defer unlock.Close()
	entries, err := os.ReadDir(stateDir)
	for _, e := range entries {
		if !e.IsDir() || !isID(e.Name()) {
			continue
		}
		dir := filepath.Join(stateDir, e.Name())
		lock, err := flock(filepath.Join(dir, lockFile), unix.O_RDWR, unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			locks = append(locks, lock)
		case !errors.Is(err, os.ErrNotExist):
			continue // running
		default:
			// No lock: either ended and kept, or killed while being made
			// or removed.
			if _, err := os.Lstat(filepath.Join(dir, keepFile)); err == nil {
				continue
			}
		}
		dead = append(dead, e.Name())
	}
	return dead, locks, err
}

// Remove removes a container's kept upper directory. It is an error if the
// container runs.
func Remove(stateDir, id string) error {
	if !isID(id) {
		return fmt.Errorf("container %q: want 16 hex digits", id)
	}
	dir := filepath.Join(stateDir, id)
	if _, err := os.Lstat(dir); err != nil {
		return err
	}
	lock, err := flock(filepath.Join(dir, lockFile), unix.O_RDWR, unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		defer lock.Close()
	} else if !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("container %s runs: %w", id, err)
	}
	return tidy(dir, id, false)
}

func isID(s string) bool {
	b, err := hex.DecodeString(s)
	return err == nil && len(b) == 8 && hex.EncodeToString(b) == s
}

// tidy removes a dead container's state, which the caller has locked.
func tidy(dir, id string, keep bool) error {
	err := errors.Join(removeDeviceCgroup(id), removeCgroups(id))
	if !keep {
		return errors.Join(err, removeAll(dir))
	}
	// The lock goes last: its absence says that the rest is gone.
	for _, name := range append([]string{"work", "lower", "rootfs", "state", "log"}, etcFiles...) {
		err = errors.Join(err, removeAll(filepath.Join(dir, name)))
	}
	return errors.Join(err, removeAll(filepath.Join(dir, lockFile)))
}

func removeAll(name string) error {
	return whileBusy(func() error { return os.RemoveAll(name) })
}
