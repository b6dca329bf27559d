package mount

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/mount/fusedev"
)

// Connection is what a process needs to serve a mount of Device that another one
// made and served until it died. The files are the process' own: it may keep
// duplicates while it serves.
type Connection struct {
	Dev    *os.File // /dev/fuse
	Abort  *os.File // ends the connection when "1" is written
	Number uint64   // device number of the FUSE file system

	// Of the mount, if its maker had come so far:
	ImageDev uint64 // Mounted.Dev
	BDI      string // Mounted.BDI
}

// Resume serves the mount of a Connection on. c is the same content that it was made
// of, and o.Name its name; what else o says of how to mount has no effect. It takes
// the files. Readers that have waited since the last server died get their bytes
// now. Needs Linux 6.9; before, it is an error, and then the connection is of no use:
// it has to be aborted.
//
// Nobody but the server may read from the connection: the last one is dead, or it is
// a matter of luck who answers.
func Resume(from Connection, c fusedev.Content, o Options) (*Mounted, error) {
	server, err := fusedev.New(c, o.Options)
	if err != nil {
		return nil, err
	}
	if err := fusedev.Resend(from.Dev); err != nil && !errors.Is(err, unix.ENODEV) { // ENODEV: unmounted; Serve sees that too
		return nil, err
	}
	k := &conn{server: server, dev: from.Dev, abort: from.Abort, number: from.Number, done: make(chan struct{})}
	go k.serve()
	return &Mounted{dev: from.ImageDev, bdi: from.BDI, conn: k, done: k.done}, nil
}
