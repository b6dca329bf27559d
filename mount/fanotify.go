package mount

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
)

// Filler is a Content that can be brought into Image.Segments without being read here.
type Filler interface {
	// Here tells whether all of [off, off+n), flat addresses in one segment, is in
	// it. It does not wait.
	Here(off, n int64) bool
	// Bring returns when all that the image has in that range is in its segment, or
	// with an error. It ends soon after ctx has.
	Bring(ctx context.Context, off, n int64) error
}

// Watching is what another process needs to go on with a mount of Fanotify when the one
// that made it is dead. Mounts share files: those of groups if they share segments, Ends
// in any case.
type Watching struct {
	Groups []Held
	// In tells for each segment which of Groups asks for its readers; nil: the first for all.
	In   []int
	Ends *os.File
	// ID is the mount's in Ends, 0 as long as there is no mount, or if nobody knows it.
	ID int32
	// Of the mount: Mounted.Dev and Mounted.BDI.
	Dev uint64
	BDI string
}

// Held are the files of a fanotify group. As long as somebody has Group open who reads
// waits; when nobody does, the kernel lets it read what is there, zeros perhaps.
type Held struct{ Group, Journal *os.File }

// ErrNoHolder says that Fanotify needs somebody else who holds what it is answered by.
var ErrNoHolder = errors.New("nobody holds the mount while this process is not there, and its readers would then see zeros")

// Fanotify mounts an image as Direct does while its data are still on their way. Its
// segments, on a file system that raises pre-access events (Linux 6.14: ext4, xfs,
// btrfs), are marked before: a read of what is not there waits until im.Content, a
// Filler, has brought it. im.Segments must not be open with a descriptor by which this
// process reads or writes them and that is younger than their first mark.
//
// o.Watch is called before there is a mount, with what somebody else is to hold. When
// all data are here, Release makes the mount one of Direct: no process is needed any
// more. If im.Complete is set that is so from the beginning.
func Fanotify(ctx context.Context, im Image, o Options) (_ *Mounted, err error) {
	if im.Complete {
		return im.direct(o)
	}
	f, ok := im.Content.(Filler)
	if !ok || len(im.Flat) != len(im.Segments) {
		return nil, fmt.Errorf("this content cannot be brought into segments: %w", errors.ErrUnsupported)
	}
	if o.Watch == nil {
		return nil, ErrNoHolder
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	ends, err := watches.ends.hold()
	if err != nil {
		return nil, err
	}
	defer watches.ends.release()
	w := newWatched(f, o)
	if err := watches.begin(w, im, o); err != nil {
		w.cancel()
		return nil, err
	}
	m, err := watches.make(w, im, o, ends)
	if err != nil {
		w.cancel()
		watches.drop(w)
	}
	return m, err
}

// make makes a mount whose segments are marked.
func (s *watchSet) make(w *watched, im Image, o Options, ends *os.File) (*Mounted, error) {
	if err := o.Watch(Watching{Groups: s.held(w), In: w.in, Ends: ends}); err != nil {
		return nil, err
	}
	fd, bdi, err := mountFile(im.Meta, im.Segments, false, o.ReadAheadKiB)
	if err != nil {
		return nil, err
	}
	m := &Mounted{fd: fd, bdi: bdi, done: w.done, watched: w}
	if m.dev, err = device(int(fd.Fd()), ""); err != nil {
		return nil, errors.Join(err, fd.Close())
	}
	id, gone, err := s.ends.watch(fd)
	if err != nil {
		return nil, errors.Join(err, fd.Close())
	}
	w.id = id
	go s.wait(w, gone)
	return m, nil
}

// Release says that all data of the mount are in its segments, for good: its readers
// need this process no more, and nobody is asked. It does nothing with other mounts
// than those of Fanotify.
func (m *Mounted) Release() {
	if m.watched != nil {
		watches.drop(m.watched)
		m.watched.needs.Store(false)
	}
}

// Watching tells what is to be held of a mount of Fanotify besides the files.
func (m *Mounted) Watching() Watching {
	if m.watched == nil {
		return Watching{}
	}
	return Watching{ID: m.watched.id, Dev: m.dev, BDI: m.bdi}
}

// ResumeFanotify goes on with a mount that a process made which is dead now. It takes
// the files. im is the same image. If that fails, or nobody knows the image any more, it is
// to be called with nil as Content, and the segments that are still known: then what is not
// there is EIO, as well as it can be told from what other mounts have in the same segments,
// also where that is an error. Nothing is answered before ServeFanotify is called, which is
// after the last mount was resumed; nor may any be released before.
func ResumeFanotify(from Watching, im Image, o Options) (*Mounted, error) {
	f, _ := im.Content.(Filler)
	if len(im.Flat) != len(im.Segments) || from.In != nil && len(from.In) != len(im.Segments) {
		return nil, fmt.Errorf("%d segments, %d addresses of them, %d groups: %w", len(im.Segments), len(im.Flat), len(from.In), os.ErrInvalid)
	}
	w := newWatched(f, o)
	w.id = from.ID
	err := watches.resume(w, from, im, o)
	var gone <-chan struct{}
	if err == nil {
		gone, err = watches.ends.again(from.Ends, from.ID)
	}
	if err != nil {
		if f != nil { // it is lost, which the next call says
			w.cancel()
			watches.leave(w)
		}
		return nil, err
	}
	watches.closeOthers(from)
	watches.taken = append(watches.taken, func() { go watches.wait(w, gone) })
	return &Mounted{dev: from.Dev, bdi: from.BDI, done: w.done, watched: w}, nil
}

// ServeFanotify begins to answer for what was resumed.
func ServeFanotify() {
	s := &watches
	if len(s.taken) == 0 {
		return
	}
	s.mu.RLock()
	groups := slices.Clone(s.groups)
	s.mu.RUnlock()
	for _, g := range groups {
		g.serve()
	}
	for _, begin := range s.taken {
		begin()
	}
	s.taken = nil
	s.ends.mu.Lock()
	defer s.ends.mu.Unlock()
	s.ends.endLost()
	s.ends.closeIdle()
}
