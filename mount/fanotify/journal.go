package fanotify

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// The journal is slots of 64 bytes, in the byte order of the machine. The first has
// the magic, each other one at most one event that is not answered:
//
//	 0  48  the event, as the kernel writes it (event.go); u32 0 at 0: the slot is free
//	48   8  device and
//	56   8  inode of the file, 0 before they are known
//
// An event is in its slot when read(2) returns, and leaves it between its answer and
// the moment at which the number of its descriptor is free again.
const (
	slotSize  = 64
	slots     = 1024 // and so many readers wait at one time; others wait to be asked for
	deviceOff = 48
	inodeOff  = 56

	magic = "SHALEFA1"
)

type journal struct {
	file *os.File
	mem  []byte

	mu     sync.Mutex
	room   *sync.Cond
	free   []int // the lowest last
	closed bool
}

func newJournal() (*journal, error) {
	fd, err := unix.MemfdCreate("shale-events", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	f := os.NewFile(uintptr(fd), "events")
	j, err := resetJournal(f)
	if err != nil {
		f.Close()
	}
	return j, err
}

// resetJournal makes an empty journal of a file, which others hold too.
func resetJournal(f *os.File) (*journal, error) {
	if err := errors.Join(f.Truncate(0), f.Truncate((1+slots)*slotSize)); err != nil {
		return nil, err
	}
	j, err := mapJournal(f)
	if err == nil {
		copy(j.mem, magic)
	}
	return j, err
}

// openJournal takes what another process has left.
func openJournal(f *os.File) (*journal, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if st.Size() != (1+slots)*slotSize {
		return nil, fmt.Errorf("fanotify: journal of %d bytes, want %d: %w", st.Size(), (1+slots)*slotSize, os.ErrInvalid)
	}
	j, err := mapJournal(f)
	if err == nil && string(j.mem[:len(magic)]) != magic {
		err = errors.Join(fmt.Errorf("fanotify: the journal begins with %q, want %q: %w", j.mem[:len(magic)], magic, os.ErrInvalid), unix.Munmap(j.mem))
	}
	return j, err
}

func mapJournal(f *os.File) (*journal, error) {
	mem, err := unix.Mmap(int(f.Fd()), 0, (1+slots)*slotSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, os.NewSyscallError("mmap", err)
	}
	// The kernel refuses a reader whose event it cannot copy, and a killed process gets
	// no page any more: so none may be away. A free slot is cleared; not all may lock.
	_ = unix.Mlock(mem)
	j := &journal{file: f, mem: mem}
	j.room = sync.NewCond(&j.mu)
	for i := slots; i > 0; i-- {
		if j.slot(i).empty() {
			j.free = append(j.free, i)
		}
	}
	return j, nil
}

type slot []byte

func (j *journal) slot(i int) slot { return j.mem[i*slotSize : (i+1)*slotSize] }

func (s slot) empty() bool { return binary.NativeEndian.Uint32(s) == 0 }

func (s slot) file() File {
	return File{binary.NativeEndian.Uint64(s[deviceOff:]), binary.NativeEndian.Uint64(s[inodeOff:])}
}

// note writes what the kernel has not. Half of it is nothing: a file is known once it
// has its inode.
func (s slot) note(f File) {
	binary.NativeEndian.PutUint64(s[deviceOff:], f.Dev)
	binary.NativeEndian.PutUint64(s[inodeOff:], f.Inode)
}

// take returns a free slot, all zeros, once there is one; 0 after close.
func (j *journal) take() int {
	j.mu.Lock()
	defer j.mu.Unlock()
	for len(j.free) == 0 && !j.closed {
		j.room.Wait()
	}
	if j.closed {
		return 0
	}
	i := j.free[len(j.free)-1]
	j.free = j.free[:len(j.free)-1]
	clear(j.slot(i))
	return i
}

// give frees a slot.
func (j *journal) give(i int) {
	binary.NativeEndian.PutUint32(j.slot(i), 0)
	j.mu.Lock()
	j.free = append(j.free, i)
	j.mu.Unlock()
	j.room.Signal()
}

// shut makes take return.
func (j *journal) shut() {
	j.mu.Lock()
	j.closed = true
	j.mu.Unlock()
	j.room.Broadcast()
}

func (j *journal) close() error { return errors.Join(unix.Munmap(j.mem), j.file.Close()) }
