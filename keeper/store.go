package keeper

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// store is the descriptor store of the service manager (sd_notify(3), FDSTORE=1),
// if there is one. It holds the descriptors of each mount, and its journal in a
// file that lies in memory only, while the keeper itself is restarted:
//
//	<id>.0 ...       Mount.Files
//	<id>.journal     the Mount: see journal.go
//	<id>.held        the same of one that is Held
//
// systemd takes no file twice. So what mounts share is there once, by the name that the
// first of them gave it (Mount.Parts), until none of them has it any more.
//
// Without a manager all does nothing.
type store struct {
	to       string // its socket; "" if there is none
	log      *slog.Logger
	journals map[string]*os.File            // by id
	shared   map[string]map[string]*os.File // by name: who has the file, by id. Of what is Held alone
	unsent   map[string][]part              // by id: what the manager could not be given
}

// part is a file of a mount, or its journal.
type part struct {
	name string
	file *os.File
}

const (
	journalSuffix = ".journal"
	heldSuffix    = ".held"
	firstListen   = 3 // SD_LISTEN_FDS_START
	maxListen     = 1 << 20
)

// openStore returns the store, and the mounts that an earlier keeper has left in it.
func openStore(log *slog.Logger) (*store, []*Mount, error) {
	s := newStore(log)
	s.to = os.Getenv("NOTIFY_SOCKET") // "@..." is an abstract one here too
	pid, n, names := os.Getenv("LISTEN_PID"), os.Getenv("LISTEN_FDS"), os.Getenv("LISTEN_FDNAMES")
	for _, v := range []string{"NOTIFY_SOCKET", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID"} {
		os.Unsetenv(v)
	}
	count, err := strconv.Atoi(n)
	if s.to == "" || err != nil || pid != strconv.Itoa(os.Getpid()) {
		return s, nil, nil
	}
	name := strings.Split(names, ":")
	if count < 0 || count > maxListen || len(name) != count {
		return nil, nil, fmt.Errorf("keeper: LISTEN_FDS is %q, with %d names", n, len(name))
	}
	files := map[string]*os.File{}
	for i, name := range name {
		if files[name], err = file(firstListen+i, name); err != nil {
			return nil, nil, err
		}
	}
	return s, s.restore(files), nil
}

func newStore(log *slog.Logger) *store {
	return &store{log: log, journals: map[string]*os.File{}, shared: map[string]map[string]*os.File{}, unsent: map[string][]part{}}
}

// restore makes mounts of what was in the store. What cannot be one is let go, but for
// what is Held: of that a worker is told that nothing is known.
func (s *store) restore(files map[string]*os.File) (all []*Mount) {
	used := map[string]bool{}
	for name, f := range files {
		id, held := strings.CutSuffix(name, heldSuffix)
		id, ok := strings.CutSuffix(id, journalSuffix)
		if held == ok {
			continue
		}
		m, err := readJournal(f)
		if err != nil || m.ID != id || held && !m.Held {
			s.log.Error("a journal is damaged: its mount ends", "id", id, "held", held, "err", err)
			if !held {
				continue
			}
			show, _ := json.Marshal(map[string]string{"id": id})
			m = &Mount{ID: id, Show: show, Held: true, Settled: true, Parts: partsOf(id, files)}
		}
		used[name] = true
		s.journals[id] = f
		s.take(m, files, used)
		if len(m.Files) == 0 { // the manager drops connections that have ended
			s.remove(m)
			continue
		}
		all = append(all, m)
	}
	for name, f := range files {
		if used[name] {
			continue
		}
		f.Close()
		s.notify("FDSTOREREMOVE=1\nFDNAME=" + name)
	}
	slices.SortFunc(all, func(a, b *Mount) int { return strings.Compare(a.ID, b.ID) })
	return all
}

// take gives a mount its files.
func (s *store) take(m *Mount, files map[string]*os.File, used map[string]bool) {
	for i := 0; m.Parts == nil || i < len(m.Parts); i++ {
		name := m.part(i)
		f := files[name]
		if f == nil {
			return
		}
		if used[name] { // by another mount, which may end before
			var err error
			if f, err = again(f); err != nil {
				s.log.Error("take a file of the store", "name", name, "err", err)
				return
			}
		}
		used[name] = true
		m.Files = append(m.Files, f)
		s.share(m, name, f)
	}
}

// part is the name of a mount's n-th file.
func (m *Mount) part(n int) string {
	if n < len(m.Parts) {
		return m.Parts[n]
	}
	return m.ID + "." + strconv.Itoa(n)
}

// partsOf lists the files that have names of a mount, in order.
func partsOf(id string, files map[string]*os.File) []string {
	parts := []string{}
	for name := range files {
		if n, ok := strings.CutPrefix(name, id+"."); ok && strings.Trim(n, "0123456789") == "" {
			parts = append(parts, name)
		}
	}
	slices.SortFunc(parts, func(a, b string) int { return cmp.Or(cmp.Compare(len(a), len(b)), strings.Compare(a, b)) })
	return parts
}

// again is another descriptor of the same file.
func again(f *os.File) (g *os.File, err error) {
	derr := descriptor(f, func(fd int) {
		var n int
		if n, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0); err == nil {
			g, err = file(n, f.Name())
		}
	})
	return g, errors.Join(derr, err)
}

// same tells whether two descriptors are of one opening of a file.
func same(a, b *os.File) (same bool) {
	_ = descriptor(a, func(x int) {
		_ = descriptor(b, func(y int) {
			const kcmpFile = 0
			pid := uintptr(os.Getpid())
			r, _, e := unix.Syscall6(unix.SYS_KCMP, pid, pid, kcmpFile, uintptr(x), uintptr(y), 0)
			same = e == 0 && r == 0
		})
	})
	return same
}

// share notes that a mount has a file.
func (s *store) share(m *Mount, name string, f *os.File) {
	if !m.Held {
		return
	}
	if s.shared[name] == nil {
		s.shared[name] = map[string]*os.File{}
	}
	s.shared[name][m.ID] = f
}

// known is the name by which the manager has a file already, "" if it has it not.
func (s *store) known(f *os.File) string {
	for name, by := range s.shared {
		for _, g := range by {
			if same(f, g) {
				return name
			}
			break // they are all the same
		}
	}
	return ""
}

// lasts tells whether what is kept outlives the keeper.
func (s *store) lasts() bool { return s.to != "" }

// has tells whether a mount does. Others may have some of its files to give.
func (s *store) has(m *Mount) bool { return s.lasts() && s.journals[m.ID] != nil && len(s.unsent) == 0 }

// put stores a mount, or its journal anew. What the manager cannot be given is tried again
// the next time.
func (s *store) put(m *Mount) {
	if s.to == "" {
		return
	}
	var news []int // files that the manager has not
	if s.journals[m.ID] == nil {
		var parts []string
		for i, f := range m.Files {
			name := m.part(i)
			if old := s.known(f); m.Held && old != "" {
				name = old
			} else {
				news = append(news, i)
			}
			parts = append(parts, name)
			s.share(m, name, f)
		}
		if len(news) < len(m.Files) {
			m.Parts = parts
		}
	}
	f, err := s.journal(m)
	if err != nil {
		s.log.Error("a mount would not outlive the keeper", "id", m.ID, "err", err)
		return
	}
	unsent := s.unsent[m.ID]
	if s.journals[m.ID] == nil { // else the manager has this very file
		s.journals[m.ID] = f
		for _, i := range news {
			unsent = append(unsent, part{m.part(i), m.Files[i]})
		}
		unsent = append(unsent, part{m.journalName(), f})
	}
	for len(unsent) > 0 && s.notify("FDSTORE=1\nFDNAME="+unsent[0].name, unsent[0].file) {
		unsent = unsent[1:]
	}
	if s.unsent[m.ID] = unsent; len(unsent) == 0 {
		delete(s.unsent, m.ID)
	}
}

func (m *Mount) journalName() string {
	if m.Held {
		return m.ID + heldSuffix
	}
	return m.ID + journalSuffix
}

// journal writes a mount's journal.
func (s *store) journal(m *Mount) (*os.File, error) {
	f := s.journals[m.ID]
	if f == nil {
		fd, err := unix.MemfdCreate("shale-journal", unix.MFD_CLOEXEC)
		if err != nil {
			return nil, os.NewSyscallError("memfd_create", err)
		}
		f = os.NewFile(uintptr(fd), m.ID+journalSuffix)
	}
	return f, writeJournal(f, m)
}

// remove takes a mount out of the store.
func (s *store) remove(m *Mount) {
	f := s.journals[m.ID]
	if f == nil {
		return
	}
	f.Close()
	delete(s.journals, m.ID)
	unsent := s.unsent[m.ID]
	delete(s.unsent, m.ID)
	for i := range max(len(m.Files), 1) {
		name := m.part(i)
		delete(s.shared[name], m.ID)
		for id, f := range s.shared[name] {
			if slices.ContainsFunc(unsent, func(p part) bool { return p.name == name }) {
				s.unsent[id] = append(s.unsent[id], part{name, f})
			}
			break
		}
		if len(s.shared[name]) > 0 {
			continue // others have it
		}
		delete(s.shared, name)
		s.notify("FDSTOREREMOVE=1\nFDNAME=" + name)
	}
	s.notify("FDSTOREREMOVE=1\nFDNAME=" + m.journalName())
}

// notify tells the manager something, and whether it could.
func (s *store) notify(state string, files ...*os.File) bool {
	if s.to == "" {
		return true
	}
	err := func() error {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return os.NewSyscallError("socket", err)
		}
		defer unix.Close(fd)
		var oob []byte
		for _, f := range files {
			if err := descriptor(f, func(fd int) { oob = append(oob, unix.UnixRights(fd)...) }); err != nil {
				return err
			}
		}
		// The manager's queue may be full for a moment.
		for range 10 { // nobody is answered meanwhile
			err = unix.Sendmsg(fd, []byte(state), oob, &unix.SockaddrUnix{Name: s.to}, 0)
			if err != unix.EAGAIN && err != unix.EINTR {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		return os.NewSyscallError("sendmsg", err)
	}()
	if err != nil {
		line, _, _ := strings.Cut(state, "\n")
		s.log.Error("tell the service manager", "what", line, "err", err)
	}
	return err == nil
}
