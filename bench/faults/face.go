package main

import (
	"errors"
	"fmt"
	"math"
	"os/exec"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/bench/faults/script"
	"github.com/shale-image/shale/mount"
)

// Faces that can be played with. What is promised of them is the same where the network
// fails, but not where the disk does:
//
//	                              device             fanotify
//	what cannot be read           EIO until it can   EIO until it can
//	what cannot be stored         from memory        EIO until it can, or the disk is mounted anew
//	no room when it is mounted    from memory        refused
const (
	device   = "device"
	fanotify = "fanotify"
)

// errNoFace is that a face cannot be had here.
var errNoFace = errors.New("no such face here")

// usable returns nil if the face fanotify can be used with what lies in dir, else an error
// that wraps errNoFace.
func usable(dir string) error {
	able := mount.Probe()
	if !able.Fanotify {
		return fmt.Errorf("%w: %s: %w", errNoFace, fanotify, able.Why["Fanotify"])
	}
	if !able.TellsErrors { // then what a disk does is not the program's fault
		return fmt.Errorf("%w: %s: %w", errNoFace, fanotify, able.Why["TellsErrors"])
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return err
	}
	switch st.Type {
	case unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC:
		return nil
	}
	return fmt.Errorf("%w: %s needs ext4, xfs or btrfs below %s (TMPDIR says where that is)", errNoFace, fanotify, dir)
}

// mustNotFail tells whether no read may fail during the faults: a source is well, or the
// script says so; and what a read takes is not the disk.
func (a *act) mustNotFail() bool {
	if a.dead() {
		return false
	}
	return a.healthy && !a.script.Has("disk read errors") || a.script.Expect == script.Right
}

// dead tells whether reads may fail until the disk is mounted anew: a file system that
// was told of an error takes nothing more, and nobody can be served from memory.
func (a *act) dead() bool {
	return a.face == fanotify && a.script.Has("disk write errors", "disk read-only")
}

// refused tells whether an error of a mount is that not all of the image has room.
func (a *act) refused(err error) bool {
	const noSpace = 8 // exit code of `shale mount`
	var exit *exec.ExitError
	return a.face == fanotify && errors.As(err, &exit) && exit.ExitCode() == noSpace
}

// room is how much of an image can be stored, in bytes.
func (a *act) room() int64 {
	room := int64(math.MaxInt64)
	if a.script.Disk() {
		room = diskSize
	}
	if quota := a.script.Quota(); quota > 0 {
		room = min(room, quota)
	}
	return room
}
