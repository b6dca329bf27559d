package pool

import (
	"errors"
	"fmt"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/chunk"
)

// The four things that are asked of a file system with fs-verity
// (Documentation/filesystems/fsverity.rst): ext4 with the feature verity, btrfs, f2fs.

// EnableVerity seals a file that is open for reading, and that nobody has open for
// writing for longer than a second, else it is ETXTBSY: nobody can change the file from then on, and the file
// system compares each block that it reads of it, for whomever, with a tree of SHA-256.
// One that differs is EIO. It reads all of the file, and nothing but a signal that ends the
// process ends it earlier; then nothing has happened.
func EnableVerity(f *os.File) error {
	arg := struct {
		version, hash, block, saltSize uint32
		salt                           uint64
		sigSize, _                     uint32
		sig                            uint64
		_                              [11]uint64
	}{version: 1, hash: unix.FS_VERITY_HASH_ALG_SHA256, block: pageSize}
	enable := func(fd int) error {
		if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.FS_IOC_ENABLE_VERITY, uintptr(unsafe.Pointer(&arg))); e != 0 {
			return e
		}
		return nil
	}
	// Writes that have begun before, and processes that are just being started, have it
	// open for a moment more.
	err := descriptor(f, enable)
	for tries := 0; err == unix.ETXTBSY && tries < 50; tries++ {
		time.Sleep(20 * time.Millisecond)
		err = descriptor(f, enable)
	}
	if err != nil && err != unix.EEXIST {
		return fmt.Errorf("seal %s: %w", f.Name(), err)
	}
	return nil
}

// canVerify tells whether f's file system could seal it, or has.
func canVerify(f *os.File) bool {
	arg := struct {
		algorithm, size uint16
		digest          [64]byte
	}{size: 64}
	err := descriptor(f, func(fd int) error {
		if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.FS_IOC_MEASURE_VERITY, uintptr(unsafe.Pointer(&arg))); e != 0 {
			return e
		}
		return nil
	})
	return err == nil || err == unix.ENODATA
}

// isSealed tells whether a file is.
var isSealed = func(path string) bool {
	var st unix.Statx_t
	return unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW, 0, &st) == nil && st.Attributes&unix.STATX_ATTR_VERITY != 0
}

// sealedPatience is how long a file may be busy that another process has just stopped to
// seal, with a worker that has died.
const sealedPatience = 10 * time.Second

// openSealed opens a file for reading and writing, or, if it is sealed, for reading. A seal
// that is broken, or that this kernel does not know, is chunk.ErrCorrupt.
func openSealed(path string) (f *os.File, sealed bool, err error) {
	for end := time.Now().Add(sealedPatience); ; time.Sleep(10 * time.Millisecond) {
		if isSealed(path) {
			break
		}
		if f, err = os.OpenFile(path, os.O_RDWR, 0); err == nil || time.Now().After(end) || !errors.Is(err, unix.ETXTBSY) {
			return f, false, err
		}
	}
	if f, err = os.Open(path); err != nil && !errors.Is(err, unix.EMFILE) && !errors.Is(err, unix.ENFILE) && !errors.Is(err, unix.ENOMEM) {
		err = fmt.Errorf("%w: its seal: %w", chunk.ErrCorrupt, err)
	}
	return f, true, err
}
