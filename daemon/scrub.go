package daemon

import (
	"context"

	"github.com/shale-image/shale/pool"
)

// Scrubbed is the result of Scrub.
type Scrubbed struct {
	pool.Verified
	Problems []pool.Problem `json:"problems"`
}

// Scrub compares every chunk that is here with its digest, in the time that readers
// leave. What is bad is dropped and fetched again: for images that are mounted and
// completed in the background at once, for others when it is read. Below a direct mount
// nothing can be dropped; such problems are told, and found again. Progress is of bytes.
func (c *Client) Scrub(ctx context.Context, progress func(Progress)) (*Scrubbed, error) {
	var out Scrubbed
	if _, err := c.call(ctx, "scrub", nil, &out, progress); err != nil {
		return nil, err
	}
	return &out, nil
}

func (s *server) scrub(ctx context.Context, progress func(Progress)) (*Scrubbed, error) {
	out := &Scrubbed{Problems: []pool.Problem{}}
	var done int64
	total := s.pool.Usage().Present
	pace := func(n int64) error {
		done += n
		progress(Progress{Done: min(done, total), Total: total})
		return s.engine.Quiet(ctx)
	}
	var err error
	for _, seg := range s.pool.Segments() {
		if err = s.scrubSegment(ctx, seg, pace, out); err != nil {
			break
		}
	}
	return out, err
}

// scrubSegment adds to out what a segment has. What is bad, and dropped, is fetched
// again for mounts that are completed.
func (s *server) scrubSegment(ctx context.Context, seg *pool.Segment, pace func(int64) error, out *Scrubbed) error {
	before := len(out.Problems)
	err := s.pool.VerifySegment(ctx, &out.Verified, seg, s.store.shown, pace, func(p pool.Problem) {
		s.log.Error("a chunk has rotted", "segment", p.Segment, "offset", p.Offset, "chunk", p.Chunk, "dropped", p.Dropped, "err", p.Error)
		out.Problems = append(out.Problems, p)
	})
	if len(out.Problems) > before {
		s.completeAgain()
	}
	return err
}

// shown lists what the kernel may read by itself; while it is in use nothing more is
// shown so. What is pinned may go here: it is bad.
func (s *store) shown() (*pool.References, func(), error) {
	c := &s.cache
	c.guard.Lock()
	keep, err := s.keep(false)
	if err != nil {
		c.guard.Unlock()
		return nil, nil, err
	}
	return keep, c.guard.Unlock, nil
}
