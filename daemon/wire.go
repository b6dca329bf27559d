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
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/pool"
)

// The API is one request a connection over a SOCK_SEQPACKET socket in the
// root directory, so that packets have boundaries and a file descriptor comes
// with exactly the packet it belongs to. Each packet is one byte of kind and a
// body:
//
//	server  h          hello: the connection will be served
//	client  q {...}    the request, JSON
//	server  p {...}    progress, JSON; any number
//	server  d ...      a piece of the result; any number
//	server  r ...      the last piece of the result, with descriptors if any
//	server  e {...}    instead of r: an error, JSON
const (
	kindHello    = 'h'
	kindRequest  = 'q'
	kindProgress = 'p'
	kindPiece    = 'd'
	kindResult   = 'r'
	kindError    = 'e'

	maxPacket  = 64 << 10
	socketName = "shale.sock"
)

type request struct {
	Op   string          `json:"op"`
	Args json.RawMessage `json:"args,omitempty"`
}

// wireError carries an error and which of the sentinels it wraps.
type wireError struct {
	Text string `json:"text"`
	Kind string `json:"kind,omitempty"`
}

// kinds are the sentinels that survive the way over the socket.
var kinds = map[string]error{
	"not-found":      blob.ErrNotFound,
	"unauthorized":   blob.ErrUnauthorized,
	"unavailable":    blob.ErrUnavailable,
	"not-an-image":   image.ErrNotImage,
	"wrong-platform": image.ErrPlatform,
	"corrupt":        chunk.ErrCorrupt,
	"unsupported":    index.ErrUnsupported,
	"limit":          index.ErrLimit,
	"no-space":       pool.ErrNoSpace,
	"not-exist":      fs.ErrNotExist,
	"busy":           ErrBusy,
}

func encodeError(err error) wireError {
	for name, sentinel := range kinds {
		if errors.Is(err, sentinel) {
			return wireError{err.Error(), name}
		}
	}
	return wireError{Text: err.Error()}
}

func (w wireError) decode() error {
	if sentinel, ok := kinds[w.Kind]; ok {
		return &remoteError{w.Text, sentinel}
	}
	return errors.New(w.Text)
}

// remoteError is an error of the service as the client sees it.
type remoteError struct {
	text string
	kind error
}

func (e *remoteError) Error() string { return e.text }
func (e *remoteError) Unwrap() error { return e.kind }

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

func send(c *net.UnixConn, kind byte, body []byte, files ...*os.File) error {
	var oob []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		oob = unix.UnixRights(fds...)
	}
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
		for _, f := range files {
			f.Close()
		}
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
