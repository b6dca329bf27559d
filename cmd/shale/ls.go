package main

import (
	"bufio"
	"fmt"
	"io"
	"path"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/inspect"
)

func newLs(g *globals) *cobra.Command {
	o := &opener{g: g}
	var long, recursive bool
	cmd := &cobra.Command{
		Use:   "ls REF [PATH]",
		Short: "List the files of an image",
		Long: `List the files of an image. Of one that the node knows (shale images) it is what the node
has, and no registry is asked; of others only the index is fetched. Links on the way to PATH
are followed within the image; PATH itself is too, unless -l is given.`,
		Example: `  shale ls localhost:5000/debian:12-shale /etc
  shale ls -lR localhost:5000/debian:12-shale
  shale ls -lR --bootstrap image.boot --blobs ./blobs /`,
		Args: o.args(1, 2),
		RunE: func(cmd *cobra.Command, a []string) error {
			im, rest, err := o.open(cmd.Context(), a)
			if err != nil {
				return err
			}
			defer im.Close()
			name := strings.Join(rest, "")
			at, ino, err := inspect.Resolve(im.Tree, name, !long)
			if err != nil && !long { // a link to nowhere
				at, ino, err = inspect.Resolve(im.Tree, name, false)
			}
			if err != nil {
				return fmt.Errorf("%s: %w", im.Name, err)
			}
			w := bufio.NewWriter(cmd.OutOrStdout())
			if err := list(w, at, ino, long, recursive); err != nil {
				return err
			}
			return w.Flush()
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&long, "long", "l", false, "show type, mode, owner, size and time")
	f.BoolVarP(&recursive, "recursive", "R", false, "list directories inside too")
	o.flags(cmd)
	return cmd
}

// list prints what is in a directory, or a file itself: names, or with
// recursive full paths, one a line.
func list(w io.Writer, at string, ino *index.Inode, long, recursive bool) error {
	line := func(name string, ino *index.Inode) error {
		if !long {
			_, err := fmt.Fprintln(w, quote(name))
			return err
		}
		return longLine(w, name, ino)
	}
	switch {
	case !ino.IsDir():
		return line(path.Base(at), ino)
	case recursive:
		return (&index.Tree{Root: ino}).Walk(func(p string, ino *index.Inode) error {
			return line("/"+path.Join(at, p), ino)
		})
	}
	for _, name := range ino.Names() {
		if err := line(name, ino.Children[name]); err != nil {
			return err
		}
	}
	return nil
}

func longLine(w io.Writer, name string, ino *index.Inode) error {
	what := fmt.Sprint(ino.Size)
	switch ino.Type() {
	case syscall.S_IFCHR, syscall.S_IFBLK:
		what = fmt.Sprintf("%d,%d", unix.Major(ino.Rdev), unix.Minor(ino.Rdev))
	case syscall.S_IFLNK:
		what = fmt.Sprint(len(ino.Target))
	case syscall.S_IFDIR:
		what = "-"
	}
	t := time.Unix(ino.Mtime.Sec, int64(ino.Mtime.Nsec)).UTC().Format("2006-01-02T15:04:05.000000000Z")
	line := fmt.Sprintf("%s %d:%d %10s %s %s", modeString(ino.Mode), ino.UID, ino.GID, what, t, quote(name))
	if ino.Type() == syscall.S_IFLNK {
		line += " -> " + quote(ino.Target)
	}
	for _, x := range ino.Xattrs {
		line += fmt.Sprintf(" %s=%q", x.Name, x.Value)
	}
	_, err := fmt.Fprintln(w, line)
	return err
}

// modeString is the mode as ls(1) writes it.
func modeString(mode uint32) string {
	kind := map[uint32]byte{
		syscall.S_IFDIR: 'd', syscall.S_IFLNK: 'l', syscall.S_IFCHR: 'c', syscall.S_IFBLK: 'b',
		syscall.S_IFIFO: 'p', syscall.S_IFSOCK: 's',
	}
	b := []byte("-rwxrwxrwx")
	if k, ok := kind[mode&syscall.S_IFMT]; ok {
		b[0] = k
	}
	for i := range 9 {
		if mode&(1<<(8-i)) == 0 {
			b[1+i] = '-'
		}
	}
	special := func(bit uint32, at int, lower, upper byte) {
		if mode&bit == 0 {
			return
		}
		if b[at] == '-' {
			b[at] = upper
		} else {
			b[at] = lower
		}
	}
	special(syscall.S_ISUID, 3, 's', 'S')
	special(syscall.S_ISGID, 6, 's', 'S')
	special(syscall.S_ISVTX, 9, 't', 'T')
	return string(b)
}

// quote keeps names from doing things to a terminal.
func quote(s string) string {
	for _, r := range s {
		if r < ' ' || r == 0x7f || r == '\ufffd' {
			return fmt.Sprintf("%q", s)
		}
	}
	return s
}
