package daemon

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/link"
)

// remove takes a name away from the node. An image that has no name any more
// is removed, and what only it referred to is freed; one that is in use keeps
// its name.
func (s *store) remove(reference string) (*Removed, error) {
	ref, err := image.ParseRef(reference)
	if err != nil {
		return nil, err
	}
	out := &Removed{Ref: ref.String()}
	s.mu.Lock()
	digests := map[string]bool{}
	for key, digest := range s.names {
		if strings.HasPrefix(key, ref.String()+" ") {
			digests[digest] = true
		}
	}
	s.mu.Unlock()
	if len(digests) == 0 {
		return nil, fmt.Errorf("%s: the node knows no such image: %w", ref, blob.ErrNotFound)
	}
	for digest := range digests {
		removed, err := s.removeImage(ref, digest)
		if err != nil {
			return nil, err
		}
		if removed {
			out.Images = append(out.Images, digest)
		}
	}
	freed, err := link.Collect(s.pool, s.linkedDirs)
	out.FreedBytes = freed.Disk
	return out, err
}

// removeImage removes the reference's names of an image, and the image if it
// has no other.
func (s *store) removeImage(ref image.Ref, digest string) (removed bool, err error) {
	defer s.lock(digest)()
	s.mu.Lock()
	defer s.mu.Unlock()
	others := false
	for key, d := range s.names {
		others = others || d == digest && !strings.HasPrefix(key, ref.String()+" ")
	}
	dir := s.path(digest)
	if !others {
		if s.uses[digest] > 0 || mountedElsewhere(filepath.Join(dir, "linked", "meta")) {
			return false, fmt.Errorf("%s (%s) is mounted: %w", ref, digest, ErrBusy)
		}
	}
	for key, d := range s.names {
		if d == digest && strings.HasPrefix(key, ref.String()+" ") {
			delete(s.names, key)
		}
	}
	if err := s.saveNames(); err != nil || others {
		return false, err
	}
	// Renamed it cannot be found any more, and what is left of it after a
	// crash is removed by openStore.
	gone := dir + removedSuffix
	if err := os.Rename(dir, gone); err != nil && !errors.Is(err, os.ErrNotExist) {
		return false, err
	}
	return true, os.RemoveAll(gone)
}

// forget makes the node index and link an image again when it is next asked
// for.
func (s *store) forget(digest string) error {
	defer s.lock(digest)()
	err := os.Remove(filepath.Join(s.path(digest), "record"))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

const removedSuffix = ".removed"

// removeLeftovers ends removals that a crash interrupted.
func (s *store) removeLeftovers() error {
	left, err := filepath.Glob(filepath.Join(s.dir, "*"+removedSuffix))
	for _, dir := range left {
		err = errors.Join(err, os.RemoveAll(dir))
	}
	return err
}

// linkedDirs lists all linked images there are.
func (s *store) linkedDirs() ([]string, error) {
	images, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, err
	}
	var dirs []string
	for _, de := range images {
		dir := filepath.Join(s.dir, de.Name(), "linked")
		if _, err := os.Stat(dir); err == nil && !strings.HasSuffix(de.Name(), removedSuffix) {
			dirs = append(dirs, dir)
		} else if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
	}
	return dirs, nil
}

// mountedElsewhere tells whether something has an image's metadata open, of
// which this service knows nothing: a direct mount that an earlier service
// made lives on without one. The kernel gives a write lease only on a file
// that nobody else has open, itself included. What cannot be told is in use.
func mountedElsewhere(meta string) bool {
	f, err := os.Open(meta)
	if err != nil {
		return !errors.Is(err, os.ErrNotExist)
	}
	defer f.Close()
	if _, err := unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_WRLCK); err != nil {
		return true
	}
	_, err = unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_UNLCK)
	return err != nil
}
