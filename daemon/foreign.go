package daemon

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/shale-image/shale/fill"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/reader"
	"github.com/shale-image/shale/replace"
)

// An index from elsewhere is somebody's word for what the layers say. Once all of
// an image is here, by whatever way, its layers are read and the word is compared
// with them: by pull --complete, by who meets a chunk that is not what it should be,
// and else in the background, unless nothing is to be fetched there. What is equal is this node's own knowledge from then
// on. What is not is not mounted any more, and those who have it mounted are told.

// How long after a comparison that failed there is no other: at first, and at most.
const (
	comparePause    = time.Minute
	maxComparePause = time.Hour
)

// keepForeign keeps an index that has to be compared with the layers once all of
// them are read.
func (s *store) keepForeign(raw *reader.Raw, dir string) error {
	if raw.Kind == reader.Nydus || raw.Trust == reader.Local {
		return nil
	}
	js, err := json.Marshal(raw)
	if err != nil {
		return err
	}
	if err := replace.File(filepath.Join(dir, foreignFile+".json"), js, 0o600); err != nil || raw.Kind == reader.TOC {
		return err // what others cut cannot be compared
	}
	return keepFile(filepath.Join(dir, foreignFile), io.NewSectionReader(raw.File, 0, raw.Size))
}

// removeForeign removes what was kept of an index that is of no use.
func (s *store) removeForeign(dir string) (err error) {
	for _, name := range []string{foreignFile, foreignFile + ".json", ztocDir} {
		err = errors.Join(err, os.RemoveAll(filepath.Join(dir, name)))
	}
	return err
}

// isForeign tells whether an image is used by an index from elsewhere that can
// be done without.
func (s *store) isForeign(digest string) bool {
	_, err := os.Stat(filepath.Join(s.path(digest), foreignFile+".json"))
	return err == nil
}

// foreign opens what keepForeign kept.
func (s *store) foreign(dir string) (*reader.Raw, error) {
	js, err := os.ReadFile(filepath.Join(dir, foreignFile+".json"))
	if err != nil {
		return nil, err
	}
	raw := &reader.Raw{}
	if err := json.Unmarshal(js, raw); err != nil {
		return nil, err
	}
	raw.Limits, raw.TempDir = s.limits(), dir // as they are now
	raw.File, err = os.Open(filepath.Join(dir, foreignFile))
	return raw, err
}

// reread reads all of an image that is used by an index from elsewhere: its
// content comes into the pool, this node's own index is made, and the other is
// compared with it. It returns how they differ. If they do, or the other cannot be
// used, for which why is the reason, the record says so, and who uses the image next
// does so by this node's. Tables of contents are not compared, and then nothing is made:
// the layers are compared with the image's config. Where nobody waits for it there is no reason but a pace.
func (s *store) reread(ctx context.Context, digest string, repo *image.Repository, why string, slow *pace, progress func(Progress)) (wrong string, err error) {
	unlock, err := s.lock(ctx, digest)
	if err != nil {
		return "", err
	}
	defer unlock()
	dir := s.path(digest)
	rec, err := s.loadRecord(digest)
	if err != nil {
		return "", err // it has been removed
	}
	cut, err := s.cut(rec)
	if err != nil {
		return "", err
	}
	img, err := repo.At(digest).Resolve(ctx, image.Platform{})
	if err != nil {
		return "", err
	}
	foreign, err := s.foreign(dir)
	if err != nil {
		foreign = nil
	} else {
		defer foreign.Close()
	}
	made := dir
	check := why == "" && s.checkable(digest)
	if check {
		made = ""
	}
	out, err := s.read(ctx, repo, img, made, cut, foreign, slow, progress)
	switch {
	case check && (err == nil || errors.Is(err, index.ErrLimit) || errors.Is(err, index.ErrUnsupported)):
		if err != nil { // and never will be
			s.log.Warn("layers cannot be compared with the config of their image", "digest", digest, "err", err)
		}
		if rec, err = s.loadRecord(digest); err != nil { // as it is now
			return "", err
		}
		rec.Checked = true
		return "", s.saveRecord(rec)
	case err == nil:
		release := s.pool.Exclusive()
		err = s.pool.Load()
		release()
		if err != nil {
			return "", err
		}
	case why == "" && errors.Is(err, index.ErrCorrupt) && intact(ctx, repo, img, slow) == nil:
		out.Wrong = err.Error() // it is not the way to them: the layers are no image, or not this one
	default:
		return "", err
	}
	if rec, err = s.loadRecord(digest); err != nil {
		return "", err
	}
	rec.Wrong = out.Wrong
	equal := why == "" && foreign != nil && out.Wrong == ""
	if equal {
		rec.Index, rec.Key = reader.Local, ""
	} else {
		rec.Doubted = cmp.Or(out.Wrong, why, "it has been read as a whole")
	}
	if err := s.saveRecord(rec); err != nil || !equal {
		return out.Wrong, err
	}
	return "", errors.Join(os.RemoveAll(filepath.Join(dir, foreignFile)), os.RemoveAll(filepath.Join(dir, foreignFile+".json")))
}

// cut returns at which multiples files were cut of what an image was linked to: who has it
// mounted finds only content that is cut likewise, whoever has made its index, and when.
func (s *store) cut(rec *record) (uint32, error) {
	l, err := s.link(rec)
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return reader.CutLike(l.Chunks(), func(i int) uint32 { return l.Chunk(i).Size }), nil
}

// intact returns nil if all layers can be had as the manifest has them.
func intact(ctx context.Context, repo *image.Repository, img *image.Image, slow *pace) error {
	for _, l := range img.Layers {
		body, err := repo.Blob(ctx, l)
		if err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, slow.reader(ctx, body))
		if err := errors.Join(err, body.Close()); err != nil {
			return err
		}
	}
	return nil
}

// compareComplete has the images compared that are mounted, if nothing more of them
// has come for a moment and all of them is here.
func (s *server) compareComplete() {
	now := time.Now()
	for _, m := range s.all() {
		m.reading.RLock()
		if !m.ended {
			if n := m.image.Stats().Chunks; n != m.chunks {
				m.chunks, m.compare = n, now
			} else if !now.Before(m.compare) {
				m.pause = min(max(comparePause, 2*m.pause), maxComparePause)
				m.compare = now.Add(m.pause)
				if s.completes(m) {
					s.compare(m.use, m.image)
				}
			}
		}
		m.reading.RUnlock()
	}
}

// compare begins to compare the index of an image with its layers, unless that has
// been done, or not all of the image is here.
func (s *server) compare(u *use, im *fill.Image) {
	digest := u.ManifestDigest
	if !s.store.comparable(digest) && !s.store.checkable(digest) || im.Missing().Chunks > 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ending {
		return
	}
	ctx, end := s.store.beginComparison(s.life, digest)
	if ctx == nil {
		return
	}
	s.background.Go(func() {
		defer end()
		repo, err := u.open(ctx)
		if err != nil {
			s.log.Warn("an index was not compared with its image", "digest", digest, "err", err)
			return
		}
		defer repo.Close()
		wrong, err := s.store.reread(ctx, digest, repo, "", s.pace(), func(Progress) {})
		switch {
		case wrong != "":
			s.log.Error("an index lies", "digest", digest, "how", wrong)
		case err == nil:
			s.log.Info("the layers of an image were compared with what is said about them", "digest", digest)
		case ctx.Err() == nil && !errors.Is(err, os.ErrNotExist):
			s.log.Warn("an index was not compared with its image, and will be", "digest", digest, "err", err)
		}
	})
}

// comparable tells whether an image is used by an index from elsewhere that nobody
// has compared with the layers yet.
func (s *store) comparable(digest string) bool {
	if _, err := os.Stat(filepath.Join(s.path(digest), foreignFile)); err != nil {
		return false
	}
	rec, err := s.loadRecord(digest)
	return err == nil && rec.Doubted == ""
}

// checkable tells whether an image is used by tables of contents, and nobody has seen yet
// whether its layers are those of its config.
func (s *store) checkable(digest string) bool {
	rec, err := s.loadRecord(digest)
	return err == nil && rec.Kind == reader.TOC && !rec.Checked && rec.Doubted == ""
}

// usable tells whether an image whose index turned out to be wrong can be had
// otherwise: by the index that this node has made, once nobody uses the other.
func (s *store) usable(rec *record) error {
	if _, err := os.Stat(filepath.Join(s.path(rec.ManifestDigest), indexFile)); err != nil {
		return index.Errorf(index.ErrCorrupt, rec.ManifestDigest, -1, "the image is not what it says: %s", rec.Wrong)
	}
	if err := s.unused(rec.ManifestDigest); err != nil {
		return errors.Join(index.Errorf(index.ErrCorrupt, rec.ManifestDigest, -1, "the index it is mounted by is wrong: %s", rec.Wrong), err)
	}
	return nil
}

// comparison is one that is under way.
type comparison struct {
	cancel context.CancelFunc
	done   chan struct{}
}

// beginComparison returns no context if the image is being compared.
func (s *store) beginComparison(ctx context.Context, digest string) (context.Context, func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.comparing[digest] != nil {
		return nil, nil
	}
	ctx, cancel := context.WithCancel(ctx)
	c := &comparison{cancel, make(chan struct{})}
	s.comparing[digest] = c
	return ctx, func() {
		cancel()
		s.mu.Lock()
		delete(s.comparing, digest)
		s.mu.Unlock()
		close(c.done)
	}
}

// compares tells whether an image is being compared.
func (s *store) compares() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.comparing) > 0
}

// breakOff ends the comparison of an image for those who cannot wait for it.
func (s *store) breakOff(digest string) {
	s.mu.Lock()
	c := s.comparing[digest]
	s.mu.Unlock()
	if c != nil {
		c.cancel()
		<-c.done
	}
}
