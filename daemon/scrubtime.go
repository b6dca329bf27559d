package daemon

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"time"

	"github.com/shale-image/shale/replace"
)

// All that is kept is verified once in a while (config.Cache.Scrub), in the time that
// readers leave, and no faster than scrubRate. A service that ends, as those do that a
// command has started, goes on where the last one was.

const (
	scrubFile = "scrub.json" // in the root directory: a scrubTime
	scrubRate = 32 << 20     // bytes a second: a fourth of what a slow disk reads
	// scrubAfter is how long a service lets its first mounts have the disk.
	scrubAfter = 5 * time.Minute
)

// scrubTime is how far the pool has been verified.
type scrubTime struct {
	Finished time.Time `json:"finished"`       // all of it, last; in a new root directory when that was made
	Next     uint32    `json:"next,omitempty"` // the first segment that is still to be verified of what has begun
}

func (s *server) scrubState() (st scrubTime, err error) {
	path := filepath.Join(s.cfg.Root, scrubFile)
	p, err := os.ReadFile(path)
	if err == nil && json.Unmarshal(p, &st) == nil && st.Finished.Before(time.Now()) {
		return st, nil
	}
	// Nothing is known: it need not be now.
	st = scrubTime{Finished: time.Now()}
	return st, s.keepScrub(st)
}

func (s *server) keepScrub(st scrubTime) error {
	js, err := json.Marshal(st)
	if err != nil {
		return err
	}
	return replace.File(filepath.Join(s.cfg.Root, scrubFile), js, 0o600)
}

// scrubInTime verifies the pool whenever it is time to, until ctx ends.
func (s *server) scrubInTime(ctx context.Context) {
	every := s.cfg.Registries.Cache.ScrubEvery()
	if every == 0 {
		return
	}
	st, err := s.scrubState()
	for err == nil {
		due := max(time.Until(st.Finished.Add(every)), time.Until(s.started.Add(min(scrubAfter, every))))
		if !sleep(ctx, max(due, 0)) {
			return
		}
		st, err = s.scrubOn(ctx, st)
	}
	if ctx.Err() == nil {
		s.log.Error("the pool is not verified any more", "err", err)
	}
}

// scrubOn verifies what is still to be verified of the pool.
func (s *server) scrubOn(ctx context.Context, st scrubTime) (scrubTime, error) {
	out := &Scrubbed{}
	pace := func(n int64) error {
		if !sleep(ctx, time.Duration(n)*time.Second/scrubRate) {
			return ctx.Err()
		}
		return s.engine.Quiet(ctx)
	}
	for _, seg := range s.pool.Segments() {
		if seg.ID < st.Next {
			continue
		}
		if err := s.scrubSegment(ctx, seg, pace, out); err != nil {
			return st, err
		}
		st.Next = seg.ID + 1
		if err := s.keepScrub(st); err != nil {
			return st, err
		}
	}
	st = scrubTime{Finished: time.Now()}
	s.log.Info("the pool is verified", "chunks", out.Chunks, "bytes", out.Bytes, "problems", len(out.Problems))
	return st, s.keepScrub(st)
}
