package e2e

import (
	"bufio"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// session is a container that reads files when it is told to.
type session struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

// session starts one. It ends with the test.
func (n *node) session(t *testing.T, ref string, flags ...string) *session {
	t.Helper()
	args := append(append([]string{"run", "--rm", "-i"}, flags...), ref, "/bin/sh", "-c", `while read -r f; do sha256sum "$f" 2>&1; done`)
	s := &session{cmd: exec.Command(n.w.shale, args...)}
	s.cmd.Env = append(os.Environ(), "SHALE_ROOT="+n.root)
	s.cmd.Stderr = os.Stderr
	var err error
	if s.in, err = s.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	s.out = bufio.NewReader(out)
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.in.Close() // which ends it
		if err := s.cmd.Wait(); err != nil && s.cmd.ProcessState.ExitCode() != 1 {
			t.Errorf("a container: %v", err)
		}
	})
	return s
}

// sum has the container read a file, and returns what it says of it.
func (s *session) sum(t *testing.T, name string) string {
	t.Helper()
	if _, err := fmt.Fprintf(s.in, "/%s\n", name); err != nil {
		t.Error(err)
	}
	line, err := s.out.ReadString('\n')
	if err != nil {
		t.Errorf("the container has ended: %v", err)
	}
	return strings.TrimSpace(line)
}

// right has the container read a file, and tells whether that is what it is.
func (s *session) right(t *testing.T, w *world, name string) bool {
	t.Helper()
	p, err := os.ReadFile(filepath.Join(w.truth, name))
	if err != nil {
		t.Error(err)
	}
	want := fmt.Sprintf("%x  /%s", sha256.Sum256(p), name)
	got := s.sum(t, name)
	if got != want && !strings.HasSuffix(got, "Input/output error") {
		t.Errorf("%s, want %s", got, want)
	}
	return got == want
}

// TestRegistryGone: the registry goes away for SHALE_GONE (5s by default; "10m" is
// what is promised) while two containers run. One has all of its image, and never
// notices. The other waits for what it has not, gets the error that is documented, and
// reads it when the registry is back, with nothing started anew.
func TestRegistryGone(t *testing.T) {
	w := setup(t)
	gone := 5 * time.Second
	if s := os.Getenv("SHALE_GONE"); s != "" {
		var err error
		if gone, err = time.ParseDuration(s); err != nil {
			t.Fatal(err)
		}
	}
	n, p := w.node(t), w.proxy(t)
	complete, partial := p.Host()+"/"+name, p.Host()+"/"+plainName
	n.shale(0, "pull", "-q", "--complete", complete)
	// They share no chunks: the same bytes would be here for both.
	m := w.node(t)
	a, b := n.session(t, complete), m.session(t, partial, "--no-complete")
	files := someFiles(t, w.truth, 300)
	cold, shown := files[:100], files[100:]
	for _, s := range []*session{a, b} {
		if !s.right(t, w, shown[0]) { // the programs that read are here, too
			t.Fatal("nothing can be read")
		}
	}
	before := fmt.Sprint(m.status().Processes)

	if err := p.Refuse(true); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	reads := make(chan int)
	go func() { // all the time
		i := 0
		for ; time.Since(start) < gone; i++ {
			if name := shown[i%len(shown)]; !a.right(t, w, name) {
				t.Errorf("the complete image: %s cannot be read", name)
			}
			time.Sleep(gone / 2000)
		}
		reads <- i
	}()
	failures := 0
	var longest, shortest time.Duration
	for time.Since(start) < gone && failures < 20 {
		if !b.right(t, w, shown[0]) {
			t.Error("what was read before cannot be read again")
		}
		began := time.Now()
		if b.right(t, w, cold[failures]) {
			cold = append(cold[:failures], cold[failures+1:]...) // it came along with another
			continue
		}
		took := time.Since(began)
		if longest = max(longest, took); shortest == 0 {
			shortest = took
		}
		shortest = min(shortest, took)
		failures++
	}
	if failures == 0 {
		t.Error("nothing failed: there was no need of the registry")
	}
	right := <-reads
	t.Logf("gone for %v: %d reads of the complete image; of the other %d failed, after %v to %v", time.Since(start), right, failures, shortest, longest)
	if err := p.Refuse(false); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Second) // a failure stands for a moment
	for _, name := range cold {
		if !b.right(t, w, name) {
			t.Errorf("%s cannot be read when the registry is back", name)
		}
	}
	// The complete image needs no process of the service, which may have ended.
	if after := fmt.Sprint(m.status().Processes); after != before {
		t.Errorf("processes were %s, and are %s", before, after)
	}
}
