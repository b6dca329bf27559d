package mount

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/mount/fanotify"
)

// watchGroup is a group in which segments are marked, and answers for them. All who wait
// for answers of a group wait in one queue, and each answer wakes them all. So a mount has
// a group for what no other has marked, as long as there are groups: what hangs for one
// image delays no reader of another.
type watchGroup struct {
	*fanotify.Group
	set    *watchSet
	number uint64 // of its journal's inode, whatever descriptor one has
	served bool
}

// maxGroups bounds groups. A user may have 128 (fs.fanotify.max_user_groups), some of
// which others want.
const maxGroups = 64

// groupFor returns the group of what a mount is the first to have marked. mu is held.
func (s *watchSet) groupFor(w *watched, o Options) (*watchGroup, error) {
	if w.own != nil {
		return w.own, nil
	}
	var g *watchGroup
	var err error
	if len(s.groups) < maxGroups {
		if g, err = s.newGroup(o); err == nil {
			s.groups = append(s.groups, g)
			g.serve()
		}
	}
	if g == nil {
		if len(s.groups) == 0 {
			return nil, err
		}
		g = slices.MinFunc(s.groups, func(a, b *watchGroup) int { return s.holders(a) - s.holders(b) })
	}
	w.own = g
	w.hold(g)
	return g, nil
}

func (s *watchSet) newGroup(o Options) (*watchGroup, error) {
	g, err := fanotify.New(o.logger())
	if err != nil {
		return nil, err
	}
	_, journal := g.Files()
	n, err := inode(journal)
	if err != nil {
		return nil, errors.Join(err, g.Close())
	}
	return &watchGroup{Group: g, set: s, number: n}, nil
}

// take returns a group of another process. mu is held.
func (s *watchSet) take(from Held, o Options) (*watchGroup, error) {
	n, err := inode(from.Journal)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(s.groups, func(g *watchGroup) bool { return g.number == n })
	if i < 0 {
		g, err := fanotify.Take(from.Group, from.Journal, o.logger())
		if err != nil {
			return nil, err
		}
		i = len(s.groups)
		s.groups = append(s.groups, &watchGroup{Group: g, set: s, number: n})
	}
	return s.groups[i], nil
}

// resume has a mount's segments asked for by the groups that another process has marked
// them in, as far as that can be done if it is lost.
func (s *watchSet) resume(w *watched, from Watching, im Image, o Options) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.live[w] = true
	var groups []*watchGroup
	for _, h := range from.Groups {
		g, err := s.take(h, o)
		if err != nil && w.fill == nil {
			o.logger().Error("readers of a lost mount wait until it is gone", "err", err)
			continue
		}
		if err != nil {
			return err
		}
		w.hold(g) // also if nothing is known to be marked in it
		groups = append(groups, g)
	}
	return s.enter(w, im, func(i int) (*watchGroup, error) {
		n := 0
		if from.In != nil {
			n = from.In[i]
		}
		if n < 0 || n >= len(groups) {
			return nil, fmt.Errorf("segment %d is asked for by group %d of %d: %w", i, n, len(groups), os.ErrInvalid)
		}
		return groups[n], nil
	})
}

// closeOthers closes files of groups that another mount has brought.
func (s *watchSet) closeOthers(from Watching) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, h := range from.Groups {
		if !slices.ContainsFunc(s.groups, func(g *watchGroup) bool { group, _ := g.Files(); return group == h.Group }) {
			_ = h.Group.Close()
			_ = h.Journal.Close()
		}
	}
}

func inode(f *os.File) (n uint64, err error) {
	conn, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	var st unix.Stat_t
	if cerr := conn.Control(func(fd uintptr) { err = unix.Fstat(int(fd), &st) }); cerr != nil {
		err = cerr
	}
	return st.Ino, err
}

// hold notes that a mount has files in a group, or may, and returns its place in w.groups.
func (w *watched) hold(g *watchGroup) int {
	i := slices.Index(w.groups, g)
	if i < 0 {
		i = len(w.groups)
		w.groups = append(w.groups, g)
	}
	return i
}

// holders counts the mounts that hold a group. mu is held.
func (s *watchSet) holders(g *watchGroup) (n int) {
	for w := range s.live {
		if slices.Contains(w.groups, g) {
			n++
		}
	}
	return n
}

// letGo returns the groups that only a mount has held which is forgotten. They are to be
// closed. mu is held.
func (s *watchSet) letGo(w *watched) (idle []*watchGroup) {
	for _, g := range w.groups {
		if s.holders(g) == 0 {
			idle = append(idle, g)
		}
	}
	s.groups = slices.DeleteFunc(s.groups, func(g *watchGroup) bool { return slices.Contains(idle, g) })
	return idle
}

// held are the files of a mount's groups.
func (s *watchSet) held(w *watched) (all []Held) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, g := range w.groups {
		group, journal := g.Files()
		all = append(all, Held{group, journal})
	}
	return all
}

func (g *watchGroup) serve() {
	if !g.served {
		g.served = true
		g.Serve(g)
	}
}

// of returns the marked files that an event may be about. mu is held.
func (g *watchGroup) of(e fanotify.Event) (all []*watchedFile) {
	if e.File != (fanotify.File{}) {
		if x := g.set.files[e.File]; x != nil {
			return []*watchedFile{x}
		}
		return nil
	}
	for _, x := range g.set.files {
		if x.group == g {
			all = append(all, x)
		}
	}
	return all
}

// lost tells whether an event may be about a file of a mount that is lost, whose segments
// are not all in files, and its groups not all in groups. mu is held.
func (g *watchGroup) lost(e fanotify.Event) bool {
	if g.set.files[e.File] != nil {
		return false
	}
	for w := range g.set.live {
		if w.fill == nil {
			return true
		}
	}
	return false
}

// Here tells whether what an event is about is in its segment. What is not marked any
// more is, unless it may be a lost mount's.
func (g *watchGroup) Here(e fanotify.Event) bool {
	g.set.mu.RLock()
	defer g.set.mu.RUnlock()
	if g.lost(e) {
		return false
	}
	for _, x := range g.of(e) {
		if !x.here(e) {
			return false
		}
	}
	return true
}

func (x *watchedFile) here(e fanotify.Event) bool {
	for w, flat := range x.by {
		if w.fill != nil && w.fill.Here(flat+e.Off, e.Size) {
			w.hits.Add(1)
			return true
		}
	}
	return false
}

// Bring has what an event is about brought by all mounts that it may be of, each from
// where its image comes from, until one has: a source that hangs is waited for by those
// alone whose bytes nobody else has.
func (g *watchGroup) Bring(e fanotify.Event) error {
	type part struct {
		w    *watched
		flat int64
	}
	g.set.mu.RLock()
	if g.lost(e) {
		g.set.mu.RUnlock()
		return errLost
	}
	var parts []part
	for _, x := range g.of(e) {
		for w, flat := range x.by {
			parts = append(parts, part{w, flat})
			w.brings.Add(1)
		}
	}
	g.set.mu.RUnlock()
	ended := make(chan error, len(parts))
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	for _, p := range parts {
		go func() {
			defer p.w.brings.Done()
			ended <- p.w.bring(ctx, p.flat+e.Off, e.Size)
		}()
	}
	var errs []error
	for range parts {
		err := <-ended
		if g.Here(e) {
			return nil
		}
		errs = append(errs, err)
	}
	// What is not here and belongs to no image is nobody's, and zeros.
	return errors.Join(errs...)
}

// errLost ends reads of a mount of which nothing is known but its segments.
var errLost = fmt.Errorf("nobody knows what is missing: %w", ErrIncomplete)
