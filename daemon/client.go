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
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/shale-image/shale/index"
)

// ErrNotRunning says that no service runs on the root directory.
var ErrNotRunning = errors.New("the node service is not running")

// Client talks to the node service of a root directory.
type Client struct {
	Root string
	// Start makes calls start the service if it does not run.
	Start bool
}

// callTries is how often a call is made whose worker dies under it. Another one takes
// over soon, and the user need not know; but perhaps it dies of this call.
const callTries = 4

// call sends a request and waits for its result, which is decoded into out
// (if not nil). progress gets the progress packets. The descriptors that came
// with the result are the caller's to close. If the worker dies meanwhile the call is
// made again, but for those that could have done something for good.
func (c *Client) call(ctx context.Context, op string, args, out any, progress func(Progress)) (files []*os.File, err error) {
	for range callTries {
		files, err = c.callOnce(ctx, op, args, out, progress)
		if err == nil || ctx.Err() != nil || op == "remove" || op == "stop" || !errors.Is(err, errCut) {
			break
		}
	}
	return files, err
}

// errCut says that the worker has died, or gives way to another.
var errCut = errors.New("it has ended under the call")

func (c *Client) callOnce(ctx context.Context, op string, args, out any, progress func(Progress)) ([]*os.File, error) {
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
	conn, said, err := c.connect(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if said.Protocol != protocol && op != "stop" {
		return nil, fmt.Errorf("the node service is of another version (%s, protocol %d; this program has protocol %d): unmount its images and run `shale --root %s daemon stop`; the next command starts the right one: %w",
			said.Version, said.Protocol, protocol, c.Root, index.ErrUnsupported)
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if err := send(conn, resultTime, kindRequest, q); err != nil {
		return nil, orDone(ctx, cut(err))
	}
	var result []byte
	var files []*os.File
	buf := make([]byte, maxPacket+1)
	for {
		kind, body, more, err := receive(conn, buf)
		files = append(files, more...)
		if err != nil {
			closeAll(files)
			return nil, orDone(ctx, fmt.Errorf("node service: %w; its log is %s", cut(err), c.log()))
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

// cut adds errCut to errors of a connection whose other end has died.
func cut(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) {
		err = fmt.Errorf("%w: %w", errCut, err)
	}
	return err
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// orDone returns err, or why ctx has ended, which then is behind err.
func orDone(ctx context.Context, err error) error {
	switch {
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return fmt.Errorf("the node service does not answer: %w", ctx.Err())
	case ctx.Err() != nil:
		return ctx.Err()
	}
	return err
}

func (c *Client) log() string { return filepath.Join(c.Root, logName) }

// startTime is how long a service may take to start or to end: after the
// machine has crashed it hashes what it finds.
const startTime = time.Minute

// connect returns a connection that the service has said hello on, and what it
// said. A worker that is just ending drops connections without a hello, and a
// service that has ended refuses them: then another one is started.
func (c *Client) connect(ctx context.Context) (*net.UnixConn, hello, error) {
	deadline := time.Now().Add(startTime)
	for pause := time.Duration(0); ; pause = min(2*pause+5*time.Millisecond, 200*time.Millisecond) {
		conn, said, err := dial(ctx, c.Root)
		if err == nil {
			return conn, said, nil
		}
		gone := errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ECONNREFUSED)
		switch {
		case !gone && !errors.Is(err, errCut):
			return nil, said, err
		case gone && !c.Start:
			return nil, said, ErrNotRunning
		case time.Now().After(deadline):
			return nil, said, fmt.Errorf("the node service does not answer: %w; its log is %s", err, c.log())
		}
		select {
		case <-ctx.Done():
			return nil, said, orDone(ctx, nil)
		case <-time.After(pause):
		}
		if !gone {
			continue // another worker, or the end
		}
		if err := c.spawn(ctx); err != nil {
			return nil, said, err
		}
	}
}

func dial(ctx context.Context, root string) (_ *net.UnixConn, said hello, err error) {
	ctx, cancel := context.WithTimeout(ctx, helloTime)
	defer cancel()
	addr, dir, err := socketAddr(root)
	if err != nil {
		return nil, said, err
	}
	defer dir.Close()
	c, err := new(net.Dialer).DialContext(ctx, addr.Net, addr.Name)
	if err != nil {
		return nil, said, orDone(ctx, err)
	}
	conn := c.(*net.UnixConn)
	defer func() {
		if err != nil {
			conn.Close()
		}
	}()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	kind, body, files, err := receive(conn, make([]byte, maxPacket+1))
	closeAll(files)
	if err != nil {
		return nil, said, orDone(ctx, cut(err))
	}
	switch {
	case kind == kindHello && (len(body) == 0 || json.Unmarshal(body, &said) == nil):
		return conn, said, nil
	case kind == kindError:
		var w wireError
		if json.Unmarshal(body, &w) == nil {
			return nil, said, w.decode()
		}
	}
	return nil, said, fmt.Errorf("%s: not the socket of a node service", filepath.Join(root, socketName))
}

// spawn starts the service, outside this process' session, and waits until it
// serves or has failed.
func (c *Client) spawn(ctx context.Context) error {
	if err := os.MkdirAll(c.Root, 0o700); err != nil {
		return err
	}
	log, err := os.OpenFile(c.log(), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	root, err := filepath.Abs(c.Root) // it has another working directory
	if err != nil {
		return err
	}
	cmd := exec.Command("/proc/self/exe", "daemon", "--root", root, "--ready-fd", "3")
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Dir = "/"
	cmd.Env = slices.DeleteFunc(os.Environ(), func(v string) bool { // the caller's manager is not its
		return strings.HasPrefix(v, "NOTIFY_SOCKET=") || strings.HasPrefix(v, "LISTEN_")
	})
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
	said, err := io.ReadAll(io.LimitReader(r, maxPacket))
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		return err
	case string(said) == readyOK, string(said) == readyTaken: // somebody else was faster
		return nil
	case len(said) == 0:
		return fmt.Errorf("the node service died while it started; its log is %s", c.log())
	}
	var why wireError
	if err := json.Unmarshal(said, &why); err != nil {
		return fmt.Errorf("start the node service: %q", said)
	}
	return fmt.Errorf("start the node service: %w", why.decode())
}
