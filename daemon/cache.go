package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/shale-image/shale/link"
	"github.com/shale-image/shale/pool"
)

// What of the pool may be evicted: all but images that are pinned, those that the
// kernel reads without this service (direct mounts), also mounts that an earlier
// service has made, and those that are just being fetched as a whole. What a mount
// reads through this service is fetched again if it is read again. Unknown means in
// use.

// pinnedFile lies beside the record of an image that is pinned.
const pinnedFile = "pinned"

type cache struct {
	guard sync.Mutex // held while something is evicted, and to hold

	mu        sync.Mutex
	held      map[string]int  // by manifest digest
	inherited map[string]bool // of those, what was in use when the service started

	kept string // for which keep was made; guard is held
	keep *pool.References
}

// openCache finds out what is in use, and sets the quota.
func (s *store) openCache() error {
	c := &s.cache
	c.held, c.inherited = map[string]int{}, map[string]bool{}
	digests, err := s.digests()
	if err != nil {
		return err
	}
	for _, digest := range digests {
		if openElsewhere(s.meta(digest)) {
			c.inherited[digest] = true
		}
	}
	var quota int64
	if s.cfg != nil {
		quota = int64(s.cfg.Cache.Quota)
	}
	if err := s.pool.SetQuota(quota, s.evict); err != nil {
		s.log.Error("the pool is larger than its quota", "err", err)
	}
	return nil
}

func (s *store) meta(digest string) string { return filepath.Join(s.path(digest), "linked", "meta") }

// hold keeps all of an image from being evicted until release is called. What is
// here when hold returns stays.
func (s *store) hold(digest string) (release func()) {
	c := &s.cache
	c.guard.Lock()
	defer c.guard.Unlock()
	c.count(digest, 1)
	return sync.OnceFunc(func() { c.count(digest, -1) })
}

func (c *cache) count(digest string, n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.held[digest] += n; c.held[digest] == 0 {
		delete(c.held, digest)
	}
}

// stays tells whether an image must be here, since somebody reads it as it is.
func (s *store) stays(digest string) bool {
	s.mu.Lock()
	used := s.uses[digest] > 0 // then this service has its files open, too
	s.mu.Unlock()
	c := &s.cache
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.inherited[digest] && !used && !openElsewhere(s.meta(digest)) { // or it stays until the next look
		delete(c.inherited, digest)
	}
	return c.held[digest] > 0 || c.inherited[digest]
}

// staying lists the directories of linked images that must be here. That one has no map
// is an error: nobody knows then what the kernel may be reading.
func (s *store) staying() (dirs map[string]fs.FileInfo, err error) {
	c := &s.cache
	c.mu.Lock()
	digests := slices.Concat(slices.Collect(maps.Keys(c.held)), slices.Collect(maps.Keys(c.inherited)))
	c.mu.Unlock()
	dirs = map[string]fs.FileInfo{}
	for _, digest := range digests {
		if !s.stays(digest) {
			continue
		}
		dir := filepath.Join(s.path(digest), "linked")
		if dirs[dir], err = os.Stat(filepath.Join(dir, "map")); err != nil {
			return nil, fmt.Errorf("what is in use cannot be told: %w", err)
		}
	}
	return dirs, nil
}

// pinned tells whether an image is. What cannot be told is.
func (s *store) pinned(digest string) bool {
	_, err := os.Stat(filepath.Join(s.path(digest), pinnedFile))
	return !errors.Is(err, fs.ErrNotExist)
}

// evict makes room in the pool.
func (s *store) evict(need int64) error {
	c := &s.cache
	c.guard.Lock()
	defer c.guard.Unlock()
	keep, err := s.keep(true)
	if err != nil {
		return err
	}
	freed, err := s.pool.Evict(keep, need)
	s.log.Debug("evicted", "bytes", freed, "needed", need, "err", err)
	return err
}

// keep lists the addresses that must not be evicted, those of what is pinned if that
// counts. guard is held.
func (s *store) keep(pins bool) (*pool.References, error) {
	linked, err := s.staying()
	if err != nil {
		return nil, err
	}
	digests, err := s.digests()
	if err != nil {
		return nil, err
	}
	for _, digest := range digests {
		if !pins || !s.pinned(digest) {
			continue
		}
		dir := filepath.Join(s.path(digest), "linked")
		st, err := os.Stat(filepath.Join(dir, "map"))
		if errors.Is(err, fs.ErrNotExist) {
			continue // it is being made: nobody reads it yet
		}
		if err != nil {
			return nil, err
		}
		linked[dir] = st
	}
	dirs := slices.Sorted(maps.Keys(linked))
	var key strings.Builder
	for _, dir := range dirs {
		fmt.Fprintln(&key, dir, linked[dir].ModTime().UnixNano(), linked[dir].Size())
	}
	c := &s.cache
	if c.keep == nil || c.kept != key.String() {
		refs, err := link.References(dirs...)
		if err != nil {
			return nil, err
		}
		c.keep, c.kept = refs, key.String()
	}
	return c.keep, nil
}
