package daemon

import (
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// openFiles is how many files the service wants to be allowed to open: a mount
// takes a handful, and so does a segment of the pool.
const openFiles = 1 << 20

// raiseFileLimit raises the limit of open files as far as it is let.
func raiseFileLimit() {
	var l unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &l) != nil || l.Cur >= openFiles {
		return
	}
	if unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: openFiles, Max: max(l.Max, openFiles)}) != nil {
		_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: l.Max, Max: l.Max})
	}
}

// maxLog is the size in bytes at which the log is turned over; one older is
// kept.
const maxLog = 10 << 20

// turnLog begins a new log if the one that this process writes, as its
// standard output and error, has become long.
func (s *server) turnLog() {
	name := filepath.Join(s.cfg.Root, logName)
	at, err := os.Stat(name)
	if err != nil || at.Size() < maxLog {
		return
	}
	if ours, err := os.Stderr.Stat(); err != nil || !os.SameFile(at, ours) {
		return
	}
	if err := turn(name); err != nil {
		s.log.Error("the log could not be turned over", "err", err)
	}
}

func turn(name string) error {
	if err := os.Rename(name, name+".1"); err != nil {
		return err
	}
	return writeTo(name)
}

// writeTo makes a file the standard output and error.
func writeTo(name string) error {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	for fd := 1; fd <= 2; fd++ {
		if err := unix.Dup3(int(f.Fd()), fd, 0); err != nil {
			return err
		}
	}
	return nil
}
