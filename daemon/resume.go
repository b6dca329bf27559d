package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"reflect"

	"github.com/shale-image/shale/fill"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/keeper"
	"github.com/shale-image/shale/mount"
	"github.com/shale-image/shale/mount/fusedev"
)

// A worker may die at any moment. The next one has the pool, the linked images, and
// for each mount of the faces device and fanotify its descriptors and a journal: what
// was asked for and of which image it was made. Mounts of the face fuse end with the
// worker, and direct ones need none.

// The faces whose mounts outlive a worker.
const (
	deviceFace   = "device"
	fanotifyFace = "fanotify" // watched.go
)

// journal is what a worker has to know to serve a mount on.
type journal struct {
	Asked   mountArgs    `json:"asked"`            // with credentials: they are nowhere on disk
	Caller  *keeper.Peer `json:"caller,omitempty"` // who asked
	Digest  string       `json:"digest"`
	MetaSum string       `json:"meta_blake3"` // of the linked image, whose addresses readers use
	Number  uint64       `json:"number"`
	BDI     string       `json:"bdi,omitempty"`

	// Of the face fanotify: whose data files come behind mount.Watching's; how many groups
	// that has, its In, and its ID.
	Segments []uint32 `json:"segments,omitempty"`
	Groups   int      `json:"groups,omitempty"`
	MarkedIn []int    `json:"marked_in,omitempty"`
	Watching int32    `json:"watching,omitempty"`
}

// keepMount has a mount kept. files are what it needs the first time, and nil when the
// mount has been made.
func (s *server) keepMount(m *mounted, files []*os.File) error {
	show, ok := m.status()
	if !ok {
		return nil // it has just ended
	}
	j := journal{Asked: m.asked, Caller: m.asked.caller, Digest: m.use.ManifestDigest, MetaSum: m.image.Linked().MetaSum, Number: m.number}
	j.Asked.Credentials = s.store.newest(m.asked.Source)
	k := keeper.Mount{ID: m.id, Settled: files == nil, Files: files}
	if m.face == fanotifyFace {
		// To make it nothing is read that this process has to bring.
		k.Settled, k.Held = true, true
		for _, ls := range m.image.Linked().Segments {
			j.Segments = append(j.Segments, ls.ID)
		}
		j.Groups, j.MarkedIn = m.groups, m.markedIn
	}
	if files == nil {
		j.BDI, j.Watching = m.fs.BDI(), m.fs.Watching().ID
	}
	var err, jerr error
	k.Show, err = json.Marshal(show)
	k.Rest, jerr = json.Marshal(j)
	if err = errors.Join(err, jerr); err != nil {
		return err
	}
	return s.keeper.Keep(k)
}

// resume serves a mount on that another worker has made. If that cannot be done its
// readers get EIO.
func (s *server) resume(ctx context.Context, k *keeper.Mount) {
	m, err := s.reopen(ctx, k)
	if err != nil && k.Held {
		s.lose(k, err)
		return
	}
	if err != nil {
		s.log.Error("a mount cannot be served any more: its readers get EIO", "id", k.ID, "err", err)
		k.Abort()
		closeAll(k.Files)
		s.keeper.Drop(k.ID)
		return
	}
	m.landing = s.land(m.use, m.image, m.asked.start())
	m.rest = s.complete(m)
	s.mu.Lock()
	s.mounts[m.id] = m
	s.mu.Unlock()
	if !k.Settled { // nobody else will say so
		if err := s.keepMount(m, nil); err != nil {
			s.log.Error("keep a mount", "id", m.id, "err", err)
		}
	}
	go s.watch(m)
	if m.asked.Quiet {
		go m.awaitStart()
	}
}

func (s *server) reopen(ctx context.Context, k *keeper.Mount) (_ *mounted, err error) {
	var show MountStatus
	var j journal
	if err := errors.Join(json.Unmarshal(k.Show, &show), json.Unmarshal(k.Rest, &j)); err != nil {
		return nil, fmt.Errorf("its journal: %w", err)
	}
	j.Asked.caller = j.Caller
	if !k.Held && len(k.Files) != 2 {
		return nil, fmt.Errorf("%d files, want 2: %w", len(k.Files), os.ErrInvalid)
	}
	u, err := s.store.reopen(ctx, j.Asked.Source, j.Digest)
	if err != nil {
		return nil, err
	}
	im, err := s.openImage(u)
	if err != nil {
		return nil, errors.Join(err, u.Close())
	}
	if im.Missing().Chunks > 0 {
		u.openPack(ctx, j.Asked.start()) // unless all of it has come
	}
	if sum := im.Linked().MetaSum; sum != j.MetaSum {
		return nil, errors.Join(fmt.Errorf("the image was linked anew: %w", fill.ErrStale), im.Close(), u.Close())
	}
	m := &mounted{
		id: k.ID, ref: show.Ref, where: show.Where, asked: j.Asked, use: u, since: show.Since, image: im,
		release: func() {}, face: show.Face, dev: show.Dev, number: j.Number, gone: make(chan struct{}),
		kept: true, before: totals{show.Fill, show.Source},
	}
	if k.Held {
		m.fs, err = s.resumeWatched(m, k, show.Dev, &j)
	} else {
		m.fs, err = mount.Resume(mount.Connection{Dev: k.Files[0], Abort: k.Files[1], Number: j.Number, ImageDev: show.Dev, BDI: j.BDI}, im, s.mountOptions(j.Asked, im))
	}
	if err != nil {
		return nil, errors.Join(err, im.Close(), u.Close())
	}
	return m, nil
}

// mountOptions are those of a mount of an image.
func (s *server) mountOptions(a mountArgs, im *fill.Image) mount.Options {
	o := mount.Options{Dir: a.Dir, ReadAheadKiB: a.ReadAheadKiB, Options: fusedev.Options{ReadTimeout: s.cfg.Registries.ReadWait() + readSlack, Logger: s.log, Name: "shale"}}
	o.Buffered = a.Quiet || a.Rehearsal
	if a.Quiet {
		o.Around = im
	}
	return o
}

// reopen begins the use of an image that is mounted.
func (s *store) reopen(ctx context.Context, src Source, digest string) (*use, error) {
	ref, err := image.ParseRef(src.Ref)
	if err != nil {
		return nil, err
	}
	open := s.opens(ref, src)
	repo, err := open(ctx)
	if err != nil {
		return nil, err
	}
	rec, err := s.load(digest)
	if err != nil {
		return nil, errors.Join(err, repo.Close())
	}
	s.mu.Lock()
	s.uses[digest]++
	s.mu.Unlock()
	u := s.newUse(rec, repo)
	u.open = open
	return u, nil
}

// keepCounts has what was counted of mounts kept, where it is news: at every sync of
// the pool, so a death costs no more of it.
func (s *server) keepCounts() {
	s.telling.Lock()
	defer s.telling.Unlock()
	for _, m := range s.all() {
		if t := m.totals(); m.kept && !reflect.DeepEqual(t, m.told) {
			m.told = t
			if err := s.keepMount(m, nil); err != nil {
				s.log.Error("keep what was counted of a mount", "id", m.id, "err", err)
			}
		}
	}
}

// check returns when nothing that all readers and callers need is held for good.
func (s *server) check() {
	if !s.opened.Load() {
		return
	}
	s.all()
	s.store.hasName("")
	s.pool.Segment(0)
	s.engine.Flights()
}

// obey carries out what the keeper wants.
func (s *server) obey() {
	for o := range s.keeper.Orders {
		switch o {
		case keeper.Leave:
			s.leave()
		case keeper.Stop:
			s.stop()
		}
	}
	s.log.Error("the keeper is dead: nobody will take over if this process dies, too")
	close(s.alone)
}

// leave makes this process exit, and leave the mounts to another worker. Without a
// keeper there is none.
func (s *server) leave() {
	if s.keeper.Keeper() == 0 && s.watched() {
		s.log.Error("not ending: readers of a mount of the face fanotify would see zeros", "pid", os.Getpid())
		return
	}
	s.mu.Lock()
	s.leaves = s.keeper.Keeper() != 0
	s.ending = true
	s.mu.Unlock()
	s.stop()
}

func (s *server) leaving() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.leaves
}

// handOver keeps what the next worker cannot know, while this one still serves. Reads
// that are under way then are asked again of the next.
func (s *server) handOver() error {
	if s.keepsTraces() {
		for _, m := range s.all() {
			if !m.fs.Served() || m.asked.Unrecorded {
				continue
			}
			m.reading.RLock()
			if !m.ended {
				r := m.recording()
				r.share = nil // the rest of it is to come
				s.keepLater(r)
			}
			m.reading.RUnlock()
		}
	}
	s.keepCounts()
	s.traces.flush()
	s.sharing.flush()
	err := s.pool.Sync()
	s.log.Info("another worker takes over", "pid", os.Getpid())
	return err // nothing is closed: threads still read from it until this process has exited
}
