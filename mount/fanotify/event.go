package fanotify

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"
)

// File tells files apart.
type File struct{ Dev, Inode uint64 }

// Event is a read that waits for an answer.
type Event struct {
	File File // the zero value: it is not known which of the marked files
	Off  int64
	Size int64
}

// fanotify(7), native byte order:
//
//	 0  event_len u32, vers u8, reserved u8, metadata_len u16, mask u64, fd s32, pid s32
//	24  info_type u8, pad u8, len u16, pad u32, offset u64, count u64
const (
	metadataSize = unix.FAN_EVENT_METADATA_LEN
	rangeSize    = 24
	eventSize    = metadataSize + rangeSize // of all that are asked for here

	infoRange = 6 // FAN_EVENT_INFO_TYPE_RANGE
)

// answers
const (
	allow = uint32(unix.FAN_ALLOW)
	deny  = uint32(unix.FAN_DENY) | uint32(unix.EIO)<<24 // FAN_DENY_ERRNO
)

// parse takes the first event of p, and returns what is behind it. ok is false if it
// does not say what is read: nobody can answer it but by fd.
func parse(p []byte) (e Event, fd int32, ok bool, rest []byte, err error) {
	ne := binary.NativeEndian
	if len(p) < metadataSize {
		return e, -1, false, nil, fmt.Errorf("fanotify: event of %d bytes, want at least %d", len(p), metadataSize)
	}
	n, head := int(ne.Uint32(p)), int(ne.Uint16(p[6:]))
	if n < metadataSize || n > len(p) || head < metadataSize || head > n || p[4] != unix.FANOTIFY_METADATA_VERSION {
		return e, -1, false, nil, fmt.Errorf("fanotify: event of version %d with %d bytes, %d of them metadata, in %d", p[4], n, head, len(p))
	}
	fd = int32(ne.Uint32(p[16:]))
	for info := p[head:n]; len(info) >= 4; {
		size := int(ne.Uint16(info[2:]))
		if size < 4 || size > len(info) {
			break
		}
		if info[0] == infoRange && size >= rangeSize {
			off, count := ne.Uint64(info[8:]), ne.Uint64(info[16:])
			if off <= 1<<62 && count <= 1<<62 {
				e.Off, e.Size, ok = int64(off), int64(count), true
			}
		}
		info = info[size:]
	}
	return e, fd, ok, p[n:], nil
}
