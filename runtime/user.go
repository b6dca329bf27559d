package runtime

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// identity is a resolved user.
type identity struct {
	uid, gid uint32
	groups   []uint32 // supplementary, gid first
	home     string
}

// maxAccounts bounds the image's /etc/passwd and /etc/group, in bytes. Files
// of 50,000 accounts take 3 MiB.
const maxAccounts = 4 << 20

// lookup resolves a user as docker does, from the image's own passwd and
// group files:
//
//   - the user part is a name, or else a number; "" is uid 0. A number need
//     not be in passwd; a name must;
//   - a group part replaces the passwd entry's group, and then there are no
//     supplementary groups but that one;
//   - without one they are the groups that list the user's name.
func lookup(spec string, passwd, group []byte) (identity, error) {
	user, grp, hasGroup := strings.Cut(spec, ":")
	id := identity{home: "/"}
	name, found := "", false
	for f := range accounts(passwd, 7) {
		uid, err := parseID(f[2])
		if err != nil {
			continue
		}
		gid, err := parseID(f[3])
		if err != nil {
			continue
		}
		if user != "" && (f[0] == user || f[2] == user) || user == "" && uid == 0 {
			name, found = f[0], true
			id.uid, id.gid = uid, gid
			if f[5] != "" {
				id.home = f[5]
			}
			break
		}
	}
	if !found && user != "" {
		uid, err := parseID(user)
		if err != nil {
			return identity{}, fmt.Errorf("unable to find user %q: not in the image's /etc/passwd", user)
		}
		id.uid = uid
	}
	if hasGroup && grp != "" {
		gid, err := lookupGroup(grp, group)
		if err != nil {
			return identity{}, err
		}
		id.gid, id.groups = gid, []uint32{gid}
		return id, nil
	}
	id.groups = []uint32{id.gid}
	for f := range accounts(group, 4) {
		gid, err := parseID(f[2])
		if name == "" || err != nil || slices.Contains(id.groups, gid) || len(id.groups) >= maxGroups {
			continue
		}
		if slices.Contains(strings.Split(f[3], ","), name) {
			id.groups = append(id.groups, gid)
		}
	}
	return id, nil
}

// maxGroups is the kernel's NGROUPS_MAX.
const maxGroups = 1 << 16

func lookupGroup(name string, group []byte) (uint32, error) {
	for f := range accounts(group, 4) {
		if gid, err := parseID(f[2]); err == nil && (f[0] == name || f[2] == name) {
			return gid, nil
		}
	}
	gid, err := parseID(name)
	if err != nil {
		return 0, fmt.Errorf("unable to find group %q: not in the image's /etc/group", name)
	}
	return gid, nil
}

// parseID reads a uid or gid. 1<<31 and above are refused as docker refuses
// them, which keeps -1 ("do not change" to setuid) out.
func parseID(s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 10, 31)
	return uint32(n), err
}

// accounts yields the lines of a passwd or group file that have n fields,
// which all lines have but comments, NIS entries and rubbish.
func accounts(file []byte, n int) func(yield func([]string) bool) {
	return func(yield func([]string) bool) {
		sc := bufio.NewScanner(bytes.NewReader(file))
		sc.Buffer(nil, maxAccounts+1)
		for sc.Scan() {
			f := strings.Split(strings.TrimSpace(sc.Text()), ":")
			if len(f) == n && !yield(f) {
				return
			}
		}
	}
}

// identify resolves a user from the files below root, a directory of any kind
// of mount. The two files are read at the same time since each may have to
// be fetched first.
func identify(spec string, root *os.File) (identity, error) {
	var passwd, group []byte
	var perr, gerr error
	done := make(chan struct{})
	go func() {
		group, gerr = readIn(root, "etc/group", maxAccounts)
		close(done)
	}()
	passwd, perr = readIn(root, "etc/passwd", maxAccounts)
	<-done
	for _, err := range []error{perr, gerr} {
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return identity{}, fmt.Errorf("user %q: %w", spec, err)
		}
	}
	return lookup(spec, passwd, group)
}

// readIn reads a regular file of at most max bytes below root. Symbolic links
// are followed as the container would, never out of root.
func readIn(root *os.File, name string, max int64) ([]byte, error) {
	// O_PATH first: opening a device or a FIFO has effects of its own.
	fd, err := unix.Openat2(int(root.Fd()), name, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS})
	if err != nil {
		if err == unix.ENOTDIR || err == unix.ELOOP {
			err = unix.ENOENT
		}
		return nil, &os.PathError{Op: "open", Path: "/" + name, Err: err}
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, &os.PathError{Op: "stat", Path: "/" + name, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size > max {
		return nil, fmt.Errorf("/%s: want a regular file of at most %d bytes", name, max)
	}
	f, err := os.Open("/proc/self/fd/" + strconv.Itoa(fd))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, max))
}
