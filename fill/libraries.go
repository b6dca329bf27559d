package fill

import (
	"debug/elf"
	"path"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/erofs"
)

// How much an image may have looked for: real ones stay far below.
const (
	maxLookups = 1 << 15 // of paths
	maxWalks   = 16      // through all of its files
	maxWalked  = 1 << 17 // names in a walk
)

// programs are where env(1) looks, unless it is told otherwise.
var programs = []string{"/usr/local/bin", "/usr/bin", "/bin", "/usr/local/sbin", "/usr/sbin", "/sbin"}

// standard returns where libraries are looked for in the end: as glibc does, of Debian and
// of others, and musl.
func standard(m elf.Machine) []string {
	dirs := []string{"/lib64", "/usr/lib64", "/lib", "/usr/lib", "/usr/local/lib"}
	triplet := map[elf.Machine]string{
		elf.EM_X86_64: "x86_64", elf.EM_AARCH64: "aarch64", elf.EM_RISCV: "riscv64", elf.EM_PPC64: "powerpc64le", elf.EM_S390: "s390x",
	}[m]
	if triplet == "" {
		return dirs
	}
	return append([]string{"/lib/" + triplet + "-linux-gnu", "/usr/lib/" + triplet + "-linux-gnu"}, dirs...)
}

// libraries finds files of an image in its metadata.
type libraries struct {
	once    sync.Once
	nodes   *erofs.Nodes // nil if the metadata cannot be read
	lookups atomic.Int64
	walks   atomic.Int64
}

func (l *loads) open() bool {
	l.once.Do(func() {
		if im, err := erofs.Open(l.im.linked.Meta(), l.im.linked.MetaSize, l.im.linked.Dir); err == nil {
			l.nodes = im.Nodes()
		}
	})
	return l.nodes != nil
}

// need has files looked into, by path, or by name in the first of some directories that has
// it. What they need is searched for in those of inherit first.
func (l *loads) need(names, dirs, inherit []string) {
	if !l.open() {
		return
	}
	for _, name := range names {
		if flat, dir, ok := l.search(name, dirs); ok {
			o := object{flat: flat}
			if dir != "" {
				o.dir, o.search = dir, inherit
			}
			l.add(o)
		}
	}
}

// search returns where a file begins that is told by its path, or by its name, and then in
// which of some directories it is.
func (l *loads) search(name string, dirs []string) (flat int64, dir string, ok bool) {
	switch {
	case path.IsAbs(name):
		flat, ok = l.find(name)
	case name != "" && !strings.Contains(name, "/"):
		for _, dir := range dirs {
			if flat, ok := l.find(path.Join(dir, name)); ok {
				return flat, dir, true
			}
		}
	}
	return flat, "", ok
}

// find returns where a regular file begins.
func (l *loads) find(name string) (flat int64, ok bool) {
	if l.im.ctx.Err() != nil || l.lookups.Add(1) > maxLookups {
		return 0, false
	}
	n, err := l.nodes.Find(name)
	if err != nil || n.Mode&unix.S_IFMT != unix.S_IFREG {
		return 0, false
	}
	return l.begin(n.NID)
}

// begin returns where a file begins.
func (l *loads) begin(nid uint64) (flat int64, ok bool) {
	at, err := l.nodes.Map(nid, 0, 1)
	if err != nil || len(at) == 0 || at[0].Flat < 0 {
		return 0, false
	}
	return at[0].Flat, true
}

// dir returns the directory of a file that was read, "" if it is not found. All files are
// looked at for it.
func (l *loads) dir(flat int64) (dir string) {
	if !l.open() || l.walks.Add(1) > maxWalks {
		return ""
	}
	left := maxWalked
	var walk func(nid uint64, at string, depth int) bool
	walk = func(nid uint64, at string, depth int) (more bool) {
		more = true
		_ = l.nodes.List(nid, 0, func(n erofs.Name) bool {
			if left--; left < 0 || l.im.ctx.Err() != nil {
				more = false
			}
			switch {
			case !more || n.Name == "." || n.Name == "..":
			case n.Type == unix.S_IFDIR && depth < 64:
				more = walk(n.NID, path.Join(at, n.Name), depth+1)
			case n.Type == unix.S_IFREG:
				if begins, ok := l.begin(n.NID); ok && begins == flat {
					dir, more = at, false
				}
			}
			return more
		})
		return more
	}
	walk(l.nodes.Root(), "/", 0)
	return dir
}
