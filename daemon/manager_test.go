package daemon

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
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
	files  map[string]*os.File
	c      *Client
	cmd    *exec.Cmd
}

func managed(t *testing.T) *manager {
	t.Helper()
	dir := t.TempDir()
	m := &manager{t: t, name: filepath.Join(dir, "notify"), files: map[string]*os.File{}, c: &Client{Root: filepath.Join(dir, "root")}}
	must(t, os.Mkdir(m.c.Root, 0o700))
	var err error
	m.socket, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: m.name})
	must(t, err)
	t.Cleanup(func() {
		end(t, m.c)
		m.cmd.Wait()
		m.socket.Close()
		for _, f := range m.files {
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
	must(m.t, m.cmd.Start())
	eventually(m.t, "the service serves", func() bool { _, err := m.c.Status(background); return err == nil })
}

// restart kills both processes, and starts the next.
func (m *manager) restart() {
	m.t.Helper()
	m.hear()
	_, worker := processes(m.t, m.c)
	must(m.t, m.cmd.Process.Kill())
	must(m.t, syscall.Kill(worker, syscall.SIGKILL))
	m.cmd.Wait()
	m.start()
}

// hear takes what the service has said.
func (m *manager) hear() {
	m.t.Helper()
	buf, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
	for {
		m.socket.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		n, on, _, _, err := m.socket.ReadMsgUnix(buf, oob)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return
		}
		must(m.t, err)
		state, name, _ := strings.Cut(string(buf[:n]), "\nFDNAME=")
		switch state {
		case "FDSTORE=1":
			msgs, err := unix.ParseSocketControlMessage(oob[:on])
			must(m.t, err)
			fds, err := unix.ParseUnixRights(&msgs[0])
			must(m.t, err)
			f := os.NewFile(uintptr(fds[0]), name)
			if slices.ContainsFunc(m.names(), func(name string) bool { return sameFile(m.files[name], f) }) {
				f.Close()
				continue
			}
			m.files[name] = f
		case "FDSTOREREMOVE=1":
			if f := m.files[name]; f != nil {
				f.Close()
				delete(m.files, name)
			}
		}
	}
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

// TestManagedWatched: mounts of the face fanotify, which share what the kernel asks by,
// outlive all processes of a service whose descriptors a manager holds; whichever ends.
func TestManagedWatched(t *testing.T) {
	m := managed(t)
	first, f := attachWatched(t, m.c, bigLayout(t, 0, 4), Place{NoComplete: true})
	second, _ := attachWatched(t, m.c, layout(t), Place{NoComplete: true})
	third, _ := attachWatched(t, m.c, windowed(t), Place{NoComplete: true})
	readBig(t, first, 0, 1)
	m.restart()
	if st, err := m.c.Status(background); err != nil || len(st.Mounts) != 3 || st.Mounts[0].Face != fanotifyFace {
		t.Fatalf("%+v, %v", st, err)
	}
	readBig(t, first, 0, 2)
	must(t, unix.Unmount(first, 0)) // whose descriptors the others share
	eventually(t, "the first is forgotten", func() bool {
		st, err := m.c.Status(background)
		return err == nil && len(st.Mounts) == 2
	})
	m.hear()
	for _, name := range m.names() {
		if name == f.ID+".held" || name == f.ID+".3" {
			t.Errorf("%s of a mount that is no more is held", name)
		}
	}
	m.restart()
	readFiles(t, second)
	readFiles(t, third)
	must(t, unix.Unmount(second, 0))
	must(t, unix.Unmount(third, 0))
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
			m.hear()
			journal := m.files[ids["bad"]+".held"]
			if journal == nil {
				t.Fatalf("no journal among %q", m.names())
			}
			_, err := journal.WriteAt(make([]byte, 1<<20), 0)
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
