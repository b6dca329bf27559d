package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/shale-image/shale/config"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/reader"
	"github.com/shale-image/shale/replace"
)

// sharedIndexFile says, in the directory of an image, what became of sharing the index
// that this node has made of it.
const sharedIndexFile = indexFile + ".shared"

// sharedIndex is its content.
type sharedIndex struct {
	Artifact string    `json:"artifact,omitempty"` // digest of what lies there; "": it failed
	Pushed   bool      `json:"pushed"`             // by this node
	Tried    time.Time `json:"tried"`
}

const (
	// shareAgain is how long after a failure there is no other attempt, however often
	// the image is used: who may not push may not soon.
	shareAgain = time.Hour

	// shareTime bounds one attempt. An index has 256 MiB at most, mostly 1.
	shareTime = 10 * time.Minute
)

// shareIndex begins to push the index of an image, if this node has made it because
// there was none, if that is wanted, and if it was not done before. The image is used
// meanwhile, and nobody waits for it.
func (s *server) shareIndex(u *use, src Source) {
	if !src.ShareIndex && s.cfg.Registries.Indexes != config.IndexesShare {
		return
	}
	digest := u.ManifestDigest
	if u.Index != reader.Local || u.Kind != reader.Index || src.Unasked || !u.repo.Ref().Writable() || !s.store.shareable(digest) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ending {
		return
	}
	s.pushing.Add(1)
	s.background.Go(func() {
		defer s.pushing.Add(-1)
		ctx, cancel := context.WithTimeout(context.Background(), shareTime)
		defer cancel()
		defer context.AfterFunc(s.life, func() { time.AfterFunc(flushTime, cancel) })()
		s.pushOne.Lock() // one after the other
		defer s.pushOne.Unlock()
		if !s.store.shareable(digest) {
			return // somebody else has
		}
		out := sharedIndex{Tried: time.Now().UTC().Round(0)}
		js, err := s.pushBeside(ctx, src, shareOrder{Manifest: digest, Dir: s.store.path(digest)})
		if err == nil {
			err = json.Unmarshal(js, &out)
		}
		switch {
		case err != nil:
			s.log.Warn("an index could not be shared", "ref", src.Ref, "digest", digest, "err", err)
		case out.Pushed:
			s.log.Info("an index was pushed", "ref", src.Ref, "digest", digest, "artifact", out.Artifact)
		default:
			s.log.Info("an index lies there already", "ref", src.Ref, "digest", digest, "artifact", out.Artifact)
		}
		if js, err = json.Marshal(out); err == nil {
			err = replace.File(filepath.Join(s.store.path(digest), sharedIndexFile), js, 0o600)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // or the image was removed meanwhile
			s.log.Warn("it is not known that an index was shared", "digest", digest, "err", err)
		}
	})
}

// shareable tells whether this node has an index of its own of an image that should be
// pushed now.
func (s *store) shareable(digest string) bool {
	if _, err := os.Stat(filepath.Join(s.path(digest), indexFile)); err != nil {
		return false
	}
	var done sharedIndex
	js, err := os.ReadFile(filepath.Join(s.path(digest), sharedIndexFile))
	if err != nil || json.Unmarshal(js, &done) != nil {
		return true
	}
	return done.Artifact == "" && time.Since(done.Tried) > shareAgain
}

// pushIndex pushes the index that is in a directory.
func (o *shareOrder) pushIndex(ctx context.Context, repo *image.Repository, img *image.Image) (out sharedIndex, err error) {
	raw, err := localIndex(o.Dir, o.Manifest, img.Layers, limits(o.Registries))
	if err != nil {
		return out, err
	}
	defer raw.Close()
	var side *os.File
	if raw.Side.Size > 0 {
		_, hex, _ := strings.Cut(raw.Side.Digest, ":")
		if side, err = os.Open(filepath.Join(o.Dir, sideDir, hex)); err != nil {
			return out, err
		}
		defer side.Close()
	}
	out.Artifact, out.Pushed, err = raw.Share(ctx, repo, img, side)
	out.Tried = time.Now().UTC().Round(0)
	return out, err
}
