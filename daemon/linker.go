package daemon

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"syscall"
	"time"

	"github.com/shale-image/shale/link"
	"github.com/shale-image/shale/pool"
	"github.com/shale-image/shale/reader"
)

// An index is read and linked in a process of its own. It takes the memory of
// the whole tree, which the service, that stays, need not have; and whatever a
// hostile index does to it, the service's mounts live on.
//
// The process has the fetched index as descriptor 3, an order as JSON on
// standard input, and says a wireError on standard output if it fails.
const (
	linkerName  = "shale-linker"
	linkerIndex = 3
)

// order is what to link where.
type order struct {
	Raw  reader.Raw `json:"raw"`
	Pool string     `json:"pool"` // directory
	Dir  string     `json:"dir"`  // to link into
}

// Init must come first in the main function of a program that runs a service.
// It returns, unless this process was started to link an image; then it never
// does.
func Init() {
	if len(os.Args) == 0 || os.Args[0] != linkerName {
		return
	}
	err := linker()
	if err == nil {
		os.Exit(0)
	}
	js, _ := json.Marshal(encodeError(err))
	os.Stdout.Write(js)
	os.Exit(1)
}

func linker() (err error) {
	var o order
	if err := json.NewDecoder(os.Stdin).Decode(&o); err != nil {
		return err
	}
	o.Raw.File = os.NewFile(linkerIndex, o.Raw.Name)
	t, err := o.Raw.Tree()
	if err != nil {
		return err
	}
	p, err := pool.OpenTables(o.Pool)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.Close()) }()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	return link.Link(ctx, t, p, o.Dir)
}

// linkRaw has an index read and linked into dir. It appears whole or not at all.
func (s *store) linkRaw(ctx context.Context, raw *reader.Raw, dir string) error {
	in, err := json.Marshal(order{Raw: *raw, Pool: s.poolDir, Dir: dir})
	if err != nil {
		return err
	}
	defer s.pool.Exclusive()()
	if err := ctx.Err(); err != nil {
		return err
	}
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Args = []string{linkerName}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(in), &out, os.Stderr
	cmd.ExtraFiles = []*os.File{raw.File}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	// Asked to end it takes back what it has made.
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 2 * time.Second
	err = runOnThread(cmd)
	// What a process made that was killed is the pool's too: the next link of
	// the image refers to it, or the next removal frees it.
	loaded := s.pool.Load()
	if err != nil {
		var w wireError
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case json.Unmarshal(out.Bytes(), &w) == nil && w.Text != "":
			return w.decode()
		}
		return fmt.Errorf("link %s: %w", raw.Name, err)
	}
	return loaded
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
