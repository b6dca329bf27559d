package plain

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Unpack applies a layer, in gzip or zstd or as it is, to the tree at dir, which has its
// lower layers: GNU tar extracts it, then its whiteouts are carried out and
// removed. It takes root to keep owners. A reader that is a file costs no
// copying.
func Unpack(ctx context.Context, layer io.Reader, dir string) error {
	tarArgs := []string{"-x", "-v", "-f", "-", "-C", dir, "--quoting-style=escape",
		"--numeric-owner", "--same-owner", "--same-permissions", "--xattrs", "--xattrs-include=*", "--blocking-factor=512"}
	layer, decompress, err := decompressor(layer)
	if err != nil {
		return err
	}
	pr, pw, err := os.Pipe()
	if err != nil {
		return err
	}
	defer pr.Close()
	defer pw.Close()
	// Fewer, larger hand-overs between the two; a full pipe is fine as well.
	unix.FcntlInt(pw.Fd(), unix.F_SETPIPE_SZ, 1<<20)

	unzip := command(ctx, decompress[0], decompress[1:]...)
	unzip.Stdin, unzip.Stdout = layer, pw
	tar := command(ctx, "tar", tarArgs...)
	tar.Stdin = pr
	listing, err := tar.StdoutPipe()
	if err != nil {
		return err
	}
	if err := tar.Start(); err != nil {
		return err
	}
	if err := unzip.Start(); err != nil {
		pr.Close()
		pw.Close()
		return errors.Join(err, tar.Wait())
	}
	pr.Close() // so that each sees the end of the other
	pw.Close()
	names, err := readListing(listing)
	return errors.Join(err, wait(tar), wait(unzip), names.carryOut(dir))
}

// zstdMagic is how a zstd frame begins.
var zstdMagic = []byte{0x28, 0xb5, 0x2f, 0xfd}

// decompressor returns the program for what layer contains, by how it begins,
// and a reader of all of it.
func decompressor(layer io.Reader) (io.Reader, []string, error) {
	head := make([]byte, 512) // the first header, if it is an archive as it is
	n, err := io.ReadFull(layer, head)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && err != io.EOF {
		return nil, nil, err
	}
	head = head[:n]
	// A program reads a file itself, if it can from the start.
	if f, ok := layer.(*os.File); !ok || rewind(f, n) != nil {
		layer = io.MultiReader(bytes.NewReader(head), layer)
	}
	switch {
	case bytes.HasPrefix(head, zstdMagic):
		return layer, []string{"zstd", "-dc"}, nil
	case n == 512 && bytes.HasPrefix(head[257:], []byte("ustar")):
		return layer, []string{"cat"}, nil
	}
	return layer, []string{gunzipPath(), "-dc"}, nil
}

func rewind(f *os.File, n int) error {
	_, err := f.Seek(int64(-n), io.SeekCurrent)
	return err
}

// gunzipPath returns the fastest gzip on the machine: igzip inflates at about
// three times, pigz at 1.5 times the speed of gzip.
func gunzipPath() string {
	for _, name := range []string{"igzip", "pigz"} {
		if bin, err := exec.LookPath(name); err == nil {
			return bin
		}
	}
	return "gzip"
}

func command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	cmd.Stderr = new(bytes.Buffer)
	return cmd
}

func wait(cmd *exec.Cmd) error {
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("%s: %w: %s", filepath.Base(cmd.Path), err, bytes.TrimSpace(cmd.Stderr.(*bytes.Buffer).Bytes()))
	}
	return nil
}

const (
	whiteout = ".wh."
	opaque   = ".wh..wh..opq"
)

// listing is what a layer contains.
type listing struct {
	names     map[string]bool // clean relative paths
	whiteouts []string        // those of names whose last element is a whiteout
}

func readListing(r io.Reader) (listing, error) {
	l := listing{names: map[string]bool{}}
	var bad error
	s := bufio.NewScanner(r)
	for s.Scan() { // to the end: tar waits for its reader
		name, err := unescape(s.Text())
		if err != nil {
			bad = fmt.Errorf("tar lists %q: %w", s.Text(), err)
			continue
		}
		name = path.Clean(strings.TrimLeft(name, "/"))
		l.names[name] = true
		if strings.HasPrefix(path.Base(name), whiteout) {
			l.whiteouts = append(l.whiteouts, name)
		}
	}
	return l, errors.Join(bad, s.Err())
}

// unescape undoes tar's --quoting-style=escape: C escapes, bare quotes.
func unescape(s string) (string, error) {
	if !strings.Contains(s, `\`) {
		return s, nil
	}
	return strconv.Unquote(`"` + strings.ReplaceAll(s, `"`, `\"`) + `"`)
}

// carryOut removes from the tree what the layer's whiteouts tell. They are
// about lower layers only: what the layer itself contains stays, whatever the
// order. Directories keep the times that the layer gave them.
func (l listing) carryOut(root string) error {
	for _, name := range l.whiteouts {
		dir, base := path.Split(name)
		dir = path.Clean(dir)
		err := keepTime(filepath.Join(root, dir), func() error {
			if err := os.Remove(filepath.Join(root, name)); err != nil {
				return err
			}
			if base == opaque {
				return l.removeChildren(root, dir)
			}
			victim := path.Join(dir, strings.TrimPrefix(base, whiteout))
			return l.remove(root, victim)
		})
		if err != nil {
			return fmt.Errorf("whiteout %s: %w", name, err)
		}
	}
	return nil
}

// remove deletes a name and all below it but what the layer contains.
func (l listing) remove(root, name string) error {
	if !l.names[name] {
		return os.RemoveAll(filepath.Join(root, name))
	}
	if st, err := os.Lstat(filepath.Join(root, name)); err != nil || !st.IsDir() {
		return err
	}
	return l.removeChildren(root, name)
}

func (l listing) removeChildren(root, name string) error {
	return keepTime(filepath.Join(root, name), func() error {
		children, err := os.ReadDir(filepath.Join(root, name))
		if err != nil {
			return err
		}
		for _, c := range children {
			if strings.HasPrefix(c.Name(), whiteout) {
				continue // its own turn comes
			}
			if err := l.remove(root, path.Join(name, c.Name())); err != nil {
				return err
			}
		}
		return nil
	})
}

// keepTime runs fn, which changes a directory, and restores its mtime.
func keepTime(dir string, fn func() error) error {
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return &os.PathError{Op: "lstat", Path: dir, Err: err}
	}
	if err := fn(); err != nil {
		return err
	}
	times := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, st.Mtim}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, dir, times, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &os.PathError{Op: "utimensat", Path: dir, Err: err}
	}
	return nil
}
