package keeper

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// Keeper and worker talk over a socket pair (SOCK_SEQPACKET) that the worker
// inherits. Each packet is one byte of kind and a body, JSON; files come with the
// packet they belong to.
//
//	keeper  m {...}  a mount to serve on, with its files; any number, then
//	keeper  g        go: nobody else serves them now
//	keeper  l        leave: another worker takes over
//	keeper  s        stop: the service ends
//	keeper  p        ping, if the worker's hello says that it answers; only when the
//	                 last one is answered
//	worker  h {...}  hello: it has come so far that it can be given mounts
//	worker  m {...}  a mount to keep, with its files; again without files when
//	                 more is known of it
//	worker  d {...}  a mount is no more
//	worker  p        it lives: the answer to a ping
//	worker  r        it serves
//	worker  f {...}  it cannot, and why; it is about to exit
//	worker  e        the service ends with it
//
// What a worker has sent is the keeper's, also if the worker dies right after: the
// kernel keeps packets, and the descriptors in them, until they are read.
const (
	kindMount = 'm'
	kindGo    = 'g'
	kindLeave = 'l'
	kindStop  = 's'
	kindHello = 'h'
	kindDrop  = 'd'
	kindReady = 'r'
	kindFail  = 'f'
	kindEnd   = 'e'
	kindPing  = 'p'

	// protocol is that of this socket. It changes only if a worker could not
	// understand an older keeper.
	//
	// Version 2: mounts have up to MaxFiles files, and may be Held.
	protocol = 2

	maxPacket = 160 << 10 // a journal holds a request of 64 KiB and little more
)

// MaxFiles bounds the files of a mount: so many go in one packet (SCM_MAX_FD).
const MaxFiles = 253

type hello struct {
	Protocol int    `json:"protocol"`
	Version  string `json:"version"`
	Pings    bool   `json:"pings,omitempty"` // it answers them
}

func writePacket(c *net.UnixConn, kind byte, body any, files ...*os.File) error {
	p := []byte{kind}
	if body != nil {
		js, err := json.Marshal(body)
		if err != nil {
			return err
		}
		p = append(p, js...)
	}
	if len(p) > maxPacket {
		return fmt.Errorf("keeper: packet of %d bytes, at most %d", len(p), maxPacket)
	}
	var oob []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			// Not f.Fd(): that makes all who have the file block in it.
			if err := descriptor(f, func(fd int) { fds[i] = fd }); err != nil {
				return err
			}
		}
		oob = unix.UnixRights(fds...)
	}
	_, _, err := c.WriteMsgUnix(p, oob, nil)
	runtime.KeepAlive(files)
	return err
}

func descriptor(f *os.File, use func(fd int)) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Control(func(fd uintptr) { use(int(fd)) })
}

// file makes a File of a descriptor which is only kept. The runtime does not see what
// it is: it would ask to be woken whenever there is something to be read from it.
func file(fd int, name string) (*os.File, error) {
	defer unix.Close(fd)
	null, err := unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: os.DevNull, Err: err}
	}
	f := os.NewFile(uintptr(null), name)
	if err := unix.Dup3(fd, null, unix.O_CLOEXEC); err != nil {
		f.Close()
		return nil, os.NewSyscallError("dup3", err)
	}
	return f, nil
}

// readPacket reads a packet into buf, which has maxPacket bytes. At the end of
// the connection it returns io.EOF.
func readPacket(c *net.UnixConn, buf []byte) (kind byte, body []byte, files []*os.File, err error) {
	oob := make([]byte, unix.CmsgSpace(4*MaxFiles))
	n, on, flags, _, err := c.ReadMsgUnix(buf, oob)
	if err != nil {
		return 0, nil, nil, err
	}
	if msgs, e := unix.ParseSocketControlMessage(oob[:on]); e == nil {
		for _, m := range msgs {
			fds, _ := unix.ParseUnixRights(&m)
			for _, fd := range fds {
				f, e := file(fd, "kept")
				if e != nil {
					err = e
					continue
				}
				files = append(files, f)
			}
		}
	}
	if err != nil {
		closeAll(files)
		return 0, nil, nil, err
	}
	if n == 0 {
		closeAll(files)
		return 0, nil, nil, io.EOF
	}
	if flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		closeAll(files)
		return 0, nil, nil, fmt.Errorf("keeper: packet is cut off: %w", unix.EMSGSIZE)
	}
	return buf[0], buf[1:n], files, nil
}

// pair makes two connected sockets: one for this process, one to be inherited.
func pair() (*net.UnixConn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	theirs := os.NewFile(uintptr(fds[1]), "keeper")
	ours, err := fileConn(os.NewFile(uintptr(fds[0]), "worker"))
	if err != nil {
		theirs.Close()
	}
	return ours, theirs, err
}

// fileConn makes a connection of a socket, and closes f.
func fileConn(f *os.File) (*net.UnixConn, error) {
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, fmt.Errorf("keeper: %s is no unix socket", f.Name())
	}
	return u, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// within gives a call on a connection a deadline.
func within(c *net.UnixConn, d time.Duration) { c.SetDeadline(time.Now().Add(d)) }
