package fanotify

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

var quiet = slog.New(slog.DiscardHandler)

// TestMain is also a process that answers, with descriptors 3 to 5: group, journal and
// the file; and what else the role says.
func TestMain(m *testing.M) {
	if os.Getenv("FANOTIFY_TEST_SERVE") != "" {
		serve()
	}
	goleak.VerifyTestMain(m)
}

const (
	block    = 4096
	fileSize = 4 << 20
)

// content is what block n shall have; zeros are wrong.
func content(n int64) []byte {
	r := rand.New(rand.NewPCG(1, uint64(n)))
	p := make([]byte, block)
	for i := range p {
		p[i] = byte(1 + r.IntN(255))
	}
	return p
}

// filler brings blocks of a sparse file that was opened before its mark.
type filler struct {
	f     *os.File
	delay func(Event)
	fail  atomic.Bool

	mu     sync.Mutex
	here   map[int64]bool
	events []Event
}

func (x *filler) blocks(e Event) (from, to int64) {
	return e.Off / block, (min(e.Off+e.Size, fileSize) + block - 1) / block
}

func (x *filler) Here(e Event) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.events = append(x.events, e)
	for n, to := x.blocks(e); n < to; n++ {
		if !x.here[n] {
			return false
		}
	}
	return true
}

func (x *filler) Bring(e Event) error {
	if x.delay != nil {
		x.delay(e)
	}
	if x.fail.Load() {
		return errors.New("not to be had")
	}
	for n, to := x.blocks(e); n < to; n++ {
		if _, err := x.f.WriteAt(content(n), n*block); err != nil {
			return err
		}
		x.mu.Lock()
		x.here[n] = true
		x.mu.Unlock()
	}
	return nil
}

// asked are the events so far.
func (x *filler) asked() []Event {
	x.mu.Lock()
	defer x.mu.Unlock()
	return slices.Clone(x.events)
}

func newFiller(f *os.File) *filler { return &filler{f: f, here: map[int64]bool{}} }

// marked makes a group with one sparse file, and skips the test where there is none.
func marked(t *testing.T, dir string) (*Group, *os.File) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	f, err := os.OpenFile(filepath.Join(dir, "data"), os.O_CREATE|os.O_RDWR, 0o600)
	if err == nil {
		err = f.Truncate(fileSize)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	g, err := New(quiet)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Mark(f); errors.Is(err, errors.ErrUnsupported) || errors.Is(err, unix.EINVAL) {
		g.Close()
		t.Skip(err)
	} else if err != nil {
		t.Fatal(err)
	}
	return g, f
}

// check reads as others do.
func check(path string, off int64, n int) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	p := make([]byte, n)
	if _, err := f.ReadAt(p, off); err != nil {
		return err
	}
	for i := int64(0); i < int64(n); i += block {
		if want := content((off + i) / block); !bytes.Equal(p[i:i+block], want) {
			return fmt.Errorf("wrong bytes at %d", off+i)
		}
	}
	return nil
}

// serve answers until it is killed, and takes its time for some.
func serve() {
	g, err := Take(os.NewFile(3, "group"), os.NewFile(4, "journal"), slog.Default())
	if err != nil {
		panic(err)
	}
	var held []*os.File // so that numbers differ from time to time
	for range rand.IntN(20) {
		f, _ := os.Open(os.DevNull)
		held = append(held, f)
	}
	x := newFiller(os.NewFile(5, "data"))
	x.delay = func(Event) {
		if os.Getenv("FANOTIFY_TEST_SERVE") == "hang" {
			fmt.Println("asked")
			select {}
		}
		time.Sleep(time.Duration(rand.IntN(3000)) * time.Microsecond)
	}
	g.Serve(x)
	for {
		time.Sleep(time.Millisecond)
		if len(held) > 0 {
			held[0].Close()
			held = held[1:]
		}
	}
}

// process starts one.
func process(t *testing.T, how string, g *Group, f *os.File) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "FANOTIFY_TEST_SERVE="+how)
	group, journal := g.Files()
	cmd.ExtraFiles = []*os.File{group, journal, f}
	cmd.Stderr = os.Stderr
	return cmd
}

func within(t *testing.T, what string, done <-chan struct{}) {
	t.Helper()
	select {
	case <-done:
	case <-time.After(30 * time.Second):
		t.Fatalf("%s: nothing after 30 s", what)
	}
}

func kill(cmd *exec.Cmd) {
	cmd.Process.Signal(syscall.SIGKILL)
	cmd.Wait()
}
