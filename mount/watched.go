package mount

import (
	"context"
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/mount/fanotify"
	"github.com/shale-image/shale/mount/fusedev"
)

// watches are the mounts of Fanotify in this process. Images share segments, and which
// mount a read is of nobody tells: so it may go on when all bytes that it wants are
// there, whoever brought them.
var watches = watchSet{live: map[*watched]bool{}, files: map[fanotify.File]*watchedFile{}}

type watchSet struct {
	mu     sync.RWMutex
	live   map[*watched]bool // mounts whose reads are asked for
	files  map[fanotify.File]*watchedFile
	groups []*watchGroup // what these hold
	ends   superWatch
	taken  []func() // to be done when the groups that were taken over are answered
}

// watchedFile is a segment that is marked.
type watchedFile struct {
	file  *os.File
	group *watchGroup        // once, or its readers would be asked for more than once
	by    map[*watched]int64 // mounts that want it marked, and its flat address in them
}

// watched is a mount of Fanotify.
type watched struct {
	fill    Filler // nil: nobody knows what its bytes are
	files   []fanotify.File
	groups  []*watchGroup // that must not end before it
	own     *watchGroup   // of them, where its files are marked; nil while it needs none
	in      []int         // which of them each segment is
	timeout time.Duration
	ctx     context.Context // until it is aborted, or no more
	cancel  context.CancelFunc
	done    chan struct{}
	id      int32 // of its end in watches.ends

	late                 atomic.Pointer[lateness]
	brings               sync.WaitGroup // in which fill is used; begun with watches.mu held
	needs                atomic.Bool    // this process, until it is released
	hits, misses, errors atomic.Int64
}

func newWatched(f Filler, o Options) *watched {
	w := &watched{fill: f, timeout: o.ReadTimeout, done: make(chan struct{})}
	if w.timeout <= 0 {
		w.timeout = time.Minute
	}
	w.ctx, w.cancel = context.WithCancel(context.Background())
	return w
}

func (w *watched) stats() fusedev.Stats {
	return fusedev.Stats{Hits: w.hits.Load(), Misses: w.misses.Load(), Errors: w.errors.Load()}
}

// begin has reads of a mount's segments asked for.
func (s *watchSet) begin(w *watched, im Image, o Options) error {
	s.mu.Lock()
	s.live[w] = true
	err := s.enter(w, im, func(int) (*watchGroup, error) { return s.groupFor(w, o) })
	s.mu.Unlock()
	if err != nil {
		s.drop(w)
	}
	return err
}

// enter has all segments of a mount marked, those that are not by now in a group that
// group returns, given the segment's number. mu is held.
func (s *watchSet) enter(w *watched, im Image, group func(i int) (*watchGroup, error)) error {
	w.needs.Store(true)
	for i, path := range im.Segments {
		err := s.mark(w, path, im.Flat[i], func() (*watchGroup, error) { return group(i) })
		if err != nil && w.fill != nil {
			return err
		}
	}
	return nil
}

func (s *watchSet) mark(w *watched, path string, flat int64, group func() (*watchGroup, error)) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return errors.Join(err, f.Close())
	}
	id := fanotify.File{Dev: st.Dev, Inode: st.Ino}
	x := s.files[id]
	if x == nil {
		g, err := group()
		if err == nil {
			err = g.Mark(f)
		}
		if err != nil {
			return errors.Join(err, f.Close())
		}
		x = &watchedFile{f, g, map[*watched]int64{}}
		s.files[id] = x
	} else if err := f.Close(); err != nil {
		return err
	}
	x.by[w] = flat
	w.files = append(w.files, id)
	w.in = append(w.in, w.hold(x.group))
	return nil
}

// drop lets reads go on of what only this mount wanted marked, and groups that no other
// mount has files in.
func (s *watchSet) drop(w *watched) {
	s.mu.Lock()
	if !s.live[w] {
		s.mu.Unlock()
		return
	}
	s.forget(w, func(x *watchedFile) { _ = x.group.Unmark(x.file) }) // an error would be that there is no such mark
	idle := s.letGo(w)
	s.mu.Unlock()
	for _, g := range idle {
		_ = g.Close() // what it still answers asks us: without mu
	}
}

// leave lets go of a mount without a word to the kernel: its segments stay marked.
func (s *watchSet) leave(w *watched) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.forget(w, func(*watchedFile) {})
}

// forget knows a mount no more, and calls last with each file that no other wants marked.
// mu is held.
func (s *watchSet) forget(w *watched, last func(*watchedFile)) {
	delete(s.live, w)
	for _, id := range w.files {
		x := s.files[id]
		if delete(x.by, w); len(x.by) == 0 {
			last(x)
			_ = x.file.Close()
			delete(s.files, id)
		}
	}
	w.files = nil
}

// wait ends a mount when its super block is gone.
func (s *watchSet) wait(w *watched, gone <-chan struct{}) {
	<-gone
	w.cancel()
	s.drop(w)
	w.brings.Wait()
	close(w.done)
}

func (w *watched) bring(ctx context.Context, off, n int64) error {
	if w.fill == nil {
		return errLost
	}
	w.misses.Add(1)
	ctx, cancel := context.WithTimeout(ctx, w.timeout)
	defer cancel()
	defer context.AfterFunc(w.ctx, cancel)()
	err := w.ctx.Err()
	if l := w.late.Load(); l != nil && l.stands(off, time.Now()) {
		err = context.DeadlineExceeded
	}
	if err == nil {
		err = w.fill.Bring(ctx, off, n)
		if ctx.Err() == context.DeadlineExceeded {
			w.late.Store(&lateness{off, time.Now().Add(latenessStands)})
		}
	}
	if err != nil {
		w.errors.Add(1)
	}
	return err
}

// lateness is a read that has waited in vain. The kernel asks for each page of a
// readahead by itself, and where that has failed once more: none of them is waited for
// again.
type lateness struct {
	off   int64
	until time.Time
}

const (
	latenessStands = 50 * time.Millisecond
	latenessRange  = 256 << 10 // bytes behind it
)

func (l *lateness) stands(off int64, now time.Time) bool {
	return off >= l.off && off < l.off+latenessRange && now.Before(l.until)
}
