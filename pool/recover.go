package pool

import (
	"cmp"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
	"lukechampine.com/blake3"
)

// recover decides about granules that the presence record does not vouch for:
// chunks that lie there are read, and kept if their digest says that they are
// whole. An Origin cannot say so.
func (s *Segment) recover(doubt bitmap, boot string) error {
	var entries []Entry
	for i := range s.table.count {
		e := s.table.entry(i)
		if from, to := e.granules(); doubt.any(from, to) {
			entries = append(entries, e)
		}
	}
	slices.SortFunc(entries, func(a, b Entry) int { return cmp.Compare(a.Off, b.Off) })
	p := s.presence
	var buf []byte
	for _, e := range entries {
		from, to := e.granules()
		doubt.take(from, to) // all of the chunk is written by settle
		if s.verify(e, &buf) != nil {
			continue
		}
		for w := from / 64; w < words(to); w++ {
			p.live[w].Or(mask(w, from, to))
		}
		p.dirty = true
	}
	err := p.settle(doubt, boot)
	if errors.Is(err, ErrNoSpace) {
		// What is in memory is right, and the file still says that it needs a
		// check. A full disk is no reason not to serve what is here.
		return nil
	}
	return err
}

// verify reads a chunk and checks it, and that zeros follow it up to the end
// of its last 4 KiB block, as in Store.
func (s *Segment) verify(e Entry, buf *[]byte) error {
	n := int64(e.Size+pageSize-1) &^ (pageSize - 1)
	if s.hole(e.Off, n) {
		return errNothing
	}
	if int64(cap(*buf)) < n {
		*buf = make([]byte, n)
	}
	p := (*buf)[:n]
	if err := s.ReadAt(p, e.Off); err != nil {
		return err
	}
	for _, b := range p[e.Size:] {
		if b != 0 {
			return errNothing
		}
	}
	return e.Digest.Verify(p[:e.Size])
}

var errNothing = errors.New("pool: no such chunk here")

// hole tells whether the file is known to have no data in [off, off+n). It
// saves reading and hashing zeros.
func (s *Segment) hole(off, n int64) bool {
	var at int64
	err := s.descriptor(func(fd int) (err error) {
		at, err = unix.Seek(fd, off, unix.SEEK_DATA)
		return err
	})
	return err == nil && at >= off+n || errors.Is(err, unix.ENXIO)
}

// session names the time for which what a file system has in memory can be relied on:
// this boot, and the mount that path is on. What was written to one that has failed,
// and was mounted anew, is not there. Another mount of the same file system costs no
// more than reading what was not durable.
func session(path string) (string, error) {
	boot, err := bootID()
	if err != nil {
		return "", err
	}
	var st unix.Statx_t
	// Ids that are never used again are of Linux 6.8.
	err = unix.Statx(unix.AT_FDCWD, path, 0, unix.STATX_MNT_ID_UNIQUE, &st)
	if err != nil || st.Mask&unix.STATX_MNT_ID_UNIQUE == 0 {
		return boot, nil
	}
	sum := blake3.Sum256(fmt.Appendf(nil, "%s %d", boot, st.Mnt_id))
	return hex.EncodeToString(sum[:])[:bootLen], nil
}

// bootID returns the kernel's name for this boot. Tests replace it to play a
// reboot.
var bootID = func() (string, error) {
	const name = "/proc/sys/kernel/random/boot_id"
	b, err := os.ReadFile(name)
	if err != nil {
		return "", err
	}
	id := strings.TrimSpace(string(b))
	if len(id) != bootLen {
		return "", fmt.Errorf("%s: %q, want %d characters", name, id, bootLen)
	}
	return id, nil
}
