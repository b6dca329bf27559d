package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/pool"
	"github.com/shale-image/shale/reader"
)

// The API is one request a connection over a SOCK_SEQPACKET socket in the
// root directory, so that packets have boundaries and a file descriptor comes
// with exactly the packet it belongs to. Each packet is one byte of kind and a
// body:
//
//	server  h {...}    hello, JSON: the connection will be served
//	client  q {...}    the request, JSON
//	server  p {...}    progress, JSON; any number
//	server  d ...      a piece of the result, or descriptors; any number
//	server  r ...      the last piece of the result
//	server  e {...}    instead of r, or of h: an error, JSON
//
// The request "stop" means the same in every protocol, so that a program can
// always end the service of another version.
const (
	kindHello    = 'h'
	kindRequest  = 'q'
	kindProgress = 'p'
	kindPiece    = 'd'
	kindResult   = 'r'
	kindError    = 'e'

	protocol   = 1
	maxPacket  = 64 << 10
	socketName = "shale.sock"

	// helloTime is how long a service may take to say hello, and a client to
	// say what it wants.
	helloTime = 5 * time.Second
	// resultTime is how long a client may take to accept a result, progressTime
	// what it may hold up work for: it can have been stopped with Ctrl-Z.
	resultTime   = time.Minute
	progressTime = 10 * time.Millisecond
)

// hello is what a service says first.
type hello struct {
	Protocol int    `json:"protocol"`
	Version  string `json:"version"` // of the program
}

type request struct {
	Op   string          `json:"op"`
	Args json.RawMessage `json:"args,omitempty"`
}

// errEnding is what calls get that a service ending cuts short.
var errEnding = errors.New("the node service is being ended")

// wireError carries an error and which of the sentinels it wraps.
type wireError struct {
	Text  string   `json:"text"`
	Kinds []string `json:"kinds,omitempty"`
}

// kinds are the sentinels that survive the way over the socket.
var kinds = []struct {
	name string
	err  error
}{
	{"no-space", pool.ErrNoSpace},
	{"unauthorized", blob.ErrUnauthorized},
	{"wrong-platform", image.ErrPlatform},
	{"unasked", ErrUnasked},
	{"not-an-image", image.ErrNotImage},
	{"no-index", reader.ErrNoIndex},
	{"corrupt", chunk.ErrCorrupt},
	{"range", blob.ErrRange},
	{"limit", index.ErrLimit},
	{"unsupported", index.ErrUnsupported},
	{"busy", ErrBusy},
	{"unavailable", blob.ErrUnavailable},
	{"not-found", blob.ErrNotFound},
	{"not-exist", fs.ErrNotExist},
	{"permission", fs.ErrPermission},
}

func encodeError(err error) wireError {
	w := wireError{Text: err.Error()}
	const long = maxPacket / 8 // encoded it may be six times as long
	if len(w.Text) > long {
		w.Text = strings.ToValidUTF8(w.Text[:long], "") + "..."
	}
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		err = errors.Join(err, pool.ErrNoSpace)
	}
	for _, k := range kinds {
		if errors.Is(err, k.err) {
			w.Kinds = append(w.Kinds, k.name)
		}
	}
	return w
}

func (w wireError) decode() error {
	e := &remoteError{text: w.Text}
	for _, k := range kinds {
		for _, name := range w.Kinds {
			if k.name == name {
				e.kinds = append(e.kinds, k.err)
			}
		}
	}
	return e
}

// remoteError is an error of another process as it is seen here.
type remoteError struct {
	text  string
	kinds []error
}

func (e *remoteError) Error() string   { return e.text }
func (e *remoteError) Unwrap() []error { return e.kinds }

// socketAddr gives an address for the socket in root that fits into the 108
// bytes of a socket address, however long root is. The directory must be kept
// open while the address is in use.
func socketAddr(root string) (*net.UnixAddr, *os.File, error) {
	fd, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, &fs.PathError{Op: "open", Path: root, Err: err}
	}
	dir := os.NewFile(uintptr(fd), root)
	return &net.UnixAddr{Net: "unixpacket", Name: filepath.Join("/proc/self/fd", fmt.Sprint(fd), socketName)}, dir, nil
}

// send sends one packet, or fails if the peer does not take it in time.
func send(c *net.UnixConn, within time.Duration, kind byte, body []byte, files ...*os.File) error {
	var oob []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		oob = unix.UnixRights(fds...)
	}
	c.SetWriteDeadline(time.Now().Add(within))
	_, _, err := c.WriteMsgUnix(append([]byte{kind}, body...), oob, nil)
	return err
}

// receive reads one packet into buf, which has maxPacket+1 bytes.
func receive(c *net.UnixConn, buf []byte) (kind byte, body []byte, files []*os.File, err error) {
	oob := make([]byte, unix.CmsgSpace(4*4))
	n, on, flags, _, err := c.ReadMsgUnix(buf, oob)
	if err != nil {
		return 0, nil, nil, err
	}
	if msgs, e := unix.ParseSocketControlMessage(oob[:on]); e == nil {
		for _, m := range msgs {
			fds, e := unix.ParseUnixRights(&m)
			if e != nil {
				continue
			}
			for _, fd := range fds {
				unix.CloseOnExec(fd)
				files = append(files, os.NewFile(uintptr(fd), "received"))
			}
		}
	}
	if n == 0 || flags&unix.MSG_TRUNC != 0 {
		closeAll(files)
		return 0, nil, nil, fmt.Errorf("the service ended the connection: %w", syscall.ECONNRESET)
	}
	return buf[0], buf[1:n], files, nil
}

// watchHangup returns a context that ends when the peer goes away, so that
// Ctrl-C in a client ends the work it asked for.
func watchHangup(ctx context.Context, c *net.UnixConn) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		var b [1]byte
		c.Read(b[:]) // the client sends nothing more: any return is its end
		cancel()
	}()
	return ctx, cancel
}
