package daemon

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// manager runs a service and holds its descriptors, as systemd does: it takes no file
// twice.
type manager struct {
	t      *testing.T
	socket *net.UnixConn
	name   string
	files  map[string]*os.File // as it was last heard
	c      *Client
	cmd    *exec.Cmd

	mu    sync.Mutex
	held  map[string]*os.File
	heard time.Time // something, last
}

func managed(t *testing.T) *manager {
	t.Helper()
	dir := t.TempDir()
	m := &manager{t: t, name: filepath.Join(dir, "notify"), held: map[string]*os.File{}, c: &Client{Root: filepath.Join(dir, "root")}}
	must(t, os.Mkdir(m.c.Root, 0o700))
	var err error
	m.socket, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: m.name})
	must(t, err)
	ended := make(chan struct{})
	go func() { defer close(ended); m.listen() }()
	t.Cleanup(func() {
		end(t, m.c)
		m.cmd.Wait()
		m.socket.Close()
		<-ended
		for _, f := range m.held {
			f.Close()
		}
		if t.Failed() {
			log, _ := os.ReadFile(m.c.log())
			t.Logf("the service's log:\n%s", log)
		}
	})
	m.start()
	return m
}

// start runs the service with what is held.
func (m *manager) start() {
	m.t.Helper()
	m.cmd = exec.Command("/proc/self/exe", "daemon", "--root", m.c.Root)
	m.cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+m.name)
	var names []string
	for name, f := range m.files {
		names = append(names, name)
		m.cmd.ExtraFiles = append(m.cmd.ExtraFiles, f)
	}
	if len(names) > 0 {
		m.cmd.Env = append(m.cmd.Env, fmt.Sprint("LISTEN_FDS=", len(names)), "LISTEN_FDNAMES="+strings.Join(names, ":"))
	}
	log, err := os.OpenFile(m.c.log(), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	must(m.t, err)
	defer log.Close()
	m.cmd.Stderr = log
	m.mu.Lock()
	err = m.cmd.Start() // which has its way with the files
	m.mu.Unlock()
	must(m.t, err)
	eventually(m.t, "the service serves", func() bool { _, err := m.c.Status(background); return err == nil })
}

// restart kills both processes, and starts the next.
func (m *manager) restart() {
	m.t.Helper()
	st, err := m.c.Status(background)
	must(m.t, err)
	for _, s := range st.Mounts {
		m.holds(s.ID)
	}
	_, worker := processes(m.t, m.c)
	must(m.t, syscall.Kill(worker, syscall.SIGSTOP)) // alone it would fetch all
	must(m.t, m.cmd.Process.Kill())
	must(m.t, syscall.Kill(worker, syscall.SIGKILL))
	m.cmd.Wait()
	eventually(m.t, "both are gone", func() bool { return unlocked(m.c.Root) }) // as a manager waits
	m.start()
}

// hear waits until the service has nothing to say.
func (m *manager) hear() {
	for said := false; !said; {
		time.Sleep(10 * time.Millisecond)
		m.mu.Lock()
		if said = time.Since(m.heard) > 100*time.Millisecond; said {
			m.files = maps.Clone(m.held)
		}
		m.mu.Unlock()
	}
}

// holds waits until all of a mount is held, of which the journal comes last.
func (m *manager) holds(id string) {
	m.t.Helper()
	eventually(m.t, id+" is held", func() bool { m.hear(); return m.files[id+".held"] != nil })
}

// listen takes what the service says, at once: the kernel keeps little of it.
func (m *manager) listen() {
	buf, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
	for {
		n, on, _, _, err := m.socket.ReadMsgUnix(buf, oob)
		if err != nil {
			if !errors.Is(err, net.ErrClosed) {
				m.t.Error(err)
			}
			return
		}
		state, name, _ := strings.Cut(string(buf[:n]), "\nFDNAME=")
		m.mu.Lock()
		m.heard = time.Now()
		switch state {
		case "FDSTORE=1":
			if msgs, err := unix.ParseSocketControlMessage(oob[:on]); err != nil || len(msgs) == 0 {
				m.t.Errorf("%s without a file: %v", name, err)
			} else if fds, err := unix.ParseUnixRights(&msgs[0]); err != nil {
				m.t.Error(err)
			} else {
				m.take(name, os.NewFile(uintptr(fds[0]), name))
			}
		case "FDSTOREREMOVE=1":
			if f := m.held[name]; f != nil {
				f.Close()
				delete(m.held, name)
			}
		}
		m.mu.Unlock()
	}
}

func (m *manager) take(name string, f *os.File) {
	for _, held := range m.held {
		if sameFile(held, f) {
			f.Close()
			return
		}
	}
	m.held[name] = f
}

func (m *manager) names() (all []string) {
	for name := range m.files {
		all = append(all, name)
	}
	slices.Sort(all)
	return all
}

// sameFile tells whether two descriptors are of one opening of a file (kcmp(2)).
func sameFile(a, b *os.File) bool {
	pid := uintptr(os.Getpid())
	r, _, e := unix.Syscall6(unix.SYS_KCMP, pid, pid, 0, a.Fd(), b.Fd(), 0)
	return e == 0 && r == 0
}

// TestManagedWatched: mounts of the face fanotify, which share files that the kernel asks
// by, outlive all processes of a service whose descriptors a manager holds; whichever ends.
func TestManagedWatched(t *testing.T) {
	m := managed(t)
	big := bigLayout(t, 0, 4)
	first, f := attachWatched(t, m.c, big, Place{NoComplete: true})
	second, s := attachWatched(t, m.c, bigLayout(t, 10, 1), Place{NoComplete: true})
	third, _ := attachWatched(t, m.c, windowed(t), Place{NoComplete: true})
	fourth, _ := attachWatched(t, m.c, big, Place{NoComplete: true})
	readBig(t, first, 0, 1)
	m.restart()
	if st, err := m.c.Status(background); err != nil || len(st.Mounts) != 4 || st.Mounts[0].Face != fanotifyFace {
		t.Fatalf("%+v, %v", st, err)
	}
	readBig(t, first, 0, 2)
	must(t, unix.Unmount(first, 0))  // whose group, and data, are the fourth's
	must(t, unix.Unmount(second, 0)) // whose are nobody's else
	eventually(t, "two are forgotten", func() bool {
		m.hear()
		return !slices.ContainsFunc(m.names(), func(name string) bool {
			return name == f.ID+".held" || strings.HasPrefix(name, s.ID)
		})
	})
	if m.files[f.ID+".0"] == nil {
		t.Errorf("the group that the fourth is asked for by is not held: %q", m.names())
	}
	m.restart()
	readFiles(t, third)
	readBig(t, fourth, 1, 3)
	must(t, unix.Unmount(third, 0))
	must(t, unix.Unmount(fourth, 0))
	eventually(t, "all is forgotten", func() bool {
		m.hear()
		return len(m.files) == 0
	})
}

// TestJournalDamaged: a mount of the face fanotify whose journal is no more what it was
// gives EIO for what is not here, never zeros, as long as it is mounted; others go on,
// also if they share what it had first. The service ends when it is unmounted.
func TestJournalDamaged(t *testing.T) {
	for name, order := range map[string][]string{"only": {"bad"}, "first": {"bad", "good"}, "last": {"good", "bad"}} {
		t.Run(name, func(t *testing.T) {
			m := managed(t)
			dirs, ids := map[string]string{}, map[string]string{}
			for _, which := range order {
				ref := layout(t)
				if which == "bad" {
					ref = bigLayout(t, 0, 4)
				}
				dir, mounted := attachWatched(t, m.c, ref, Place{NoComplete: true})
				dirs[which], ids[which] = dir, mounted.ID
			}
			bad := dirs["bad"]
			readBig(t, bad, 0, 1)
			m.holds(ids["bad"])
			_, err := m.files[ids["bad"]+".held"].WriteAt(make([]byte, 1<<20), 0)
			must(t, err)
			for n := range 3 {
				if n < 2 {
					m.restart()
				} else { // what the next worker is told of it does not get better
					killWorker(t, m.c)
				}
				dropCaches(t, bad)
				if p, err := os.ReadFile(filepath.Join(bad, "f003")); !errors.Is(err, syscall.EIO) {
					t.Errorf("%d bytes of what nobody knows, %v", len(p), err)
				}
			}
			if good := dirs["good"]; good != "" {
				readFiles(t, good)
				must(t, unix.Unmount(good, 0))
				eventually(t, "the good one is forgotten", func() bool {
					st, err := m.c.Status(background)
					return err == nil && len(st.Mounts) == 0
				})
				if _, err := os.ReadFile(filepath.Join(bad, "f002")); !errors.Is(err, syscall.EIO) {
					t.Errorf("alone: %v", err)
				}
			}
			if err := m.c.Stop(background); !errors.Is(err, ErrBusy) {
				t.Errorf("stop: %v, want ErrBusy", err)
			}
			must(t, unix.Unmount(bad, 0))
			eventually(t, "it can end", func() bool { return m.c.Stop(background) == nil })
		})
	}
}
