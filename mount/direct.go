package mount

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Direct mounts the EROFS metadata file meta, whose data lies in the files
// devices in the order of its device slots, read-only and detached. The files
// must be complete, and must not change while the mount lives: nobody stands
// between them and the readers, who go on when this process ends.
func Direct(meta string, devices []string, o Options) (*Mounted, error) {
	fd, bdi, err := direct(meta, devices, o)
	if err != nil {
		return nil, err
	}
	m, err := newMounted(fd, nil, bdi)
	if err != nil {
		_ = fd.Close()
	}
	return m, err
}

// direct is Direct of an image. Errors have to reach the reader: where EROFS would hide
// them it bypasses the page cache of the files; or, since files that are verified have
// no other way, it reads loop devices. It never reads these of an image that the kernel would
// show wrong from them.
func (im Image) direct(o Options) (*Mounted, error) {
	needsLoop := im.Verified && o.Backing == Auto && tellsErrors() != nil
	if im.Meets {
		if needsLoop || o.Backing == Loop {
			return nil, fmt.Errorf("chunks of a file meet in two segments, which the kernel reads wrong from loop devices: %w", errors.ErrUnsupported)
		}
		o.Backing = File
	}
	if needsLoop {
		looped := o
		looped.Backing = Loop
		if m, err := Direct(im.Meta, im.Segments, looped); err == nil {
			return m, nil
		}
	}
	return Direct(im.Meta, im.Segments, o)
}

func direct(meta string, devices []string, o Options) (fd *os.File, bdi string, err error) {
	if o.Backing != Loop {
		fd, bdi, err := mountFile(meta, devices, tellsErrors() != nil, o.ReadAheadKiB)
		if o.Backing == File || !errors.Is(err, unix.ENOTBLK) {
			return fd, bdi, err
		}
	}
	loops := make([]string, 0, 1+len(devices))
	for _, path := range append([]string{meta}, devices...) {
		f, err := os.Open(path)
		if err != nil {
			return nil, "", err
		}
		loop, err := attachLoop(f, false)
		_ = f.Close()
		if err != nil {
			return nil, "", err
		}
		defer loop.Close()
		loops = append(loops, loop.Name())
	}
	return mountFile(loops[0], loops[1:], false, 0)
}
