package keeper

import (
	"fmt"
	"net"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Peer is who has connected, as the kernel knows it.
type Peer struct {
	PID    int32    `json:"-"`
	UID    uint32   `json:"uid"`
	GID    uint32   `json:"gid"`
	Groups []uint32 `json:"groups"`
}

// PeerOf tells who is at the other end of a connection.
func PeerOf(c *net.UnixConn) (p Peer, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return p, err
	}
	if cerr := raw.Control(func(fd uintptr) { p, err = peer(int(fd)) }); cerr != nil {
		return p, cerr
	}
	return p, err
}

func peer(fd int) (Peer, error) {
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return Peer{}, os.NewSyscallError("getsockopt SO_PEERCRED", err)
	}
	p := Peer{PID: cred.Pid, UID: cred.Uid, GID: cred.Gid}
	for n := uint32(64); ; { // NGROUPS_MAX is 65536
		groups := make([]uint32, n)
		size := 4 * n
		_, _, e := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&groups[0])), uintptr(unsafe.Pointer(&size)), 0)
		runtime.KeepAlive(groups)
		switch {
		case e == unix.ERANGE && size > 4*n && size <= 4*65536: // that is how many there are
			n = size / 4
			continue
		case e != 0:
			return Peer{}, os.NewSyscallError("getsockopt SO_PEERGROUPS", e)
		}
		p.Groups = groups[:size/4]
		return p, nil
	}
}

// Allowed lets in root and this process' own user.
func Allowed(c *net.UnixConn) (Peer, error) {
	p, err := PeerOf(c)
	if err != nil {
		return p, err
	}
	if own := os.Geteuid(); p.UID != 0 && int(p.UID) != own {
		return p, fmt.Errorf("user %d (pid %d) is neither root nor user %d", p.UID, p.PID, own)
	}
	return p, nil
}
