package daemon

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/link"
)

// remove takes a name away from the node. Images that then have no name, also
// those that lost it to a later pull, are removed, and what only they referred
// to is freed. An image that is in use keeps its last name.
func (s *store) remove(ctx context.Context, reference string) (*Removed, error) {
	ref, err := image.ParseRef(reference)
	if err != nil {
		return nil, err
	}
	out := &Removed{Ref: ref.String()}
	digests := map[string]bool{}
	s.mu.Lock()
	for key, digest := range s.names {
		if name, _, _ := splitKey(key); name == out.Ref {
			digests[digest] = true
		}
	}
	s.mu.Unlock()
	if len(digests) == 0 {
		return nil, fmt.Errorf("%s: the node knows no such image: %w", ref, blob.ErrNotFound)
	}
	for digest := range digests {
		if err := s.unname(ctx, out.Ref, digest); err != nil {
			return nil, err
		}
	}
	out.Images, out.FreedBytes, err = s.sweep(ctx)
	return out, err
}

// sweep removes the images that have no name, and frees what none refers to.
func (s *store) sweep(ctx context.Context) (images []string, freed int64, err error) {
	// A full disk may have no room for the names. To free some comes first: a
	// name whose image is gone only has it fetched again.
	errs := []error{}
	images = []string{}
	digests, err := s.digests()
	if err != nil {
		return images, 0, err
	}
	for _, digest := range digests {
		removed, err := s.removeUnnamed(ctx, digest)
		if removed {
			images = append(images, digest)
		}
		errs = append(errs, err)
	}
	f, err := link.Collect(s.pool, s.linkedDirs)
	return images, f.Disk, errors.Join(append(errs, err, s.saveNames())...)
}

// prune is sweep, or, with all, that of all images that are not in use or pinned.
func (s *store) prune(ctx context.Context, all bool) (out Pruned, err error) {
	out.Refs = []string{}
	if all {
		s.mu.Lock()
		named := maps.Clone(s.names)
		s.mu.Unlock()
		for key, digest := range named {
			ref, _, _ := splitKey(key)
			if s.pinned(digest) || s.inUse(digest) {
				continue
			}
			switch err := s.unname(ctx, ref, digest); {
			case err == nil:
				out.Refs = append(out.Refs, ref)
			case !errors.Is(err, ErrBusy):
				return out, err
			}
		}
		slices.Sort(out.Refs)
		out.Refs = slices.Compact(out.Refs)
	}
	out.Images, out.FreedBytes, err = s.sweep(ctx)
	return out, err
}

// inUse tells whether an image is, by somebody else than who compares it.
func (s *store) inUse(digest string) bool {
	s.breakOff(digest)
	return s.unused(digest) != nil
}

// unname takes the reference's names from an image.
func (s *store) unname(ctx context.Context, ref, digest string) error {
	s.breakOff(digest)
	unlock, err := s.lock(ctx, digest)
	if err != nil {
		return err
	}
	defer unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	ours := func(key, d string) bool {
		name, _, _ := splitKey(key)
		return d == digest && name == ref
	}
	others := 0
	for key, d := range s.names {
		if d == digest && !ours(key, d) {
			others++
		}
	}
	if others == 0 {
		if err := s.unusedLocked(digest); err != nil {
			return fmt.Errorf("%s: %w", ref, err)
		}
	}
	maps.DeleteFunc(s.names, ours)
	if others == 0 { // or it would stay as one without a name
		return s.unpin(digest)
	}
	return nil
}

// unused returns an error that wraps ErrBusy if an image is in use.
func (s *store) unused(digest string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.unusedLocked(digest)
}

// alone tells whether only the caller uses the image.
func (s *store) alone(digest string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.uses[digest] <= 1 && !mountedElsewhere(s.meta(digest))
}

func (s *store) unusedLocked(digest string) error {
	if s.uses[digest] > 0 || mountedElsewhere(s.meta(digest)) {
		return fmt.Errorf("%s is mounted, or being pulled: %w", digest, ErrBusy)
	}
	return nil
}

// removeUnnamed removes an image that has no name and is not in use.
func (s *store) removeUnnamed(ctx context.Context, digest string) (bool, error) {
	if _, err := os.Stat(filepath.Join(s.path(digest), "record")); err != nil {
		return false, nil // it is being made
	}
	if !s.hasName(digest) && s.unused(digest) == nil {
		s.breakOff(digest)
	}
	unlock, err := s.lock(ctx, digest)
	if err != nil {
		return false, err
	}
	defer unlock()
	if s.hasName(digest) || s.unused(digest) != nil || s.pinned(digest) {
		return false, nil
	}
	// Renamed it cannot be found any more, and what is left of it after a
	// crash is removed by openStore.
	dir := s.path(digest)
	gone := dir + removedSuffix
	if err := os.Rename(dir, gone); err != nil {
		return false, err
	}
	return true, os.RemoveAll(gone)
}

// hasName tells whether an image has a name.
func (s *store) hasName(digest string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Contains(slices.Collect(maps.Values(s.names)), digest)
}

// forget makes the node index and link an image again when it is next asked
// for, unless somebody uses it as it is.
func (s *store) forget(ctx context.Context, digest string) error {
	unlock, err := s.lock(ctx, digest)
	if err != nil {
		return err
	}
	defer unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.uses[digest] > 0 {
		return nil // somebody has already made it again, or has it open since before it was damaged
	}
	if err := s.unusedLocked(digest); err != nil {
		return fmt.Errorf("it has to be linked again: %w", err)
	}
	err = os.Remove(filepath.Join(s.path(digest), "record"))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

const removedSuffix = ".removed"

// removeLeftovers removes what processes left behind that were killed: images
// that were being made or removed, and files that were being written.
func (s *store) removeLeftovers() error {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return err
	}
	left, err := filepath.Glob(filepath.Join(filepath.Dir(s.refs), ".*.json*"))
	for _, de := range entries {
		dir := filepath.Join(s.dir, de.Name())
		if strings.HasSuffix(dir, removedSuffix) || strings.HasSuffix(dir, madeSuffix) {
			left = append(left, dir)
			continue
		}
		if _, e := os.Stat(filepath.Join(dir, "record")); errors.Is(e, os.ErrNotExist) && !mountedElsewhere(filepath.Join(dir, "linked", "meta")) {
			left = append(left, dir)
			continue
		}
		for _, pattern := range []string{".*", "scratch", "linked.new"} {
			names, e := filepath.Glob(filepath.Join(dir, pattern))
			left, err = append(left, names...), errors.Join(err, e)
		}
	}
	for _, name := range left {
		err = errors.Join(err, os.RemoveAll(name))
	}
	return err
}

// linkedDirs lists all linked images there are.
func (s *store) linkedDirs() ([]string, error) {
	images, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, err
	}
	if _, err := s.staying(); err != nil {
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
// made lives on without one. It asks again for 31 ms: what was open when a child
// was made stays so until that has become another program, a little longer than
// whoever made it waits.
func mountedElsewhere(meta string) bool {
	for wait := time.Millisecond; openElsewhere(meta); wait *= 2 {
		if wait > 16*time.Millisecond {
			return true
		}
		time.Sleep(wait)
	}
	return false
}

// openElsewhere tells whether anything else has a file open. The kernel gives a
// write lease only on a file that nobody has, itself included. What cannot be
// told is in use.
func openElsewhere(name string) bool {
	syscall.ForkLock.RLock() // no child begins with our file
	defer syscall.ForkLock.RUnlock()
	f, err := os.Open(name)
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
