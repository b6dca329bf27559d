package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/daemon"
)

// node is a machine that mounts images: a directory with the program's own service,
// keeper and worker.
type node struct {
	shale string
	dir   string // of all that is here
	root  string // of the service
	env   []string
	mnts  []string
	settings

	service *exec.Cmd // nil: does not run
	ended   chan struct{}
}

// settings are those of a node's configuration that matter here.
type settings struct {
	Registries  map[string]registrySettings `json:"registries"`
	ReadTimeout string                      `json:"read_timeout"`
	Cache       struct {
		Quota    int64  `json:"quota,omitempty"`
		Complete string `json:"complete"`
	} `json:"cache"`
}

type registrySettings struct {
	PlainHTTP bool     `json:"plain_http,omitempty"`
	Mirrors   []string `json:"mirrors,omitempty"`
}

// newNode makes a node; its service keeps what it has in root. The caller calls close.
func newNode(shale, dir, root string, s settings, env ...string) (*node, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	n := &node{shale: shale, dir: dir, root: root, settings: s}
	n.env = append(os.Environ(), append(env, "SHALE_ROOT="+root, "SHALE_CONFIG="+n.config())...)
	return n, n.configure(s.ReadTimeout)
}

func (n *node) config() string { return filepath.Join(n.dir, "config.json") }

// configure has reads wait so long from the next start of the service on.
func (n *node) configure(readTimeout string) error {
	n.ReadTimeout = readTimeout
	js, err := json.Marshal(n.settings)
	if err != nil {
		return err
	}
	return os.WriteFile(n.config(), js, 0o600)
}

// start starts the service, as a service manager does: what it says goes elsewhere
// than to its own disk.
func (n *node) start(ctx context.Context) error {
	if n.service != nil {
		return nil
	}
	log, err := os.OpenFile(filepath.Join(n.dir, "log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(n.shale, "daemon")
	cmd.Env, cmd.Stdout, cmd.Stderr = n.env, log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	n.service, n.ended = cmd, make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(n.ended)
	}()
	for {
		_, err := (&daemon.Client{Root: n.root}).Status(ctx)
		select {
		case <-n.ended:
			return fmt.Errorf("the service has ended: %v", cmd.ProcessState)
		case <-time.After(10 * time.Millisecond):
		}
		if err == nil || !errors.Is(err, daemon.ErrNotRunning) {
			return err
		}
	}
}

// mount mounts an image with a face, and returns where. It starts the service if need be.
func (n *node) mount(ctx context.Context, face, ref string) (string, error) {
	if err := n.start(ctx); err != nil {
		return "", err
	}
	mnt := filepath.Join(n.dir, fmt.Sprintf("mnt%d", len(n.mnts)))
	if err := os.MkdirAll(mnt, 0o755); err != nil {
		return "", err
	}
	if _, err := n.run(ctx, "mount", "--face", face, ref, mnt); err != nil {
		return "", err
	}
	n.mnts = append(n.mnts, mnt)
	return mnt, nil
}

// run runs the program, and returns what it prints.
func (n *node) run(ctx context.Context, args ...string) ([]byte, error) {
	var out, errout bytes.Buffer
	cmd := exec.CommandContext(ctx, n.shale, args...)
	cmd.Env, cmd.Stdout, cmd.Stderr = n.env, &out, &errout
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	if err := cmd.Run(); err != nil {
		return out.Bytes(), fmt.Errorf("shale %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(errout.Bytes()))
	}
	return out.Bytes(), nil
}

// whole tells whether nothing is missing of any mount.
func (n *node) whole(ctx context.Context) (bool, error) {
	st, err := n.status(ctx)
	if err != nil {
		return false, err
	}
	missing := 0
	for _, m := range st.Mounts {
		missing += m.MissingChunks
	}
	return missing == 0, nil
}

// failures are reads of mounts that the service knows to have failed.
func (n *node) failures(ctx context.Context) (count int64, why []string, err error) {
	st, err := n.status(ctx)
	if err != nil {
		return 0, nil, err
	}
	for _, m := range st.Mounts {
		count += m.Fill.Errors
		for _, f := range m.Fill.LastErrors {
			why = append(why, f.Error)
		}
	}
	return count, why, nil
}

func (n *node) status(ctx context.Context) (*daemon.Status, error) {
	st, err := (&daemon.Client{Root: n.root}).Status(ctx)
	for tries := 0; err != nil && tries < 3; tries++ { // the machine may be busy
		st, err = (&daemon.Client{Root: n.root}).Status(ctx)
	}
	return st, err
}

// log is the end of what the service has said.
func (n *node) log() string {
	b, _ := os.ReadFile(filepath.Join(n.dir, "log"))
	return string(b[max(0, len(b)-200000):])
}

// stop unmounts all and waits until the service has ended.
func (n *node) stop() error {
	for _, mnt := range n.mnts {
		if err := unix.Unmount(mnt, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("unmount %s: %w", mnt, err)
		}
	}
	n.mnts = nil
	if n.service == nil {
		return nil
	}
	defer func() { n.service = nil }()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	for ctx.Err() == nil {
		_ = (&daemon.Client{Root: n.root}).Stop(ctx)
		select {
		case <-n.ended:
			return nil
		case <-time.After(20 * time.Millisecond):
		}
	}
	return n.kill()
}

// kill ends a service that does not end by itself; its log then has why.
func (n *node) kill() error {
	st, err := (&daemon.Client{Root: n.root}).Status(context.Background())
	if err == nil {
		for _, p := range slices.Backward(st.Processes) { // the worker first: both write to one log
			_ = syscall.Kill(p.PID, syscall.SIGQUIT)
			time.Sleep(2 * time.Second)
		}
	}
	_ = n.service.Process.Kill()
	<-n.ended
	return errors.Join(errors.New("the service does not end"), err)
}

// close ends all that is here and removes it.
func (n *node) close() error { return errors.Join(n.stop(), os.RemoveAll(n.dir)) }
