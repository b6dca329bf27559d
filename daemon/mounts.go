package daemon

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"os"
	"slices"
	"time"

	"github.com/shale-image/shale/fill"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/mount"
)

// readTimeout is how long a reader waits for bytes before it gets EIO; the
// next read tries again.
const readTimeout = 2 * time.Minute

// mounted is an image that a face shows.
type mounted struct {
	id    string
	ref   string
	where string
	use   *use
	since time.Time
	image *fill.Image
	fs    *mount.Mounted
	face  string
	dev   uint64        // st_dev of what is mounted
	gone  chan struct{} // closed when the mount is no more and all is released
}

// pullImage begins the use of an image and opens it. A linked image that is
// damaged, of another version, or does not fit the pool any more, of which a
// damaged segment was set aside, is linked anew.
func (s *server) pullImage(ctx context.Context, src Source, progress func(Progress)) (*use, *fill.Image, error) {
	for again := false; ; again = true {
		u, err := s.store.pull(ctx, src, func(note string) { progress(Progress{Note: note}) })
		if err != nil {
			return nil, nil, err
		}
		im, err := s.openImage(u)
		if err == nil {
			return u, im, nil
		}
		u.Close()
		if again || !stale(err) {
			return nil, nil, err
		}
		s.log.Warn("linking an image again", "ref", src.Ref, "err", err)
		if err := s.store.forget(u.ManifestDigest); err != nil {
			return nil, nil, err
		}
	}
}

// stale tells whether linking an image again mends an error of opening it.
func stale(err error) bool {
	return errors.Is(err, fill.ErrStale) || errors.Is(err, index.ErrCorrupt) || errors.Is(err, index.ErrUnsupported)
}

func (s *server) openImage(u *use) (*fill.Image, error) {
	l, err := s.store.link(u.record)
	if err != nil {
		return nil, err
	}
	return s.engine.Open(l, source(u.repo))
}

func (s *server) mount(ctx context.Context, a mountArgs, progress func(Progress)) (any, []*os.File, error) {
	u, im, err := s.pullImage(ctx, a.Source, progress)
	if err != nil {
		return nil, nil, err
	}
	fs, face, err := s.show(ctx, u.record, im, a.Place)
	if err != nil {
		return nil, nil, errors.Join(err, im.Close(), u.Close())
	}
	m := &mounted{
		id: newID(), ref: a.Ref, where: a.Where, use: u, since: time.Now(),
		image: im, fs: fs, face: face, dev: fs.Dev(), gone: make(chan struct{}),
	}
	s.mu.Lock()
	s.mounts[m.id] = m
	s.mu.Unlock()
	s.log.Info("mounted", "id", m.id, "ref", m.ref, "where", m.where)
	go s.watch(m)
	out := Mounted{Pulled: u.pulled(a.Ref), ID: m.id, Face: face}
	if fs.FD() == nil {
		return out, nil, nil
	}
	return out, []*os.File{fs.FD()}, nil
}

// watch forgets a mount when the kernel has.
func (s *server) watch(m *mounted) {
	<-m.fs.Done()
	m.fs.Close()
	st := m.image.Stats()
	s.mu.Lock()
	delete(s.mounts, m.id)
	add(&s.ended, st)
	s.mu.Unlock()
	m.image.Close()
	m.use.Close()
	close(m.gone)
	s.log.Info("unmounted", "id", m.id, "ref", m.ref, "requests", st.Requests, "fetched", st.FetchedBytes, "read", st.ReadBytes)
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
	for _, m := range all {
		select {
		case <-m.gone:
		case <-time.After(5 * time.Second):
			s.log.Error("mount did not end", "id", m.id)
		}
	}
}

func (m *mounted) status() MountStatus {
	chunks, bytes := m.image.Missing()
	return MountStatus{
		ID: m.id, Ref: m.ref, ManifestDigest: m.use.ManifestDigest, Where: m.where, Face: m.face,
		Since: m.since, Dev: m.dev, MissingChunks: chunks, MissingBytes: bytes, Fill: m.image.Stats(),
	}
}

func sortMounts(m []MountStatus) {
	slices.SortFunc(m, func(a, b MountStatus) int { return cmp.Or(a.Since.Compare(b.Since), cmp.Compare(a.ID, b.ID)) })
}

func newID() string {
	var b [6]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}
