package mount

import (
	"encoding/binary"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// supers tells when super blocks that nobody here serves are gone. The kernel
// does: who watches an inode with inotify gets IN_UNMOUNT when the super block
// goes, wherever its last reference was, and holds no reference by watching.
// One inotify instance does for all, since a user may have but 128.
var supers superWatch

type superWatch struct {
	mu    sync.Mutex
	file  *os.File // nil while nothing is watched
	gone  map[int32][]chan struct{}
	lost  []chan struct{} // of those of which nobody knows what the instance calls them
	holds int
}

// hold keeps the instance open until release, and returns it.
func (w *superWatch) hold() (*os.File, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.open(); err != nil {
		return nil, err
	}
	w.holds++
	return w.file, nil
}

func (w *superWatch) release() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.holds--
	w.closeIdle()
}

// open makes an instance if there is none. w.mu is held.
func (w *superWatch) open() error {
	if w.file != nil {
		return nil
	}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return fmt.Errorf("watch a mount: inotify: %w", err)
	}
	w.use(os.NewFile(uintptr(fd), "inotify"))
	return nil
}

func (w *superWatch) use(f *os.File) {
	w.file, w.gone = f, map[int32][]chan struct{}{}
	go w.read(f)
}

// again goes on with what another process has watched with from, the same for all such
// calls. It takes the file. Without a wd what is watched ends when all that nobody knows
// has: endLost.
func (w *superWatch) again(from *os.File, wd int32) (<-chan struct{}, error) {
	defer from.Close()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.file == nil {
		fd, err := unix.FcntlInt(from.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return nil, os.NewSyscallError("dup", err)
		}
		w.use(os.NewFile(uintptr(fd), "inotify"))
	}
	// Its end may have been told to that process.
	wds, err := watching(from)
	if err != nil {
		return nil, err
	}
	gone := make(chan struct{})
	if wd == 0 {
		w.lost = append(w.lost, gone)
		return gone, nil
	}
	if slices.Contains(wds, wd) {
		w.gone[wd] = append(w.gone[wd], gone)
		return gone, nil
	}
	close(gone)
	w.closeIdle()
	return gone, nil
}

// watch returns a channel that is closed when the super block of the mount is
// gone, and what the instance calls it. The caller keeps root.
func (w *superWatch) watch(root *os.File) (int32, <-chan struct{}, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.open(); err != nil {
		return 0, nil, err
	}
	conn, err := w.file.SyscallConn()
	if err != nil {
		return 0, nil, err
	}
	var wd int
	path := "/proc/self/fd/" + strconv.Itoa(int(root.Fd()))
	if cerr := conn.Control(func(fd uintptr) {
		// Nothing but the end can happen to a read-only root directory.
		wd, err = unix.InotifyAddWatch(int(fd), path, unix.IN_DELETE_SELF)
	}); cerr != nil {
		err = cerr
	}
	if err != nil {
		w.closeIdle()
		return 0, nil, fmt.Errorf("watch a mount: inotify: %w", err)
	}
	gone := make(chan struct{})
	w.gone[int32(wd)] = append(w.gone[int32(wd)], gone)
	return int32(wd), gone, nil
}

// closeIdle ends the instance, and with it read, when nothing is watched.
// w.mu is held.
func (w *superWatch) closeIdle() {
	if len(w.gone) == 0 && len(w.lost) == 0 && w.holds == 0 && w.file != nil {
		_ = w.file.Close()
		w.file = nil
	}
}

func (w *superWatch) read(f *os.File) {
	buf := make([]byte, 16<<10)
	for {
		n, err := f.Read(buf)
		if err != nil {
			return // closed
		}
		// struct inotify_event: wd s32, mask u32, cookie u32, len u32, name [len]
		for p := buf[:n]; len(p) >= unix.SizeofInotifyEvent; {
			wd, mask := int32(binary.NativeEndian.Uint32(p)), binary.NativeEndian.Uint32(p[4:])
			size := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(p[12:]))
			if mask&(unix.IN_UNMOUNT|unix.IN_IGNORED) != 0 {
				w.ended(f, wd)
			}
			p = p[min(size, len(p)):]
		}
		w.mu.Lock()
		w.closeIdle()
		idle := w.file != f
		w.mu.Unlock()
		if idle {
			return
		}
	}
}

func (w *superWatch) ended(f *os.File, wd int32) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.file != f {
		return // wd is of an instance that is closed
	}
	for _, gone := range w.gone[wd] {
		close(gone)
	}
	delete(w.gone, wd)
	w.endLost()
}

// endLost ends what nobody knows by name if the instance watches nothing any more but
// what is known. w.mu is held.
func (w *superWatch) endLost() {
	if len(w.lost) == 0 {
		return
	}
	wds, err := watching(w.file)
	if err != nil {
		return
	}
	for _, wd := range wds {
		if w.gone[wd] == nil {
			return
		}
	}
	for _, gone := range w.lost {
		close(gone)
	}
	w.lost = nil
}

// watching lists what an inotify instance watches.
func watching(f *os.File) (wds []int32, err error) {
	conn, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	var info []byte
	if cerr := conn.Control(func(fd uintptr) { info, err = os.ReadFile("/proc/self/fdinfo/" + strconv.Itoa(int(fd))) }); cerr != nil {
		return nil, cerr
	}
	for line := range strings.Lines(string(info)) {
		// "inotify wd:1 ino:2 sdev:1f mask:400 ..."; all are hexadecimal
		if rest, ok := strings.CutPrefix(line, "inotify wd:"); ok {
			hex, _, _ := strings.Cut(rest, " ")
			wd, perr := strconv.ParseInt(hex, 16, 32)
			if perr != nil {
				return nil, perr
			}
			wds = append(wds, int32(wd))
		}
	}
	return wds, err
}
