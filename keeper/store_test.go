package keeper

import (
	"bytes"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// manager stands for the service manager: it does with the packets of its socket
// what sd_notify(3) says of FDSTORE, and starts the service with what it has. There
// is no systemd in this test.
type manager struct {
	t     *testing.T
	c     *net.UnixConn
	name  string
	files map[string]*os.File
	ready int
}

func newManager(t *testing.T) *manager {
	t.Helper()
	m := &manager{t: t, name: filepath.Join(t.TempDir(), "notify"), files: map[string]*os.File{}}
	var err error
	if m.c, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: m.name}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		m.c.Close()
		for _, f := range m.files {
			f.Close()
		}
	})
	return m
}

// hear takes what the service has said so far.
func (m *manager) hear() {
	m.t.Helper()
	for {
		m.c.SetReadDeadline(deadline())
		buf := make([]byte, 4096)
		// A state begins with a letter, as our packets with their kind.
		kind, body, files, err := readPacket(m.c, buf)
		if err != nil {
			return
		}
		state := string(kind) + string(body)
		_, name, _ := strings.Cut(state, "FDNAME=")
		switch {
		case strings.HasPrefix(state, "READY=1"):
			m.ready++
		case strings.HasPrefix(state, "FDSTORE=1\n") && len(files) == 1:
			if slices.ContainsFunc(slices.Collect(maps.Values(m.files)), func(f *os.File) bool { return same(f, files[0]) }) {
				files[0].Close() // as systemd does
				continue
			}
			m.files[name] = files[0]
		case strings.HasPrefix(state, "FDSTOREREMOVE=1\n") && m.files[name] != nil:
			m.files[name].Close()
			delete(m.files, name)
		default:
			m.t.Errorf("the service says %q, with %d files", state, len(files))
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

// stores waits until the manager has these files.
func (m *manager) stores(want ...string) {
	m.t.Helper()
	eventually(m.t, fmt.Sprintf("%q are stored", want), func() bool { m.hear(); return slices.Equal(m.names(), want) })
}

func (m *manager) start(dir string) *world {
	m.t.Helper()
	os.Remove(filepath.Join(dir, "ready"))
	var files []*os.File
	names := m.names()
	for _, name := range names {
		files = append(files, m.files[name])
	}
	env := []string{"NOTIFY_SOCKET=" + m.name, "KEEPER_TEST_LISTEN=1", fmt.Sprint("LISTEN_FDS=", len(files)), "LISTEN_FDNAMES=" + strings.Join(names, ":")}
	if len(files) == 0 {
		env = env[:1]
	}
	return start(m.t, dir, env, files...)
}

// TestRestart restarts a keeper, by a signal and by SIGKILL, that a manager holds
// descriptors for: mounts go on, and end when they end.
func TestRestart(t *testing.T) {
	m, dir := newManager(t), t.TempDir()
	w := m.start(dir)
	files, closed, aborted := pipe(t)
	w.tell(mountOf("a", files...))
	closeAll(files)
	long := mountOf("a")
	long.Rest = []byte(`"secret` + strings.Repeat("x", 1000) + `"`)
	w.tell(long)
	w.tell(mountOf("a")) // shorter again
	m.stores("a.0", "a.1", "a.journal")
	if m.ready != 1 {
		t.Fatalf("ready %d times", m.ready)
	}
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		worker := w.status().Worker
		w.cmd.Process.Signal(sig)
		w.cmd.Wait()
		syscall.Kill(worker, syscall.SIGKILL) // a manager ends the whole group
		m.hear()
		if aborted() || closed() {
			t.Fatalf("after %v the mount is aborted, or held by nobody", sig)
		}
		w = m.start(dir)
		if got, want := w.said(), "a {\"id\":\"a\"} \"secret\" 2 true\n"; got != want {
			t.Errorf("after %v given %q, want %q", sig, got, want)
		}
	}
	w.tell(Mount{ID: "a"})
	m.stores()
	eventually(t, "nobody holds the mount", closed)
}

// TestUnsent: what the manager could not be given it gets with what is told next.
func TestUnsent(t *testing.T) {
	m, dir := newManager(t), t.TempDir()
	w := m.start(dir)
	w.status()
	files, _, _ := pipe(t)
	if err := os.Rename(m.name, m.name+".away"); err != nil {
		t.Fatal(err)
	}
	w.tell(mountOf("a", files...))
	closeAll(files)
	w.status()
	m.hear()
	if got := m.names(); len(got) != 0 {
		t.Fatalf("stored %q by a manager that does not hear", got)
	}
	if err := os.Rename(m.name+".away", m.name); err != nil {
		t.Fatal(err)
	}
	w.tell(mountOf("a"))
	m.stores("a.0", "a.1", "a.journal")
	w.tell(Mount{ID: "a"})
	w.status()
}

// TestRestartShared: mounts that share files, of which the manager takes each once, get
// all of theirs after a restart, whichever of them has ended; and one whose journal is
// damaged keeps its own.
func TestRestartShared(t *testing.T) {
	m, dir := newManager(t), t.TempDir()
	w := m.start(dir)
	group, closed, _ := pipe(t)
	held := func(id string, own *os.File) {
		x := mountOf(id, group[0], group[1], own)
		x.Held = true
		w.tell(x)
	}
	var own [3]*os.File
	for i := range own {
		files, _, _ := pipe(t)
		own[i] = files[0]
		held(string(rune('a'+i)), own[i])
	}
	closeAll(group)
	again := func() {
		worker := w.status().Worker
		w.cmd.Process.Kill()
		w.cmd.Wait()
		syscall.Kill(worker, syscall.SIGKILL)
		m.hear()
		w = m.start(dir)
	}
	check := func(want ...string) {
		t.Helper()
		var lines []string
		for line := range strings.Lines(w.said()) {
			f := strings.Fields(line)
			lines = append(lines, f[0]+" "+f[3])
		}
		if !slices.Equal(lines, want) {
			t.Errorf("given %q, want %q", lines, want)
		}
	}
	m.stores("a.0", "a.1", "a.2", "a.held", "b.2", "b.held", "c.2", "c.held")
	again()
	check("a 3", "b 3", "c 3")
	w.tell(Mount{ID: "a"})
	m.stores("a.0", "a.1", "b.2", "b.held", "c.2", "c.held")
	again()
	check("b 3", "c 3")
	if _, err := m.files["b.held"].WriteAt(make([]byte, 2*journalPlace), 0); err != nil {
		t.Fatal(err)
	}
	again()
	check("b 1", "c 3")
	w.tell(Mount{ID: "b"})
	w.tell(Mount{ID: "c"})
	m.stores()
	eventually(t, "nobody holds what they shared", closed)
}

// TestRestoreDamaged: what is no mount is let go, and others are taken.
func TestRestoreDamaged(t *testing.T) {
	file := func(content string) *os.File {
		f, err := os.Create(filepath.Join(t.TempDir(), "f"))
		if err != nil {
			t.Fatal(err)
		}
		f.WriteString(content)
		t.Cleanup(func() { f.Close() })
		return f
	}
	journal := func(of string) *os.File {
		f := file("")
		if err := writeJournal(f, &Mount{ID: of, Show: []byte("1"), Rest: []byte("2")}); err != nil {
			t.Fatal(err)
		}
		return f
	}
	s := newStore(quiet())
	all := s.restore(map[string]*os.File{
		"a.journal": journal("a"), "a.0": file(""), "a.1": file(""),
		"b.journal": journal("a"), "b.0": file(""),
		"c.journal": file(`{"id":"c"`), "c.0": file(""),
		"d.journal": journal("d"), // its connection has ended
		"e.0":       file(""), "f": file(""),
	})
	var b bytes.Buffer
	for _, m := range all {
		fmt.Fprintf(&b, "%s %d;", m.ID, len(m.Files))
	}
	if b.String() != "a 2;" {
		t.Errorf("restored %q", &b)
	}
}
