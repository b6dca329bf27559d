package mount

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/mount/fusedev"
)

// Capabilities is what this kernel, with this process's rights, can do. Each
// was tried, not guessed from the release.
type Capabilities struct {
	KernelRelease string // as uname -r tells it

	DetachedFUSE    bool // FUSE served from a mount that is never attached
	FileBackedEROFS bool // EROFS from such a file (Linux 6.12)
	Loop            bool // EROFS from such a file through a loop device
	Fanotify        bool // pre-access events (Linux 6.14); which file systems raise them is another matter
	Resend          bool // a FUSE connection survives its server (Linux 6.9)
	Fusermount      bool // FUSE attached by fusermount3, for the calling user
	TellsErrors     bool // EROFS from a file that is cached shows no zeros where that has an error

	// Why tells, for each field above that is false, what was tried and
	// what the kernel answered.
	Why map[string]error
}

// Device tells whether Device can work.
func (c Capabilities) Device() bool { return c.FileBackedEROFS || c.Loop }

// Probe tries everything out with an image of 12 KiB. It takes a few
// milliseconds and leaves nothing behind.
func Probe() Capabilities {
	var u unix.Utsname
	_ = unix.Uname(&u)
	c := Capabilities{KernelRelease: unix.ByteSliceToString(u.Release[:]), Why: map[string]error{}}
	note := func(name string, err error) bool {
		if err != nil {
			c.Why[name] = err
		}
		return err == nil
	}
	c.FileBackedEROFS = note("FileBackedEROFS", probeDevice(File))
	c.Loop = note("Loop", probeDevice(Loop))
	fuse, resend := probeFUSE()
	c.DetachedFUSE = note("DetachedFUSE", fuse)
	c.Resend = note("Resend", resend)
	c.Fanotify = note("Fanotify", probeFanotify())
	c.Fusermount = note("Fusermount", probeFusermount())
	c.TellsErrors = note("TellsErrors", tellsErrors())
	return c
}

var probeOptions = fusedev.Options{Name: "probe", Threads: 1, ReadTimeout: 5 * time.Second, Logger: slog.New(slog.DiscardHandler)}

func probeDevice(b Backing) error {
	m, err := Device(context.Background(), probeImage(), Options{Options: probeOptions, Backing: b})
	if err != nil {
		return err
	}
	err = m.Close()
	<-m.Done()
	return err
}

func probeFUSE() (fuse, resend error) {
	server, err := fusedev.New(probeImage(), probeOptions)
	if err != nil {
		return err, err
	}
	k, err := connect(server, superOptions{source: "shale", maxRead: fusedev.MaxRead})
	if err != nil {
		return err, err
	}
	f, fuse := k.openImage(server.Name())
	if fuse == nil {
		_ = f.Close()
	}
	resend = fusedev.Resend(k.dev)
	_ = k.root.Close()
	_ = k.stop()
	<-k.done
	return fuse, resend
}

// probeFanotify asks for pre-access events of a directory. A kernel that knows
// them, but has none for that file system, answers EOPNOTSUPP.
func probeFanotify() error {
	fd, err := unix.FanotifyInit(unix.FAN_CLASS_PRE_CONTENT|unix.FAN_CLOEXEC, unix.O_RDONLY)
	if err != nil {
		return fmt.Errorf("fanotify_init: %w", err)
	}
	defer unix.Close(fd)
	err = unix.FanotifyMark(fd, unix.FAN_MARK_ADD, unix.FAN_PRE_ACCESS|unix.FAN_EVENT_ON_CHILD, unix.AT_FDCWD, os.TempDir())
	if err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("fanotify_mark for pre-access events: %w", err)
	}
	return nil
}

// probeFusermount mounts at a directory that only this process knows.
func probeFusermount() error {
	dir, err := os.MkdirTemp("", "shale-probe-")
	if err != nil {
		return err
	}
	defer os.Remove(dir)
	server, err := fusedev.New(probeImage(), probeOptions)
	if err != nil {
		return err
	}
	k, err := connectAt(server, dir, "shale-probe")
	if err != nil {
		return err
	}
	if err := Detach(dir, true); err != nil {
		return err // and nothing to wait for: it ends with this process
	}
	<-k.done
	return nil
}

// probeFile is a file of the image, whose two blocks come last in it.
const (
	probeFile   = "f"
	probeBlocks = 2
)

// probeImage is an EROFS image of three blocks: the first has the super block, and the
// root directory with its inode and that of probeFile.
func probeImage() bytesContent {
	const (
		blockSize = 4096
		super     = 1024
		rootNID   = 64 // at byte 2048
		fileNID   = 72 // at byte 2304
	)
	p := make(bytesContent, (1+probeBlocks)*blockSize)
	le := binary.LittleEndian
	le.PutUint32(p[super:], 0xe0f5e1e2)               // magic
	p[super+12] = 12                                  // log2 of the block size
	le.PutUint16(p[super+14:], rootNID)               // root_nid
	le.PutUint64(p[super+16:], 2)                     // inos
	le.PutUint32(p[super+36:], uint32(1+probeBlocks)) // blocks
	root := p[rootNID*32:]                            // a compact inode, 32 bytes
	le.PutUint16(root, 2<<1)                          // i_format: data follows the inode
	le.PutUint16(root[4:], unix.S_IFDIR|0o555)
	le.PutUint16(root[6:], 2) // nlink
	file := p[fileNID*32:]    // i_format 0: data are in blocks, one after the other
	le.PutUint16(file[4:], unix.S_IFREG|0o444)
	le.PutUint16(file[6:], 1)
	le.PutUint32(file[8:], probeBlocks*blockSize)
	le.PutUint32(file[16:], 1) // the first block
	entries := root[32:]
	const names = "..." + probeFile // ".", "..", and the file
	le.PutUint32(root[8:], uint32(3*12+len(names)))
	for i, e := range []struct {
		nid  uint64
		name int // its offset
		kind byte
	}{{rootNID, 0, 2}, {rootNID, 1, 2}, {fileNID, 3, 1}} {
		le.PutUint64(entries[i*12:], e.nid)
		le.PutUint16(entries[i*12+8:], uint16(3*12+e.name))
		entries[i*12+10] = e.kind
	}
	copy(entries[3*12:], names)
	for i := blockSize; i < len(p); i++ {
		p[i] = 0xff
	}
	return p
}

// bytesContent is content in memory.
type bytesContent []byte

func (c bytesContent) Size() int64 { return int64(len(c)) }

func (c bytesContent) TryReadAt(p []byte, off int64) (bool, error) {
	copy(p, c[off:])
	return true, nil
}

func (c bytesContent) ReadAt(_ context.Context, p []byte, off int64) error {
	copy(p, c[off:])
	return nil
}
