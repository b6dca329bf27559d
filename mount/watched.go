package mount

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/mount/fanotify"
	"github.com/shale-image/shale/mount/fusedev"
)

// watches are the mounts of Fanotify in this process. One group does for all, since a
// user may have but 128, and since images share segments: which mount a read is of
// nobody tells, so it may go on when all bytes that it wants are there, whoever
// brought them.
var watches = watchSet{live: map[*watched]bool{}, files: map[fanotify.File]*watchedFile{}}

type watchSet struct {
	mu    sync.RWMutex
	group *fanotify.Group   // nil while no mount needs one
	live  map[*watched]bool // mounts that do
	files map[fanotify.File]*watchedFile
	ends  superWatch
	taken []func() // to be done when the group that was taken over is answered
}

// watchedFile is a segment that is marked.
type watchedFile struct {
	file *os.File
	by   map[*watched]int64 // mounts that want it marked, and its flat address in them
}

// watched is a mount of Fanotify.
type watched struct {
	fill    Filler // nil: nobody knows what its bytes are
	files   []fanotify.File
	timeout time.Duration
	ctx     context.Context // until it is aborted, or no more
	cancel  context.CancelFunc
	done    chan struct{}
	id      int32 // of its end in watches.ends

	late                 atomic.Pointer[lateness]
	brings               sync.WaitGroup // in which fill is used; begun with watches.mu held
	needs                atomic.Bool    // this process
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

// begin has reads of a mount's segments asked for. make makes the group, if there is
// none.
func (s *watchSet) begin(w *watched, im Image, make func() (*fanotify.Group, error)) error {
	err := s.enter(w, im, make)
	if err != nil {
		s.drop(w)
	}
	return err
}

func (s *watchSet) enter(w *watched, im Image, make func() (*fanotify.Group, error)) (err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.group == nil {
		if s.group, err = make(); err != nil {
			return err
		}
	}
	s.live[w] = true
	w.needs.Store(true)
	for i, path := range im.Segments {
		if err := s.mark(w, path, im.Flat[i]); err != nil && w.fill != nil {
			return err
		}
	}
	return nil
}

func (s *watchSet) mark(w *watched, path string, flat int64) error {
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
		if err := s.group.Mark(f); err != nil {
			return errors.Join(err, f.Close())
		}
		x = &watchedFile{f, map[*watched]int64{}}
		s.files[id] = x
	} else if err := f.Close(); err != nil {
		return err
	}
	x.by[w] = flat
	w.files = append(w.files, id)
	return nil
}

// drop lets reads go on of what only this mount wanted marked, and the group with the
// last mount.
func (s *watchSet) drop(w *watched) {
	s.mu.Lock()
	if !s.live[w] {
		s.mu.Unlock()
		return
	}
	s.forget(w, func(f *os.File) { _ = s.group.Unmark(f) }) // an error would be that there is no such mark
	var idle *fanotify.Group
	if len(s.live) == 0 {
		idle, s.group = s.group, nil
	}
	s.mu.Unlock()
	if idle != nil {
		_ = idle.Close() // what it still answers asks us: without mu
	}
}

// leave lets go of a mount without a word to the kernel: its segments stay marked.
func (s *watchSet) leave(w *watched) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.forget(w, func(*os.File) {})
}

// forget knows a mount no more, and calls last with each file that no other wants marked.
// mu is held.
func (s *watchSet) forget(w *watched, last func(*os.File)) {
	delete(s.live, w)
	w.needs.Store(false)
	for _, id := range w.files {
		x := s.files[id]
		if delete(x.by, w); len(x.by) == 0 {
			last(x.file)
			_ = x.file.Close()
			delete(s.files, id)
		}
	}
	w.files = nil
}

// closeOther closes the files of a group that is had already.
func (s *watchSet) closeOther(from Watching) {
	s.mu.RLock()
	group, journal := s.group.Files()
	s.mu.RUnlock()
	if group != from.Group {
		_ = from.Group.Close()
	}
	if journal != from.Journal {
		_ = from.Journal.Close()
	}
}

// unknown tells whether an event may be about a file of a mount that is lost, whose
// segments are not all in files. mu is held.
func (s *watchSet) unknown(e fanotify.Event) bool {
	if s.files[e.File] != nil {
		return false
	}
	for w := range s.live {
		if w.fill == nil {
			return true
		}
	}
	return false
}

// wait ends a mount when its super block is gone.
func (s *watchSet) wait(w *watched, gone <-chan struct{}) {
	<-gone
	w.cancel()
	s.drop(w)
	w.brings.Wait()
	close(w.done)
}

// of returns the marked files that an event may be about. mu is held.
func (s *watchSet) of(e fanotify.Event) []*watchedFile {
	if e.File != (fanotify.File{}) {
		if x := s.files[e.File]; x != nil {
			return []*watchedFile{x}
		}
		return nil
	}
	var all []*watchedFile
	for _, x := range s.files {
		all = append(all, x)
	}
	return all
}

// Here tells whether what an event is about is in its segment. What is not marked any
// more is, unless it may be a lost mount's.
func (s *watchSet) Here(e fanotify.Event) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.unknown(e) {
		return false
	}
	for _, x := range s.of(e) {
		if !x.here(e) {
			return false
		}
	}
	return true
}

func (x *watchedFile) here(e fanotify.Event) bool {
	for w, flat := range x.by {
		if w.fill != nil && w.fill.Here(flat+e.Off, e.Size) {
			w.hits.Add(1)
			return true
		}
	}
	return false
}

// Bring has what an event is about brought by all mounts that it may be of, each from
// where its image comes from, until one has: a source that hangs is waited for by those
// alone whose bytes nobody else has.
func (s *watchSet) Bring(e fanotify.Event) error {
	type part struct {
		w    *watched
		flat int64
	}
	s.mu.RLock()
	if s.unknown(e) {
		s.mu.RUnlock()
		return errLost
	}
	var parts []part
	for _, x := range s.of(e) {
		for w, flat := range x.by {
			parts = append(parts, part{w, flat})
			w.brings.Add(1)
		}
	}
	s.mu.RUnlock()
	ended := make(chan error, len(parts))
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	for _, p := range parts {
		go func() {
			defer p.w.brings.Done()
			ended <- p.w.bring(ctx, p.flat+e.Off, e.Size)
		}()
	}
	var errs []error
	for range parts {
		err := <-ended
		if s.Here(e) {
			return nil
		}
		errs = append(errs, err)
	}
	// What is not here and belongs to no image is nobody's, and zeros.
	return errors.Join(errs...)
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

// errLost ends reads of a mount of which nothing is known but its segments.
var errLost = fmt.Errorf("nobody knows what is missing: %w", ErrIncomplete)
