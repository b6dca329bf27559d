package daemon

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/keeper"
)

// guessAll gives mounts of the face fanotify whose journal is damaged one of what their
// files tell. Such a mount must not be forgotten: its segments are marked, and their
// readers would be let through to zeros. The kernel knows what each file is, and so
// which segments are meant; server.lose has their readers get EIO.
func guessAll(kept []keeper.Mount) {
	for i := range kept {
		k := &kept[i]
		var j journal
		if !k.Held || json.Unmarshal(k.Rest, &j) == nil && j.fits(k) {
			continue
		}
		var own [3][]*os.File // by kind
		var data []*os.File
		j = journal{}
		for _, f := range k.Files {
			kind, segment := kindOf(f)
			switch {
			case kind >= 0:
				own[kind] = append(own[kind], f)
			case segment != 0:
				j.Segments, data = append(j.Segments, segment), append(data, f)
			default:
				f.Close()
			}
		}
		for kind := range own {
			if len(own[kind]) > 0 {
				continue
			}
			if f := another(kept, kind); f != nil {
				own[kind] = append(own[kind], f)
			}
		}
		j.Groups = min(len(own[0]), len(own[1])) // a group comes with its journal, or neither
		rest, err := json.Marshal(j)
		if err != nil || j.Groups == 0 || len(own[2]) == 0 {
			continue // it can only be held
		}
		k.Rest, k.Files = rest, nil
		for i := range j.Groups {
			k.Files = append(k.Files, own[0][i], own[1][i])
		}
		k.Files = append(append(k.Files, own[2][0]), data...)
	}
}

// kindOf tells which of mount.Watching's files one is, -1 for none, or of which segment
// it is the data, 0 for none.
func kindOf(f *os.File) (kind int, segment uint32) {
	var name string
	_ = onDescriptor(f, func(fd int) error {
		var err error
		name, err = os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
		return err
	})
	switch name {
	case "anon_inode:[fanotify]":
		return 0, 0
	case "/memfd:shale-events (deleted)":
		return 1, 0
	case "anon_inode:inotify":
		return 2, 0
	}
	if dir, base := filepath.Split(name); base == "data" {
		if id, err := strconv.ParseUint(filepath.Base(dir), 16, 32); err == nil {
			return -1, uint32(id)
		}
	}
	return -1, 0
}

// another is a descriptor of what mounts of the face share, if one of them has it.
func another(kept []keeper.Mount, kind int) (g *os.File) {
	for _, k := range kept {
		for _, f := range k.Files {
			if got, _ := kindOf(f); !k.Held || got != kind {
				continue
			}
			err := onDescriptor(f, func(fd int) error {
				n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
				if err == nil {
					g = os.NewFile(uintptr(n), f.Name())
				}
				return err
			})
			if err == nil {
				return g
			}
		}
	}
	return nil
}

// onDescriptor calls a function with a file's descriptor, without what File.Fd does to
// all who have the file.
func onDescriptor(f *os.File, do func(fd int) error) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	cerr := raw.Control(func(fd uintptr) { err = do(int(fd)) })
	return errors.Join(err, cerr)
}
