package mount

import (
	"errors"
	"fmt"
	"os"

	"github.com/shale-image/shale/mount/fusedev"
)

// Mounted is an image that a face shows.
type Mounted struct {
	fd   *os.File // nil if the face attached it
	dev  uint64
	bdi  string // whose readahead is the mount's; "" if it is not known
	done <-chan struct{}
	conn *conn  // nil if nothing of ours serves it
	stop func() // with conn, may be nil: ends what waits in the server

	watched *watched // nil but for Fanotify
}

// newMounted takes fd, a detached mount, what serves it, and its backing device.
func newMounted(fd *os.File, k *conn, bdi string) (*Mounted, error) {
	dev, err := device(int(fd.Fd()), "")
	if err != nil {
		return nil, err
	}
	m := &Mounted{fd: fd, dev: dev, bdi: bdi, conn: k}
	if k != nil {
		m.done = k.done
		return m, nil
	}
	_, m.done, err = supers.watch(fd)
	return m, err
}

// FD returns the detached mount, for Attach or to pass to another process; nil
// if the face has attached it at Options.Dir. It is m's own: Close closes it.
func (m *Mounted) FD() *os.File { return m.fd }

// Dev returns st_dev of everything in the mount. It tells mounts apart as long
// as they live.
func (m *Mounted) Dev() uint64 { return m.dev }

// BDI is the name of the backing device whose readahead is the mount's, "" if that
// is not known.
func (m *Mounted) BDI() string { return m.bdi }

// Served tells whether readers of the mount need this process. Under Fanotify that ends
// with Release.
func (m *Mounted) Served() bool { return m.conn != nil || m.watched != nil && m.watched.needs.Load() }

// ReadsSegments tells whether the kernel reads the image's segments itself, so that what
// is in them has to stay.
func (m *Mounted) ReadsSegments() bool { return m.conn == nil }

// Close gives up FD. A mount that was attached, and readers in it, live on and
// are served; otherwise Done is soon closed. Until Close, FD keeps the mount
// busy for umount(8). It may be called more than once.
func (m *Mounted) Close() error {
	if m.fd == nil {
		return nil
	}
	if err := m.fd.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}

// Done is closed when the mount is no more and what was mounted is not used
// any longer: the last reference to it is gone, wherever it was (FD, mounts in
// any namespace, open files, mappings), or, if it is Served, after Abort.
func (m *Mounted) Done() <-chan struct{} { return m.done }

// Err returns nil before Done is closed, and then why serving ended, nil
// unless /dev/fuse could not be read.
func (m *Mounted) Err() error {
	select {
	case <-m.done:
		if m.conn != nil {
			return m.conn.err
		}
	default:
	}
	return nil
}

// Abort makes every read that waits, and every later one of what the kernel
// has not cached, fail with an error (EIO, SIGBUS for mappings; under Fuse also
// ENOTCONN). It does not wait for Content, but Done does. The mount stays where
// it is attached. If it is not Served no read waits for anybody, and Abort does
// nothing. Under Fanotify what is here is still read, and Done is closed when the mount
// is no more, and not before.
func (m *Mounted) Abort() error {
	if m.watched != nil {
		m.watched.cancel()
		return nil
	}
	if m.conn == nil {
		return nil
	}
	if m.stop != nil {
		m.stop()
	}
	if err := m.conn.stop(); err != nil {
		return fmt.Errorf("abort: %w", err)
	}
	return nil
}

// Stats counts the requests of the kernel so far; nothing if it is not Served.
func (m *Mounted) Stats() fusedev.Stats {
	if m.watched != nil {
		return m.watched.stats()
	}
	if m.conn == nil {
		return fusedev.Stats{}
	}
	return m.conn.server.Stats()
}
