package keeper

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// SocketName is the keeper's own socket in the root directory. One request a
// connection: 'q' asks for Status, 'u' with a file for a worker from that program.
// The answer is 'r' or 'f'.
const SocketName = "keeper.sock"

const (
	kindStatus  = 'q'
	kindUpgrade = 'u'
	kindResult  = 'r'

	askTime    = 5 * time.Second
	maxAsking  = 16
	statusSize = 8 << 20 // of an answer, in packets
)

// Status is what a keeper knows.
type Status struct {
	Version string            `json:"version"`
	Keeper  int               `json:"keeper"`           // process ids
	Worker  int               `json:"worker,omitempty"` // 0: none is up
	Mounts  []json.RawMessage `json:"mounts"`           // Mount.Show
}

func address(dir string) (*net.UnixAddr, *os.File, error) {
	// Through a descriptor, since the path may be too long for an address.
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, &fs.PathError{Op: "open", Path: dir, Err: err}
	}
	return &net.UnixAddr{Net: "unixpacket", Name: fmt.Sprintf("/proc/self/fd/%d/%s", fd, SocketName)}, os.NewFile(uintptr(fd), dir), nil
}

func listen(dir string) (*net.UnixListener, error) {
	name := filepath.Join(dir, SocketName)
	if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	addr, at, err := address(dir)
	if err != nil {
		return nil, err
	}
	defer at.Close()
	l, err := net.ListenUnix("unixpacket", addr)
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false) // its name ends with at
	if err := os.Chmod(name, 0o600); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// answer serves the keeper's socket until it is closed.
func (k *keeper) answer() {
	places := make(chan struct{}, maxAsking)
	for {
		c, err := k.own.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			time.Sleep(time.Second) // too many files, perhaps
			continue
		}
		places <- struct{}{}
		go func() {
			defer func() { <-places }()
			defer c.Close()
			if _, err := Allowed(c); err == nil {
				k.reply(c)
			}
		}()
	}
}

func (k *keeper) reply(c *net.UnixConn) {
	within(c, askTime)
	kind, _, files, err := readPacket(c, make([]byte, 4<<10))
	if err != nil {
		return
	}
	if kind == kindUpgrade && len(files) == 1 {
		q := &swap{exe: files[0], done: make(chan error, 1)}
		select {
		case k.swaps <- q:
			err = <-q.done
		case <-time.After(askTime):
			files[0].Close()
			err = errors.New("no worker serves, or another is being exchanged")
		case <-k.ctx.Done():
			files[0].Close()
			return
		}
		within(c, askTime)
		if err != nil {
			writePacket(c, kindFail, err.Error())
			return
		}
	} else {
		closeAll(files)
	}
	st := k.status()
	for ; len(st.Mounts) > 100; st.Mounts = st.Mounts[100:] {
		if writePacket(c, kindMount, st.Mounts[:100]) != nil {
			return
		}
	}
	writePacket(c, kindResult, st)
}

func (k *keeper) status() *Status {
	k.mu.Lock()
	defer k.mu.Unlock()
	st := &Status{Version: k.o.Version, Keeper: os.Getpid(), Mounts: []json.RawMessage{}}
	if k.worker != nil {
		st.Worker = k.worker.pid
	}
	for _, m := range k.kept {
		st.Mounts = append(st.Mounts, m.Show)
	}
	return st
}

// Ask asks the keeper of a root directory what it knows. If there is none the error
// wraps fs.ErrNotExist or ECONNREFUSED.
func Ask(ctx context.Context, dir string) (*Status, error) { return ask(ctx, dir, kindStatus) }

// Upgrade has the keeper of a root directory exchange its worker for one that runs
// exe, under way and without a reader noticing more than a pause. If the new one
// cannot start, the service stays what it was.
func Upgrade(ctx context.Context, dir string, exe *os.File) (*Status, error) {
	return ask(ctx, dir, kindUpgrade, exe)
}

func ask(ctx context.Context, dir string, kind byte, files ...*os.File) (*Status, error) {
	addr, at, err := address(dir)
	if err != nil {
		return nil, err
	}
	defer at.Close()
	conn, err := new(net.Dialer).DialContext(ctx, addr.Net, addr.Name)
	if err != nil {
		return nil, err
	}
	c := conn.(*net.UnixConn)
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	if err := writePacket(c, kind, nil, files...); err != nil {
		return nil, err
	}
	st, buf := &Status{}, make([]byte, maxPacket)
	var more []json.RawMessage
	for n := 0; n < statusSize; {
		kind, body, files, err := readPacket(c, buf)
		closeAll(files)
		if err != nil {
			if ctx.Err() != nil {
				err = ctx.Err()
			}
			return nil, fmt.Errorf("keeper: %w", err)
		}
		n += len(body)
		switch kind {
		case kindMount:
			var some []json.RawMessage
			if err := json.Unmarshal(body, &some); err != nil {
				return nil, fmt.Errorf("keeper: %w", err)
			}
			more = append(more, some...)
		case kindResult:
			if err := json.Unmarshal(body, st); err != nil {
				return nil, fmt.Errorf("keeper: %w", err)
			}
			st.Mounts = append(more, st.Mounts...)
			return st, nil
		case kindFail:
			var text string
			_ = json.Unmarshal(body, &text)
			return nil, errors.New(text)
		}
	}
	return nil, errors.New("keeper: the answer is too long")
}
