package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// ErrNotRunning says that no service runs on the root directory.
var ErrNotRunning = errors.New("the node service is not running")

// Client talks to the node service of a root directory.
type Client struct {
	Root string
	// Start makes calls start the service if it does not run.
	Start bool
}

// call sends a request and waits for its result, which is decoded into out
// (if not nil). progress gets the progress packets. The descriptors that came
// with the result are the caller's to close.
func (c *Client) call(ctx context.Context, op string, args, out any, progress func(Progress)) ([]*os.File, error) {
	a, err := json.Marshal(args)
	if err != nil {
		return nil, err
	}
	q, err := json.Marshal(request{op, a})
	if err != nil {
		return nil, err
	}
	if len(q) > maxPacket {
		return nil, fmt.Errorf("request of %d bytes is too long", len(q))
	}
	conn, err := c.connect(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if err := send(conn, kindRequest, q); err != nil {
		return nil, err
	}
	var result []byte
	buf := make([]byte, maxPacket+1)
	for {
		kind, body, files, err := receive(conn, buf)
		if err != nil {
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			return nil, fmt.Errorf("node service: %w", err)
		}
		switch kind {
		case kindProgress:
			var p Progress
			if progress != nil && json.Unmarshal(body, &p) == nil {
				progress(p)
			}
		case kindPiece:
			result = append(result, body...)
		case kindResult:
			result = append(result, body...)
			if out != nil {
				if err := json.Unmarshal(result, out); err != nil {
					closeAll(files)
					return nil, fmt.Errorf("node service: bad result: %w", err)
				}
			}
			return files, nil
		case kindError:
			closeAll(files)
			var w wireError
			if err := json.Unmarshal(body, &w); err != nil {
				return nil, fmt.Errorf("node service: bad error: %w", err)
			}
			return nil, w.decode()
		}
	}
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// connect returns a connection that the service has said hello on. A service
// that is just ending refuses or drops connections without a hello: then
// another one is started.
func (c *Client) connect(ctx context.Context) (*net.UnixConn, error) {
	deadline := time.Now().Add(10 * time.Second)
	for {
		conn, err := dial(c.Root)
		if err == nil {
			return conn, nil
		}
		gone := errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ECONNREFUSED) ||
			errors.Is(err, syscall.ECONNRESET) || errors.Is(err, io.EOF)
		switch {
		case !gone:
			return nil, err
		case !c.Start:
			return nil, ErrNotRunning
		case time.Now().After(deadline):
			return nil, fmt.Errorf("the node service does not answer: %w; its log is %s", err, filepath.Join(c.Root, logName))
		}
		if err := c.spawn(ctx); err != nil {
			return nil, err
		}
	}
}

func dial(root string) (*net.UnixConn, error) {
	addr, dir, err := socketAddr(root)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	conn, err := net.DialUnix("unixpacket", nil, addr)
	if err != nil {
		return nil, err
	}
	conn.SetReadDeadline(time.Now().Add(5 * time.Second))
	kind, _, _, err := receive(conn, make([]byte, maxPacket+1))
	if err == nil && kind != kindHello {
		err = fmt.Errorf("%s: not the socket of a node service", filepath.Join(root, socketName))
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	conn.SetReadDeadline(time.Time{})
	return conn, nil
}

// spawn starts the service, outside this process' session, and waits until it
// serves or has failed.
func (c *Client) spawn(ctx context.Context) error {
	if err := os.MkdirAll(c.Root, 0o700); err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(c.Root, logName), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	cmd := exec.Command("/proc/self/exe", "daemon", "--root", c.Root, "--ready-fd", "3")
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Dir = "/"
	cmd.ExtraFiles = []*os.File{w}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	w.Close()
	if err != nil {
		return fmt.Errorf("start the node service: %w", err)
	}
	go cmd.Wait() // no zombie while we live; it outlives us
	stop := context.AfterFunc(ctx, func() { r.Close() })
	defer stop()
	said, err := io.ReadAll(io.LimitReader(r, 4096))
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		return err
	case string(said) == readyOK, string(said) == readyTaken: // somebody else was faster
		return nil
	case len(said) == 0:
		return fmt.Errorf("the node service died while it started; its log is %s", log.Name())
	}
	return fmt.Errorf("start the node service: %s", said)
}
