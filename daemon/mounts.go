package daemon

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/shale-image/shale/config"
	"github.com/shale-image/shale/fill"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/mount"
	"github.com/shale-image/shale/reader"
)

// mounted is an image that a face shows.
type mounted struct {
	id       string
	ref      string
	where    string
	asked    mountArgs
	use      *use
	since    time.Time
	image    *fill.Image
	landing  *landing
	rest     *completion
	release  func() // lets what the kernel reads without us be evicted
	fs       *mount.Mounted
	face     string
	dev      uint64 // st_dev of what is mounted
	number   uint64 // of its FUSE file system, if it is kept
	kept     bool   // it outlives this process
	aside    bool   // room for all of it is set aside; watched.go
	groups   int    // of mount.Watching, and its In
	markedIn []int
	looked   time.Time     // when it was last seen whether all of it is here; detachComplete's
	before   totals        // what earlier workers have counted
	told     totals        // what the keeper has of what was counted; keepCounts'
	gone     chan struct{} // closed when the mount is no more and all is released

	reading sync.RWMutex // held while image is asked for its status
	ended   bool         // image is closed

	chunks  int64     // brought when it was last looked at
	compare time.Time // when to see again whether all of it is here
	pause   time.Duration
}

// pullImage begins the use of an image and opens it. A linked image that is
// damaged, of another version, or does not fit the pool any more, of which a
// damaged segment was set aside, is linked anew.
func (s *server) pullImage(ctx context.Context, src Source, start *reader.Start, progress func(Progress)) (*use, *fill.Image, error) {
	for again := false; ; again = true {
		u, err := s.store.pull(ctx, src, start, progress)
		if err != nil {
			return nil, nil, err
		}
		im, err := s.openImage(u)
		if err == nil {
			missing := im.Missing().Chunks > 0
			if missing && src.Unasked {
				return nil, nil, errors.Join(fmt.Errorf("%s: not all of it is here: %w", src.Ref, ErrUnasked), im.Close(), u.Close())
			}
			if missing && u.Whole {
				if err := readWhole(ctx, im, progress); err != nil {
					return nil, nil, errors.Join(err, im.Close(), u.Close())
				}
				missing = false
			}
			if missing { // else nobody is asked for anything
				u.openPack(ctx, start)
			}
			s.shareIndex(u, src)
			return u, im, nil
		}
		u.Close()
		if again || !stale(err) {
			return nil, nil, err
		}
		s.log.Warn("linking an image again", "ref", src.Ref, "err", err)
		if err := s.store.forget(ctx, u.ManifestDigest); err != nil {
			return nil, nil, err
		}
	}
}

// readWhole brings what is missing of an image in the only way there is.
func readWhole(ctx context.Context, im *fill.Image, progress func(Progress)) error {
	var done atomic.Int64
	total := im.Missing().Content
	return im.Whole(ctx, func(n int64) { progress(Progress{Done: done.Add(n), Total: total}) })
}

// stale tells whether linking an image again mends an error of opening it.
func stale(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, fill.ErrStale) || errors.Is(err, index.ErrCorrupt) || errors.Is(err, index.ErrUnsupported)
}

func (s *server) openImage(u *use) (*fill.Image, error) {
	l, err := s.store.link(u.record)
	if err != nil {
		return nil, err
	}
	im, err := s.engine.Open(l, u.origin)
	if err == nil && u.Index != "" { // else it is a record of old, of a Nydus image
		if u.Index == reader.Local || s.store.isForeign(u.ManifestDigest) {
			im.OnWrongIndex(func(ctx context.Context) error {
				s.log.Warn("an index is wrong, or of no use: all of the image is read", "ref", u.repo.Ref().String(), "digest", u.ManifestDigest)
				wrong, err := s.store.reread(ctx, u.ManifestDigest, u.repo, "it could not be read by its index", nil, func(Progress) {})
				if wrong != "" {
					s.log.Error("an index lies", "digest", u.ManifestDigest, "how", wrong)
				}
				return err
			})
			im.OnOrigin(origins(filepath.Join(s.store.path(u.ManifestDigest), originsFile)))
		}
	}
	return im, err
}

func (s *server) mount(ctx context.Context, a mountArgs, progress func(Progress)) (any, []*os.File, error) {
	start := a.start()
	if a.Rehearsal {
		a.ReadAheadKiB = packReadAhead
	}
	u, im, err := s.pullImage(ctx, a.Source, start, progress)
	if err != nil {
		return nil, nil, err
	}
	l := s.land(u, im, start)
	l.wait(ctx)
	if u.packed && a.ReadAheadKiB == 0 {
		a.ReadAheadKiB, a.Quiet = packReadAhead, true
	}
	if a.ShareTraces && !s.keepsTraces() {
		progress(Progress{Note: `what is read is not shared: "traces" is "off" in the configuration of the node service`})
	}
	toShare := a.ShareTraces
	a.ShareTraces = a.ShareTraces || s.cfg.Registries.Traces == config.TracesShare
	m := &mounted{ // with all of it held, or what is complete now is not when it is mounted
		id: newID(), ref: a.Ref, where: a.Where, asked: a, use: u, since: time.Now(),
		image: im, landing: l, release: s.store.hold(u.ManifestDigest), gone: make(chan struct{}),
	}
	if !a.AnyCommand && !u.packed { // a pack knows better
		im.Runs(u.program(a.Command))
	}
	shown, face, err := s.show(ctx, m, a)
	if m.kept && (err != nil || face != m.face) { // it was only tried
		s.keeper.Drop(m.id)
		m.kept = false
	}
	if err != nil {
		s.notAside(m)
		m.release()
		l.stop()
		return nil, nil, errors.Join(err, im.Close(), u.Close())
	}
	if !shown.ReadsSegments() { // else what is here has to stay
		m.release()
	}
	m.fs, m.face, m.dev = shown, face, shown.Dev()
	if toShare && !shown.Served() {
		progress(Progress{Note: "what is read is not shared: with the face " + face + " nobody sees it; --face device records it"})
	}
	m.rest = s.complete(m)
	s.mu.Lock()
	s.mounts[m.id] = m
	s.mu.Unlock()
	s.log.Info("mounted", "id", m.id, "ref", m.ref, "where", m.where)
	if !u.packed { // which knows better
		im.Prefetch()
	}
	if m.kept {
		if err := s.keepMount(m, nil); err != nil {
			s.log.Error("keep a mount", "id", m.id, "err", err)
		}
	}
	go s.watch(m)
	if m.asked.Quiet {
		go m.awaitStart()
	}
	if ctx.Err() != nil { // the client is gone, or the service ends
		return nil, nil, errors.Join(ctx.Err(), shown.Abort(), shown.Close())
	}
	out := Mounted{Pulled: u.pulled(a.Ref), ID: m.id, Face: face}
	if shown.FD() == nil {
		return out, nil, nil
	}
	return out, []*os.File{shown.FD()}, nil
}

// endStart gives a mount that was made for a start pack the readahead of others.
func (m *mounted) endStart() {
	m.fs.SetReadAhead(mount.ReadAhead)
	m.fs.Steady()
}

// watch forgets a mount when the kernel has.
func (s *server) watch(m *mounted) {
	<-m.fs.Done()
	m.fs.Close()
	s.keeper.Drop(m.id)
	t := m.totals()
	if s.keepsTraces() && !m.asked.Unrecorded {
		s.keepLater(m.recording()) // before anybody sees that it is gone
	}
	s.mu.Lock()
	delete(s.mounts, m.id)
	s.ended.add(t)
	s.mu.Unlock()
	m.landing.stop()
	m.rest.stop()
	if !m.fs.Served() {
		m.image.Touch() // nobody has seen what was read
	}
	m.release()
	if s.completes(m) {
		s.compare(m.use, m.image)
	}
	m.reading.Lock()
	m.ended = true
	m.image.Close()
	m.reading.Unlock()
	s.notAside(m)
	m.use.Close()
	close(m.gone)
	s.log.Info("unmounted", "id", m.id, "ref", m.ref, "requests", t.origin.Requests, "fetched", t.origin.Bytes, "read", t.fill.ReadBytes, "pack", t.fill.PackBytes, "pack_waits", t.fill.PackWaits, "stalls", t.fill.Stalls)
}

// endMounts aborts what is still mounted when the service ends: its readers
// get EIO.
func (s *server) endMounts() {
	s.mu.Lock()
	var all []*mounted
	for _, m := range s.mounts {
		if m.fs.Served() { // others do not need us
			all = append(all, m)
		}
	}
	s.mu.Unlock()
	for _, m := range all {
		s.log.Warn("ending with an image mounted", "id", m.id, "where", m.where)
		m.fs.Abort()
	}
	late := time.After(5 * time.Second)
	for _, m := range all {
		select {
		case <-m.gone:
		case <-late:
			s.log.Error("mounts did not end")
			return
		}
	}
}

// status is false if the mount has just ended.
func (m *mounted) status() (MountStatus, bool) {
	m.reading.RLock()
	defer m.reading.RUnlock()
	if m.ended {
		return MountStatus{}, false
	}
	missing := m.image.Missing()
	all, wrong := m.totals(), ""
	if rec, err := m.use.store.loadRecord(m.use.ManifestDigest); err == nil && m.use.Index != reader.Local {
		wrong = rec.Wrong
	}
	incomplete := ""
	if missing.Chunks > 0 {
		_, incomplete = m.rest.coming()
	}
	return MountStatus{
		ID: m.id, Ref: m.ref, ManifestDigest: m.use.ManifestDigest, Platform: m.use.Platform, Where: m.where, Face: m.face,
		Since: m.since, Dev: m.dev, ContentBytes: m.image.ContentBytes(), MissingChunks: missing.Chunks, MissingBytes: missing.Stored,
		Survives: missing.Chunks == 0, Detached: m.fs != nil && !m.fs.Served(),
		Incomplete: incomplete, Wrong: wrong, Fill: all.fill, Source: all.origin,
	}, true
}

// totals is what was counted of the mount, by all workers that have served it.
func (m *mounted) totals() totals {
	t := totals{m.image.Stats(), m.use.origin.stats()}
	t.add(m.before)
	return t
}

func sortMounts(m []MountStatus) {
	slices.SortFunc(m, func(a, b MountStatus) int { return cmp.Or(a.Since.Compare(b.Since), cmp.Compare(a.ID, b.ID)) })
}

func newID() string {
	var b [6]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}
