package mount

import (
	"errors"
	"os"
	"strings"

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

// direct is Direct of an image. Where data are verified, errors have to reach the reader:
// then EROFS reads loop devices, unless the kernel is known to be good without.
func (im Image) direct(o Options) (*Mounted, error) {
	var u unix.Utsname
	if im.Verified && o.Backing == Auto && unix.Uname(&u) == nil && hidesErrors(unix.ByteSliceToString(u.Release[:])) {
		looped := o
		looped.Backing = Loop
		if m, err := Direct(im.Meta, im.Segments, looped); err == nil {
			return m, nil
		}
	}
	return Direct(im.Meta, im.Segments, o)
}

// hidesErrors tells whether EROFS on files shows zeros, and no error, where a file could
// not be read behind the first page of a folio. A bit changed below fs-verity, by hand, in
// nine places each: Linux 6.12.117 gives EIO, 6.18.15 zeros. Others are not known, and
// before 6.12 there is no EROFS on files. Loop devices gave EIO in 6.1 and 6.12 (nine of
// nine), and in 6.18.15 in the two places that were seen.
func hidesErrors(release string) bool { return !strings.HasPrefix(release, "6.12.") }

func direct(meta string, devices []string, o Options) (fd *os.File, bdi string, err error) {
	if o.Backing != Loop {
		fd, bdi, err := mountFile(meta, devices, false, o.ReadAheadKiB)
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
