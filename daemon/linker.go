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
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/link"
	"github.com/shale-image/shale/pool"
	"github.com/shale-image/shale/reader"
)

// An index is read and linked in a process of its own, and so are layers that
// have none. That takes the memory of the whole tree, which the service, that
// stays, need not have; and whatever hostile bytes do to it, the service's
// mounts live on.
//
// Such a process has what it reads as descriptors from 3 on, an order as JSON on
// standard input, and says a wireError on standard output if it fails.
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
}

// order is what to link where.
type order struct {
	Raw  reader.Raw `json:"raw"`
	Pool string     `json:"pool"` // directory
	Dir  string     `json:"dir"`  // to link into
}

// Init must come first in the main function of a program that runs a service.
// It returns, unless this process was started to do a part of a service's work;
// then it never does.
func Init() {
	if len(os.Args) == 0 || children[os.Args[0]] == nil {
		return
	}
	err := children[os.Args[0]]()
	if err == nil {
		os.Exit(0)
	}
	js, _ := json.Marshal(encodeError(err))
	os.Stdout.Write(js)
	os.Exit(1)
}

// readOrder reads an order, and opens the pool, which the caller closes.
func readOrder() (o order, p *pool.Pool, err error) {
	if err = json.NewDecoder(os.Stdin).Decode(&o); err != nil {
		return o, nil, err
	}
	o.Raw.File = os.NewFile(firstFile, o.Raw.Name)
	p, err = pool.OpenTables(o.Pool)
	return o, p, err
}

// readTree reads the index of an order. What of the content has come with it goes
// into the pool.
func (o *order) readTree(p *pool.Pool) (*index.Tree, error) {
	if o.Raw.Kind != reader.SOCI {
		return o.Raw.Tree()
	}
	b, err := p.Build()
	if err != nil {
		return nil, err
	}
	o.Raw.Keep = b.Add
	t, err := o.Raw.Tree()
	if err != nil {
		return nil, errors.Join(err, b.Abort())
	}
	_, err = b.Commit()
	return t, err
}

func linker() (err error) {
	o, p, err := readOrder()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.Close()) }()
	t, err := o.readTree(p)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if err := keepData(filepath.Join(filepath.Dir(o.Dir), sideDir), t); err != nil {
		return err
	}
	return link.Link(ctx, t, p, o.Dir)
}

// keepData keeps what a tree has of blobs that no repository has.
func keepData(dir string, t *index.Tree) error {
	for i := range t.Blobs {
		if b := &t.Blobs[i]; b.Data != nil {
			if err := keepBeside(dir, b.Digest, bytes.NewReader(b.Data)); err != nil {
				return err
			}
		}
	}
	return nil
}

// linkRaw has an index read and linked into dir. It appears whole or not at all.
func (s *store) linkRaw(ctx context.Context, raw *reader.Raw, dir string) error {
	defer s.pool.Exclusive()()
	if err := ctx.Err(); err != nil {
		return err
	}
	err := child(ctx, "shale-linker", order{Raw: *raw, Pool: s.poolDir, Dir: dir}, raw.File)
	// What a process made that was killed is the pool's too: the next link of
	// the image refers to it, or the next removal frees it.
	loaded := s.pool.Load()
	if err != nil {
		return fmt.Errorf("link %s: %w", raw.Name, err)
	}
	return loaded
}

// child runs one of the children.
func child(ctx context.Context, name string, order any, files ...*os.File) error {
	_, err := ask(ctx, name, order, files...)
	return err
}

// ask is child that returns what the child says on standard output.
func ask(ctx context.Context, name string, order any, files ...*os.File) ([]byte, error) {
	in, err := json.Marshal(order)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Args = []string{name}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(in), &out, os.Stderr
	cmd.ExtraFiles = files
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	// Asked to end it takes back what it has made.
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 2 * time.Second
	err = runOnThread(cmd)
	return out.Bytes(), orSaid(ctx, err, out.Bytes())
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
