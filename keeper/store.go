package keeper

import (
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
//
// Without a manager all does nothing.
type store struct {
	to       string // its socket; "" if there is none
	log      *slog.Logger
	journals map[string]*os.File // by id
}

const (
	journalSuffix = ".journal"
	firstListen   = 3 // SD_LISTEN_FDS_START
	maxListen     = 1 << 20
)

// openStore returns the store, and the mounts that an earlier keeper has left in it.
func openStore(log *slog.Logger) (*store, []*Mount, error) {
	s := &store{log: log, journals: map[string]*os.File{}}
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

// restore makes mounts of what was in the store. What cannot be one is let go.
func (s *store) restore(files map[string]*os.File) (all []*Mount) {
	for name, f := range files {
		id, ok := strings.CutSuffix(name, journalSuffix)
		if !ok {
			continue
		}
		m, err := readJournal(f)
		if err != nil || m.ID != id {
			s.log.Error("a journal is damaged: its mount ends", "id", id, "err", err)
			continue
		}
		for i := 0; files[part(id, i)] != nil; i++ {
			m.Files = append(m.Files, files[part(id, i)])
			delete(files, part(id, i))
		}
		s.journals[id] = f
		delete(files, name)
		if len(m.Files) == 0 { // the manager drops connections that have ended
			s.remove(m)
			continue
		}
		all = append(all, m)
	}
	for name, f := range files {
		f.Close()
		s.notify("FDSTOREREMOVE=1\nFDNAME=" + name)
	}
	slices.SortFunc(all, func(a, b *Mount) int { return strings.Compare(a.ID, b.ID) })
	return all
}

func part(id string, n int) string { return id + "." + strconv.Itoa(n) }

// lasts tells whether what is kept outlives the keeper.
func (s *store) lasts() bool { return s.to != "" }

// put stores a mount, or its journal anew.
func (s *store) put(m *Mount) {
	if s.to == "" {
		return
	}
	f, err := s.journal(m)
	if err != nil {
		s.log.Error("a mount would not outlive the keeper", "id", m.ID, "err", err)
		return
	}
	if s.journals[m.ID] != nil {
		return // the manager has this very file
	}
	s.journals[m.ID] = f
	for i, f := range m.Files {
		s.notify("FDSTORE=1\nFDNAME="+part(m.ID, i), f)
	}
	s.notify("FDSTORE=1\nFDNAME="+m.ID+journalSuffix, f)
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
	for i := range max(len(m.Files), 1) {
		s.notify("FDSTOREREMOVE=1\nFDNAME=" + part(m.ID, i))
	}
	s.notify("FDSTOREREMOVE=1\nFDNAME=" + m.ID + journalSuffix)
}

// notify tells the manager something.
func (s *store) notify(state string, files ...*os.File) {
	if s.to == "" {
		return
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
		for range 100 {
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
}
