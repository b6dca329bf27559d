package daemon

import (
	"context"
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/pool"
)

// Segments of which all is here are verified, and then sealed where the file system of the
// pool has fs-verity: what the kernel reads without this service it then compares too. It
// is done when nobody waits, by one process at a time that is killed as soon as somebody
// wants to change the segment. A sealed segment of which something is missing is unsealed,
// once the kernel does not show it. Here is looked for both.

const (
	sealLook  = 10 * time.Second // how often is looked
	sealLater = 10 * time.Minute // and how long not at a segment where it could not be done
)

// sealInTime does that until ctx ends.
func (s *server) sealInTime(ctx context.Context) {
	later := map[uint32]time.Time{}
	for sleep(ctx, sealLook) {
		for _, seg := range s.pool.Segments() {
			// Segments that are marked must not be opened anew (watched.go).
			if seg.Sealed() == seg.Complete() || time.Now().Before(later[seg.ID]) || s.watched() {
				continue
			}
			s.sealing.Store(true)
			err := s.sealOrUnseal(ctx, seg)
			s.sealing.Store(false)
			if ctx.Err() != nil {
				return
			}
			if err != nil && !errors.Is(err, errCannotSeal) {
				s.log.Warn("a segment cannot be sealed or unsealed now", "segment", seg.Path(), "err", err)
			}
			if err != nil {
				later[seg.ID] = time.Now().Add(sealLater)
			}
		}
	}
}

var errCannotSeal = errors.New("the file system has no fs-verity")

func (s *server) sealOrUnseal(ctx context.Context, seg *pool.Segment) error {
	if seg.Sealed() {
		return s.pool.Unseal(ctx, seg, s.store.shown)
	}
	if !seg.CanSeal() {
		return errCannotSeal
	}
	pace := func(int64) error { return s.engine.Quiet(ctx) }
	if err := pace(0); err != nil {
		return err
	}
	if err := s.scrubSegment(ctx, seg, pace, &Scrubbed{}); err != nil {
		return err
	}
	err := s.pool.Seal(ctx, seg, func(ctx context.Context, f *os.File) error {
		return s.store.child(ctx, "shale-sealer", nil, f)
	})
	if err == nil && seg.Sealed() {
		s.log.Info("a segment is sealed", "segment", seg.Path(), "bytes", seg.Size)
	}
	return err
}

// sealer is the process that seals a segment. Others go first.
func sealer() error {
	const idle = 3 << 13 // ioprio_set(2): IOPRIO_CLASS_IDLE
	_ = unix.Setpriority(unix.PRIO_PROCESS, 0, 19)
	_, _, _ = unix.Syscall(unix.SYS_IOPRIO_SET, 1, 0, idle)
	return pool.EnableVerity(os.NewFile(firstFile, "segment"))
}

// rotten is told of what a reader has found that the disk has changed.
func (s *server) rotten(p pool.Problem) {
	s.log.Error("a chunk has rotted", "segment", p.Segment, "offset", p.Offset, "chunk", p.Chunk, "dropped", p.Dropped, "err", p.Error)
	s.completeAgain()
}

// completeAgain has mounts completed of which something may be missing again.
func (s *server) completeAgain() {
	for _, m := range s.all() {
		m.rest.more()
	}
}
