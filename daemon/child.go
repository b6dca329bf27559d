package daemon

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/mount"
)

// Such a process has what it reads as descriptors from 3 on, an order as JSON on
// standard input, and says a wireError on standard output if it fails. Its argument
// is how much memory it may have.
const firstFile = 3

// children are the programs that this one also is, by their names.
var children = map[string]func() error{
	"shale-linker":  linker,
	"shale-scanner": scanner,
	"shale-planner": planner,
	"shale-tracer":  tracer,
	"shale-sharer":  sharer,
	"shale-lister":  lister,
	looker:          lookUp,
	"shale-sealer":  sealer,
	kernelTrier:     mount.TryKernel,
}

// Init must come first in the main function of a program that runs a service.
// It returns, unless this process was started to do a part of a service's work;
// then it never does.
func Init() {
	if len(os.Args) == 0 || children[os.Args[0]] == nil {
		return
	}
	if len(os.Args) > 1 {
		if n, err := strconv.ParseInt(os.Args[1], 10, 64); err == nil {
			limitMemory(n)
		}
	}
	err := children[os.Args[0]]()
	if err == nil {
		os.Exit(0)
	}
	js, _ := json.Marshal(encodeError(err))
	os.Stdout.Write(js)
	os.Exit(1)
}

// limitMemory bounds the memory of this process, in bytes: the collector keeps it
// there as long as it can, and the kernel maps no more than twice as much. (To link a
// million files 420 MB are used of 650 MB that are mapped.) It is RLIMIT_DATA, since
// RLIMIT_AS would count what Go only reserves, and what is mapped of the pool. If the
// machine itself runs out of memory this process is to go, not one that serves mounts.
func limitMemory(n int64) {
	debug.SetMemoryLimit(n)
	var l unix.Rlimit
	if most := 2 * uint64(n); unix.Getrlimit(unix.RLIMIT_DATA, &l) == nil && l.Max > most {
		_ = unix.Setrlimit(unix.RLIMIT_DATA, &unix.Rlimit{Cur: most, Max: most})
	}
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("1000"), 0)
}

// child runs one of the children.
func (s *store) child(ctx context.Context, name string, order any, files ...*os.File) error {
	_, err := s.ask(ctx, name, order, files...)
	return err
}

// ask is child that returns what the child says on standard output.
func (s *store) ask(ctx context.Context, name string, order any, files ...*os.File) ([]byte, error) {
	in, err := json.Marshal(order)
	if err != nil {
		return nil, err
	}
	return s.run(ctx, name, bytes.NewReader(in), files...)
}

// run is ask with the order as it comes.
func (s *store) run(ctx context.Context, name string, in io.Reader, files ...*os.File) ([]byte, error) {
	var out bytes.Buffer
	var dump head
	memory := s.limits().Memory
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Args = []string{name, strconv.FormatInt(memory, 10)}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = in, &out, &dump
	cmd.ExtraFiles = files
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	// Asked to end it takes back what it has made.
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 2 * time.Second
	err := runOnThread(cmd)
	if err != nil && ctx.Err() == nil && dump.outOfMemory() {
		return nil, index.Errorf(index.ErrLimit, name, -1, "it needs more than %d bytes of memory (Memory)", memory)
	}
	os.Stderr.Write(dump)
	return out.Bytes(), orSaid(ctx, err, out.Bytes())
}

// head is the first of what is written.
type head []byte

func (h *head) Write(p []byte) (int, error) {
	*h = append(*h, p[:min(len(p), max(0, 64<<10-len(*h)))]...)
	return len(p), nil
}

// outOfMemory tells whether it is what Go's runtime says when it gets no memory.
func (h head) outOfMemory() bool {
	_, says, ok := bytes.Cut(h, []byte("fatal error: "))
	says, _, _ = bytes.Cut(says, []byte("\n"))
	return ok && (bytes.Contains(says, []byte("out of memory")) || bytes.Contains(says, []byte("cannot allocate")))
}

// orSaid is the error of a child, which it may have told.
func orSaid(ctx context.Context, err error, said []byte) error {
	var w wireError
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case json.Unmarshal(said, &w) == nil && w.Text != "":
		return w.decode()
	}
	return err
}

// runOnThread runs a command from a thread of its own: the kernel sends
// Pdeathsig when the thread that forked ends, and those that serve mounts do.
func runOnThread(cmd *exec.Cmd) error {
	ended := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		ended <- cmd.Run()
	}()
	return <-ended
}
