package daemon

import (
	"context"
	"io"
	"sync"
	"time"
)

// pace is how layers are read that nobody waits for: like the rest of images (complete.go),
// in the time that readers leave, at the same rate, and in turns with it.
type pace struct {
	quiet func(context.Context) error // returns when no reader waits
	turn  chan struct{}               // has one while somebody fetches
	rate  int64                       // stored bytes a second at most; 0 is without bound
}

// pace is that of this node.
func (s *server) pace() *pace {
	return &pace{s.engine.Quiet, s.completing, int64(s.cfg.Registries.Cache.CompleteRate)}
}

const (
	pacePiece = 64 << 10
	// paceTurn is how long others wait for a piece whose source hangs.
	paceTurn = 3 * time.Second
)

// reader reads r at this pace; a nil pace is r's own.
func (p *pace) reader(ctx context.Context, r io.Reader) io.Reader {
	if p == nil {
		return r
	}
	return &pacedReader{ctx, p, r}
}

type pacedReader struct {
	ctx context.Context
	*pace
	r io.Reader
}

func (r *pacedReader) Read(b []byte) (int, error) {
	if err := r.quiet(r.ctx); err != nil {
		return 0, err
	}
	select {
	case r.turn <- struct{}{}:
	case <-r.ctx.Done():
		return 0, r.ctx.Err()
	}
	give := sync.OnceFunc(func() { <-r.turn })
	defer give()
	defer time.AfterFunc(paceTurn, give).Stop()
	begun := time.Now()
	n, err := r.r.Read(b[:min(len(b), pacePiece)])
	if r.rate > 0 && err == nil {
		due := time.Duration(float64(n) / float64(r.rate) * float64(time.Second))
		if !sleep(r.ctx, time.Until(begun.Add(due))) {
			return n, r.ctx.Err()
		}
	}
	return n, err
}
