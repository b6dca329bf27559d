package daemon

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/shale-image/shale/keeper"
	"github.com/shale-image/shale/link"
	"github.com/shale-image/shale/mount"
	"github.com/shale-image/shale/mount/fusedev"
	"github.com/shale-image/shale/pool"
)

// Mounts of the face fanotify: the kernel reads segments itself, and asks before. The
// keeper holds what it asks by, and the pool's own descriptors of the segments, which
// are older than the marks: a worker with younger ones would wait for itself. Room for
// all of the image is set aside, since nobody can be served from memory, and nothing of
// it is evicted. When all of it is here the mount is detached, and as good as a direct
// one.

// directFace is the face that needs no process.
const directFace = "direct"

// own is how many of a kept mount's files are mount.Watching's: of each group the group and
// its journal, then Ends. Those of its segments' data come behind.
func (k *journal) own() int { return 2*max(k.Groups, 1) + 1 }

// fits tells whether a mount of the face fanotify has the files that its journal tells of.
func (k *journal) fits(m *keeper.Mount) bool {
	return len(k.Segments) > 0 && len(m.Files) == k.own()+len(k.Segments)
}

// keepWatched has a mount kept that is about to be made, or refuses it.
func (s *server) keepWatched(m *mounted, w mount.Watching) error {
	if s.keeper.Keeper() == 0 {
		return fmt.Errorf("the keeper is dead: %w", mount.ErrNoHolder)
	}
	var files []*os.File
	for _, g := range w.Groups {
		files = append(files, g.Group, g.Journal)
	}
	files = append(files, w.Ends)
	own := len(files)
	for _, ls := range m.image.Linked().Segments {
		segment, ok := s.pool.Segment(ls.ID)
		if !ok {
			return fmt.Errorf("segment %08x: %w", ls.ID, os.ErrNotExist)
		}
		files = append(files, segment.File())
	}
	if len(files) > keeper.MaxFiles {
		return fmt.Errorf("the image lies in %d segments, at most %d can be kept: use the face device", len(files)-own, keeper.MaxFiles-own)
	}
	if err := s.setAside(m); err != nil {
		return err
	}
	m.kept, m.face, m.groups, m.markedIn = true, fanotifyFace, len(w.Groups), w.In
	return s.keepMount(m, files)
}

// watchedData returns the descriptors of segments that come with kept mounts, and takes
// them out of these.
func watchedData(kept []keeper.Mount) map[uint32]*os.File {
	data := map[uint32]*os.File{}
	guessAll(kept)
	for i := range kept {
		k := &kept[i]
		var j journal
		if !k.Held || json.Unmarshal(k.Rest, &j) != nil || !j.fits(k) {
			continue
		}
		for n, id := range j.Segments {
			f := k.Files[j.own()+n]
			if data[id] != nil {
				f.Close()
			} else {
				data[id] = f
			}
		}
		k.Files = k.Files[:j.own()]
	}
	return data
}

func (k *journal) from(files []*os.File, dev uint64) mount.Watching {
	w := mount.Watching{In: k.MarkedIn, Ends: files[len(files)-1], ID: k.Watching, Dev: dev, BDI: k.BDI}
	for i := 0; i+1 < len(files); i += 2 {
		w.Groups = append(w.Groups, mount.Held{Group: files[i], Journal: files[i+1]})
	}
	return w
}

// resumeWatched goes on with a mount that another worker has made.
func (s *server) resumeWatched(m *mounted, k *keeper.Mount, dev uint64, j *journal) (*mount.Mounted, error) {
	if len(k.Files) != j.own() {
		return nil, fmt.Errorf("%d files, want %d: %w", len(k.Files), j.own(), os.ErrInvalid)
	}
	m.groups, m.markedIn = j.Groups, j.MarkedIn
	image, err := s.imageOf(m.image)
	if err != nil {
		return nil, err
	}
	m.release = s.store.hold(j.Digest)
	fs, err := mount.ResumeFanotify(j.from(k.Files, dev), image, s.mountOptions(j.Asked, m.image))
	if err != nil {
		m.release()
		return nil, err
	}
	m.aside = true
	s.aside.count(j.Digest, 1)
	return fs, nil
}

// lose goes on with a mount whose image cannot be opened any more: what is not here is
// EIO. To let go of it would show zeros.
func (s *server) lose(k *keeper.Mount, why error) {
	s.log.Error("a mount cannot be served any more: its readers get EIO", "id", k.ID, "err", why)
	s.mu.Lock()
	s.lost++
	s.mu.Unlock()
	var show MountStatus
	var j journal
	err := errors.Join(json.Unmarshal(k.Show, &show), json.Unmarshal(k.Rest, &j))
	var fs *mount.Mounted
	if len(k.Files) == j.own() {
		from := j.from(k.Files, show.Dev)
		from.In = nil
		var image mount.Image
		for i, id := range j.Segments {
			if segment, ok := s.pool.Segment(id); ok {
				image.Segments, image.Flat = append(image.Segments, segment.Path()), append(image.Flat, 0)
				if i < len(j.MarkedIn) {
					from.In = append(from.In, j.MarkedIn[i])
				}
			}
		}
		fs, err = mount.ResumeFanotify(from, image, mount.Options{Options: fusedev.Options{Logger: s.log}})
	}
	if fs == nil {
		s.log.Error("and they wait until it is gone", "id", k.ID, "err", err) // the files stay open
		return
	}
	go func() {
		<-fs.Done()
		s.keeper.Drop(k.ID)
		s.mu.Lock()
		s.lost--
		s.mu.Unlock()
	}()
}

// serveWatched begins to answer for what was resumed.
func (s *server) serveWatched() {
	mount.ServeFanotify()
	if err := s.aside.apply(s.store, s.pool); err != nil {
		s.log.Error("set room aside for what is mounted", "err", err)
	}
}

// watched tells whether there are mounts whose readers would see zeros without this
// process.
func (s *server) watched() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, m := range s.mounts {
		if m.face == fanotifyFace && m.fs.Served() {
			return true
		}
	}
	return s.lost > 0
}

// lookEvery is how often a mount is looked at of which nothing has come.
const lookEvery = 10 * time.Second

// detachComplete detaches mounts of which all is here.
func (s *server) detachComplete() {
	for _, m := range s.all() {
		if m.face != fanotifyFace || !m.fs.Served() {
			continue
		}
		m.reading.RLock()
		if !m.ended && (m.image.LastMiss().After(m.looked) || time.Since(m.looked) >= lookEvery) {
			m.looked = time.Now()
			s.detach(m)
		}
		m.reading.RUnlock()
	}
}

// detach makes a mount of which all is here one that needs no process. It does nothing
// with others.
func (s *server) detach(m *mounted) {
	if m.face != fanotifyFace || !m.fs.Served() || m.image.Missing().Chunks > 0 {
		return
	}
	if err := s.pool.Sync(); err != nil { // it may be read for long, and nobody would see
		s.log.Error("a mount is not detached", "id", m.id, "err", err)
		return
	}
	m.fs.Release()
	s.telling.Lock()
	m.kept = false
	s.keeper.Drop(m.id)
	s.telling.Unlock()
	s.notAside(m)
	s.log.Info("a mount needs no process any more", "id", m.id, "ref", m.ref)
}

// aside counts the mounts of each image that room is set aside for.
type aside struct {
	mu sync.Mutex // held while that changes
	of map[string]int
}

func (a *aside) count(digest string, n int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.countLocked(digest, n)
}

func (a *aside) countLocked(digest string, n int) {
	if a.of == nil {
		a.of = map[string]int{}
	}
	if a.of[digest] += n; a.of[digest] == 0 {
		delete(a.of, digest)
	}
}

// apply sets aside what is counted, and nothing else.
func (a *aside) apply(s *store, p *pool.Pool) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.applyLocked(s, p)
}

func (a *aside) applyLocked(s *store, p *pool.Pool) error {
	var dirs []string
	for digest := range a.of {
		dirs = append(dirs, filepath.Join(s.path(digest), "linked"))
	}
	refs, err := link.References(dirs...)
	if err != nil {
		return err
	}
	return p.Allocate(refs)
}

// setAside has room for all of a mount's image.
func (s *server) setAside(m *mounted) error {
	a, digest := &s.aside, m.use.ManifestDigest
	a.mu.Lock()
	defer a.mu.Unlock()
	a.countLocked(digest, 1)
	err := a.applyLocked(s.store, s.pool)
	if err != nil {
		a.countLocked(digest, -1)
		err = fmt.Errorf("the face %s needs room for all of the image, %d bytes more: %w", fanotifyFace, m.image.Missing().Content, err)
		return errors.Join(err, a.applyLocked(s.store, s.pool))
	}
	m.aside = true
	return nil
}

// notAside gives back what of a mount's room nobody needs.
func (s *server) notAside(m *mounted) {
	a := &s.aside
	a.mu.Lock()
	defer a.mu.Unlock()
	if !m.aside {
		return
	}
	m.aside = false
	a.countLocked(m.use.ManifestDigest, -1)
	if err := a.applyLocked(s.store, s.pool); err != nil {
		s.log.Error("give room back", "err", err)
	}
}
