package netmodel

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Refuse has connections refused from now on, and those that are open broken off,
// or accepted again. The port stays the proxy's.
func (p *Proxy) Refuse(refuse bool) error {
	p.refusing.Lock()
	defer p.refusing.Unlock()
	switch {
	case refuse == (p.listener == nil):
		return nil
	case refuse:
		addr := p.listener.Addr().(*net.TCPAddr)
		p.listener.Close()
		p.listener = nil
		fd, err := hold(addr)
		if err != nil {
			return fmt.Errorf("netmodel: hold port %d: %w", addr.Port, err)
		}
		p.held = fd
		p.mu.Lock()
		defer p.mu.Unlock()
		for c := range p.conns {
			c.Close()
		}
		return nil
	}
	if err := unix.Listen(p.held, unix.SOMAXCONN); err != nil {
		return fmt.Errorf("netmodel: listen again: %w", err)
	}
	f := os.NewFile(uintptr(p.held), "listener")
	l, err := net.FileListener(f) // of a copy of the descriptor
	f.Close()
	if err != nil {
		return fmt.Errorf("netmodel: listen again: %w", err)
	}
	p.listener = l
	go p.server.Serve(l)
	return nil
}

// hold binds a socket to a port and does not listen: who connects is refused.
func hold(addr *net.TCPAddr) (fd int, err error) {
	// The listener is closed when the goroutine that accepts has noticed.
	for range 200 {
		if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0); err != nil {
			return -1, err
		}
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
		if err == nil {
			err = unix.Bind(fd, &unix.SockaddrInet4{Port: addr.Port, Addr: [4]byte(addr.IP.To4())})
		}
		if err == nil {
			return fd, nil
		}
		unix.Close(fd)
		if err != unix.EADDRINUSE {
			return -1, err
		}
		time.Sleep(5 * time.Millisecond)
	}
	return -1, err
}

// letGo closes the socket that holds the port, if one does.
func (p *Proxy) letGo() error {
	p.refusing.Lock()
	defer p.refusing.Unlock()
	if p.listener != nil {
		return nil
	}
	return unix.Close(p.held)
}

func (p *Proxy) connState(c net.Conn, s http.ConnState) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch s {
	case http.StateNew:
		p.conns[c] = true
	case http.StateClosed, http.StateHijacked:
		delete(p.conns, c)
	}
}
