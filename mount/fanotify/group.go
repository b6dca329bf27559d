package fanotify

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Answerer knows what is there. Its methods are called from several goroutines.
type Answerer interface {
	// Here tells whether a read can go on at once. It does not wait.
	Here(Event) bool
	// Bring returns when it can, or with an error: then the reader gets EIO.
	Bring(Event) error
}

// threads take events and answer those that need not wait.
const threads = 2

// Group is a fanotify group that is being answered. Its methods are safe for
// concurrent use.
type Group struct {
	file    *os.File
	fd      int
	journal *journal
	log     *slog.Logger
	left    []*request // by the process before

	answerer Answerer
	stop     *os.File // readable when it ends
	wake     *os.File
	readers  sync.WaitGroup
	waits    sync.WaitGroup

	// old has what processes before have left unanswered, and what else has the same
	// numbers. An event that was read is there, if it belongs there, before somebody
	// has reading for writing.
	reading sync.RWMutex
	joining sync.Mutex // held with reading for reading, while old changes
	old     map[int32]*numbered
}

// numbered are the events that have one number.
type numbered struct {
	all     []*request
	waiting int // of them, without a response
}

// New makes a group that nobody asks yet. Where the kernel or its user has no
// permission for it the error says so; one that knows no such events does so at Mark.
func New(log *slog.Logger) (*Group, error) {
	fd, err := unix.FanotifyInit(unix.FAN_CLASS_PRE_CONTENT|unix.FAN_CLOEXEC|unix.FAN_UNLIMITED_QUEUE|unix.FAN_UNLIMITED_MARKS,
		unix.O_RDONLY|unix.O_LARGEFILE|unix.O_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("fanotify_init", err)
	}
	f := os.NewFile(uintptr(fd), "fanotify")
	j, err := newJournal()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return newGroup(f, j, log)
}

// Take takes a group over, with its marks and with what the process that had it left
// unanswered. That process is dead. The files are the Group's if there is no error.
func Take(group, events *os.File, log *slog.Logger) (*Group, error) {
	j, err := openJournal(events)
	whole := !errors.Is(err, os.ErrInvalid)
	if !whole {
		log.Error("a journal of events is damaged: who waits gets EIO", "err", err)
		j, err = resetJournal(events)
	}
	if err != nil {
		return nil, err
	}
	g, err := newGroup(group, j, log)
	if err == nil {
		if !g.readJournal() || !whole {
			g.denyUnknown()
		}
	}
	return g, err
}

// denyUnknown answers events of which the journal should have told, so that nobody waits
// for ever who read them. Nothing has been taken from the group since.
func (g *Group) denyUnknown() {
	for fd := range int32(1 << 20) { // numbers are bounded by /proc/sys/fs/nr_open, usually this
		if g.old[fd] == nil {
			g.write(fd, deny)
		}
	}
}

func newGroup(f *os.File, j *journal, log *slog.Logger) (*Group, error) {
	fd := int(f.Fd())
	// Only now: the runtime does not wait for events itself, and lets the mode be,
	// which all who have the group share.
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, os.NewSyscallError("fcntl", err)
	}
	stop, wake, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	return &Group{file: f, fd: fd, journal: j, log: log, stop: stop, wake: wake, old: map[int32]*numbered{}}, nil
}

// Files are the group and the journal, for somebody who holds them. They stay the
// Group's.
func (g *Group) Files() (group, journal *os.File) { return g.file, g.journal.file }

// Mark has reads of a file asked for, by all who open it from now on.
func (g *Group) Mark(f *os.File) error {
	if err := g.mark(unix.FAN_MARK_ADD, f); err != nil {
		return fmt.Errorf("fanotify: no pre-access events of %s: %w", f.Name(), err)
	}
	return nil
}

// Unmark lets all read from a file as it is, at once.
func (g *Group) Unmark(f *os.File) error {
	if err := g.mark(unix.FAN_MARK_REMOVE, f); err != nil && err != unix.ENOENT {
		return fmt.Errorf("fanotify: unmark %s: %w", f.Name(), err)
	}
	return nil
}

func (g *Group) mark(flags uint, f *os.File) error {
	return unix.FanotifyMark(g.fd, flags, unix.FAN_PRE_ACCESS, int(f.Fd()), "")
}

// Serve begins to answer: first what was left.
func (g *Group) Serve(a Answerer) {
	g.answerer = a
	for _, r := range g.left {
		g.handle(r)
	}
	g.left = nil
	for range threads {
		g.readers.Go(g.read)
	}
}

// Close stops to answer. If nobody else holds the group all readers that wait go on,
// and read what is there. Answerer.Bring must return soon.
func (g *Group) Close() error {
	err := g.wake.Close()
	g.journal.shut()
	g.readers.Wait()
	g.waits.Wait()
	return errors.Join(err, g.stop.Close(), g.file.Close(), g.journal.close())
}

// request is an event that is to be answered.
type request struct {
	Event
	slot     int
	fd       int32
	open     int // to be closed after the answer: the event's descriptor, or what holds its number; -1: none
	response uint32
	shared   *numbered // nil: no other has its number
}

// readJournal finds out what was left, and keeps its numbers from being used for new
// events where that is possible. It returns false if that cannot be all.
func (g *Group) readJournal() (whole bool) {
	whole = true
	null, err := unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err == nil {
		defer unix.Close(null)
	}
	for i := 1; i <= slots; i++ {
		s := g.journal.slot(i)
		if s.empty() {
			continue
		}
		e, fd, ok, _, err := parse(s[:eventSize])
		if err != nil || !ok {
			g.log.Error("an event in the journal is damaged", "slot", i, "err", err)
			g.journal.give(i)
			whole = false
			continue
		}
		e.File = s.file()
		if e.File.Inode == 0 {
			e.File = File{}
		}
		r := &request{Event: e, slot: i, fd: fd, open: -1}
		if n, err := unix.FcntlInt(uintptr(null), unix.F_DUPFD_CLOEXEC, int(fd)); err == nil {
			if n == int(fd) {
				r.open = n
			} else {
				unix.Close(n)
			}
		}
		g.left = append(g.left, r)
	}
	for _, r := range g.left {
		if g.old[r.fd] == nil {
			g.old[r.fd] = &numbered{}
		}
		g.old[r.fd].add(r)
	}
	return whole
}

func (q *numbered) add(r *request) {
	r.shared = q
	q.all = append(q.all, r)
	q.waiting++
}

// read takes events until the end.
func (g *Group) read() {
	fds := []unix.PollFd{{Fd: int32(g.fd), Events: unix.POLLIN}, {Fd: int32(g.stop.Fd()), Events: unix.POLLIN}}
	for i := g.journal.take(); i != 0; {
		s := g.journal.slot(i)
		g.reading.RLock()
		n, err := unix.Read(g.fd, s[:eventSize]) // one: a second has no room
		var r *request
		if err == nil && n > 0 {
			r = g.event(i, s, n)
		}
		g.reading.RUnlock()
		switch {
		case r != nil:
			g.handle(r)
			fallthrough
		case err == nil && n > 0:
			i = g.journal.take()
			continue
		case err == unix.EAGAIN:
			unix.Poll(fds, -1)
		case err != unix.EINTR: // too many files, perhaps; the kernel has refused that reader
			g.log.Error("read from fanotify", "err", err)
			time.Sleep(10 * time.Millisecond)
		}
		if fds[1].Revents != 0 {
			g.journal.give(i)
			return
		}
	}
}

// event makes a request of what was read into a slot; nil if it is none.
func (g *Group) event(i int, s slot, n int) *request {
	e, fd, ok, rest, err := parse(s[:n])
	if !ok || err != nil || len(rest) > 0 {
		g.log.Error("an event that tells no range", "bytes", n, "err", err)
		for p := s[:n]; err == nil && len(p) > 0; {
			if _, fd, _, p, err = parse(p); err == nil && fd >= 0 {
				g.write(fd, deny)
				unix.Close(int(fd))
			}
		}
		g.journal.give(i)
		return nil
	}
	var st unix.Stat_t
	if unix.Fstat(int(fd), &st) == nil {
		e.File = File{st.Dev, st.Ino}
	}
	s.note(e.File)
	r := &request{Event: e, slot: i, fd: fd, open: int(fd)}
	g.joining.Lock() // with the other threads
	defer g.joining.Unlock()
	if q := g.old[fd]; q != nil {
		q.add(r)
	}
	return r
}

func (g *Group) handle(r *request) {
	if g.answerer.Here(r.Event) {
		g.answer(r, allow)
		return
	}
	g.waits.Go(func() {
		response := allow
		if err := g.answerer.Bring(r.Event); err != nil {
			response = deny
		}
		g.answer(r, response)
	})
}

// answer answers a request. In this order: its number is not used again before it is
// out of the journal. A process killed in between leaves a request that is answered
// once more.
func (g *Group) answer(r *request, response uint32) {
	if r.shared != nil {
		g.answerShared(r, response)
		return
	}
	g.write(r.fd, response)
	g.journal.give(r.slot)
	unix.Close(r.open)
}

// answerShared answers what processes before have left. An answer is for some event
// that has its number, and perhaps not for the one that is meant: that may be answered
// already, and a new one have the number, if something else had it when this process
// began. So all with one number are answered together, when each of them can go on; or
// none, if one cannot.
func (g *Group) answerShared(r *request, response uint32) {
	g.reading.Lock() // whatever has this number is in q now
	defer g.reading.Unlock()
	q := r.shared
	r.response = response
	if q.waiting--; q.waiting > 0 {
		return
	}
	for _, r := range q.all {
		if r.response != allow {
			response = deny
		}
	}
	for _, r := range q.all {
		g.write(r.fd, response)
	}
	for _, r := range q.all {
		g.journal.give(r.slot)
	}
	for _, r := range q.all {
		if r.open >= 0 {
			unix.Close(r.open)
		}
	}
	delete(g.old, r.fd)
}

func (g *Group) write(fd int32, response uint32) {
	var p [8]byte // struct fanotify_response: fd s32, response u32
	binary.NativeEndian.PutUint32(p[0:], uint32(fd))
	binary.NativeEndian.PutUint32(p[4:], response)
	for {
		_, err := unix.Write(g.fd, p[:])
		if err == unix.EINTR {
			continue
		}
		if err != nil && err != unix.ENOENT { // ENOENT: it was answered before that process was killed
			g.log.Error("answer an event", "err", err)
		}
		return
	}
}
