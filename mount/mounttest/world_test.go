// Package mounttest holds every face and every reader of a format to the same
// tree and the same bytes, those that GNU tar unpacks, and to errors instead of
// wrong ones. A new face is one more in mount.Faces; a new reader is one more line
// in the list of readers_test.go, with a function that makes an image of that
// format from tar archives.
package mounttest

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/bench/plain"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// file is one entry of the awkward tree, from which both the archive and the
// index are made.
type file struct {
	tar.Header
	data []byte
	acl  string // not left to tar
}

// hung is the file whose data are in a blob of their own.
const hung = "hung"

// awkward lists a tree with everything that is hard. Parents come first.
func awkward() []file {
	rnd := rand.NewChaCha8([32]byte{7})
	random := func(n int) []byte {
		p := make([]byte, n)
		rnd.Read(p)
		return p
	}
	when := time.Unix(1700000000, 999999999)
	var all []file
	add := func(kind byte, name string, mode int64, data []byte) *file {
		all = append(all, file{Header: tar.Header{Typeflag: kind, Name: name, Mode: mode, ModTime: when, Size: int64(len(data))}, data: data})
		return &all[len(all)-1]
	}
	dir := func(name string, mode int64) *file { return add(tar.TypeDir, name, mode, nil) }
	reg := func(name string, mode int64, data []byte) *file { return add(tar.TypeReg, name, mode, data) }

	dir(".", 0o755)
	reg("empty", 0o600, nil)
	for _, n := range []int{1, 4095, 4096, 4097, 65535, 65536, 65537, 1<<20 + 7} {
		reg(fmt.Sprintf("size%d", n), 0o644, random(n))
	}
	reg("big", 0o644, random(8<<20+123))
	reg(hung, 0o644, bytes.Repeat([]byte{0xee}, 1<<20))
	sparse := make([]byte, 10<<20)
	copy(sparse[3<<20:], random(65536))
	copy(sparse[9<<20:], random(70000))
	reg("sparse", 0o644, sparse)
	reg("hole", 0o644, make([]byte, 3<<20))

	self, err := os.ReadFile("/bin/true")
	if err != nil {
		panic(err)
	}
	reg("program", 0o755, self)
	reg("setuid", 0o4711, random(10))
	reg("setgid", 0o2750, random(10))
	reg("linked", 0o644, random(5000))
	dir("sticky", 0o1777)
	add(tar.TypeLink, "sticky/again", 0, nil).Linkname = "linked" // right behind its directory, or tar sets that one's mtime too early
	dir("closed", 0o700)
	reg("closed/inside", 0, random(100))
	owned := reg("owned", 0o640, random(5000))
	owned.Uid, owned.Gid = 4000000000, 70000
	reg("before-1970", 0o644, random(3)).ModTime = time.Unix(-1234567, 123456789)
	reg("epoch", 0o644, random(3)).ModTime = time.Unix(0, 1)

	add(tar.TypeLink, "link", 0, nil).Linkname = "linked"
	for _, n := range []int{1, 59, 3000, 4095} {
		add(tar.TypeSymlink, fmt.Sprintf("symlink%d", n), 0o777, nil).Linkname = strings.Repeat("t", n)
	}
	add(tar.TypeSymlink, "to-size1", 0o777, nil).Linkname = "./sticky/../size1"
	add(tar.TypeFifo, "fifo", 0o600, nil)
	null := add(tar.TypeChar, "null", 0o666, nil)
	null.Devmajor, null.Devminor = 1, 3
	wide := add(tar.TypeBlock, "disk", 0o660, nil)
	wide.Devmajor, wide.Devminor = 259, 300000

	attrs := reg("attrs", 0o640, random(100))
	attrs.PAXRecords = map[string]string{
		"SCHILY.xattr.user.empty":             "",
		"SCHILY.xattr.user.binary":            "\x00\xff\x00\n",
		"SCHILY.xattr.user.large":             strings.Repeat("v", 3000),
		"SCHILY.xattr.trusted.overlay.opaque": "y",
		"SCHILY.xattr.security.capability":    "\x01\x00\x00\x02\x00\x20" + strings.Repeat("\x00", 14),
	}
	// user::rw-, user:1000:r--, group::r--, mask::r--, other::---
	attrs.acl = "\x02\x00\x00\x00" + "\x01\x00\x06\x00\xff\xff\xff\xff" + "\x02\x00\x04\x00\xe8\x03\x00\x00" +
		"\x04\x00\x04\x00\xff\xff\xff\xff" + "\x10\x00\x04\x00\xff\xff\xff\xff" + "\x20\x00\x00\x00\xff\xff\xff\xff"
	dir("attributed", 0o755).PAXRecords = map[string]string{"SCHILY.xattr.user.dir": "yes"}

	dir("names", 0o755)
	for _, n := range []string{"!", "...", "..a", ".a", "a b", "\n", "\xff\xfe", "\x01", "ü", "A", "a", strings.Repeat("n", 255), strings.Repeat("\xc3", 255)} {
		reg("names/"+n, 0o644, []byte(n))
	}
	dir("many", 0o755)
	for i := range 10000 {
		reg(fmt.Sprintf("many/entry-%d", i), 0o644, nil)
	}
	deep := "deep"
	dir(deep, 0o755)
	for i := range 100 {
		deep += fmt.Sprintf("/directory-%d", i)
		dir(deep, 0o755)
	}
	reg(deep+"/bottom", 0o644, random(70000))
	return all
}

// extract lets GNU tar unpack layers into a new directory, one over the other.
func extract(t testing.TB, layers ...[]file) string {
	t.Helper()
	if out, _ := exec.Command("tar", "--version").Output(); !bytes.Contains(out, []byte("GNU tar")) {
		t.Skip("needs GNU tar")
	}
	dir := t.TempDir()
	for _, files := range layers {
		must(t, plain.Unpack(t.Context(), bytes.NewReader(gzipped(archive(t, files, false))), dir))
		for _, f := range files {
			if f.acl == "" {
				continue
			}
			if err := unix.Lsetxattr(filepath.Join(dir, f.Name), posixACL, []byte(f.acl), 0); err != nil {
				t.Skipf("%s has no ACLs: %v", dir, err)
			}
		}
	}
	return dir
}

const posixACL = "system.posix_acl_access"

// archive is the files as a tar archive, with their ACLs if it shall.
func archive(t testing.TB, files []file, acls bool) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		h := f.Header
		h.Format = tar.FormatPAX
		if f.acl != "" && acls {
			h.PAXRecords = maps.Clone(h.PAXRecords)
			h.PAXRecords["SCHILY.xattr."+posixACL] = f.acl
		}
		must(t, w.WriteHeader(&h))
		w.Write(f.data)
	}
	must(t, w.Close())
	return b.Bytes()
}

func gzipped(p []byte) []byte {
	var b bytes.Buffer
	w, _ := gzip.NewWriterLevel(&b, gzip.BestSpeed)
	w.Write(p)
	w.Close()
	return b.Bytes()
}

var kinds = map[byte]uint32{
	tar.TypeReg: unix.S_IFREG, tar.TypeDir: unix.S_IFDIR, tar.TypeSymlink: unix.S_IFLNK,
	tar.TypeFifo: unix.S_IFIFO, tar.TypeChar: unix.S_IFCHR, tar.TypeBlock: unix.S_IFBLK,
}

// indexOf makes the index of the tree, and the blobs it refers to: one with
// the data of hung, one with all others.
func indexOf(files []file) stored {
	tree := &index.Tree{}
	blobs := make([][]byte, 2)
	s := stored{tree: tree, blobs: map[string][]byte{}}
	byName := map[string]*index.Inode{}
	for _, f := range files {
		name := path.Clean(f.Name)
		ino := byName[f.Linkname]
		if f.Typeflag != tar.TypeLink {
			ino = inodeOf(tree, blobs, f)
		}
		byName[name] = ino
		if name == "." {
			tree.Root = ino
		} else {
			byName[path.Dir(name)].Children[path.Base(name)] = ino
		}
	}
	for _, b := range blobs {
		d := chunk.Sum(chunk.SHA256, b).String()
		s.blobs[d] = b
		tree.Blobs = append(tree.Blobs, index.Blob{Digest: d, Size: int64(len(b)), Spans: []index.Span{{Size: int64(len(b)), Length: int64(len(b))}}})
	}
	return s
}

func inodeOf(tree *index.Tree, blobs [][]byte, f file) *index.Inode {
	ino := &index.Inode{
		Mode: kinds[f.Typeflag] | uint32(f.Mode), UID: uint32(f.Uid), GID: uint32(f.Gid),
		Mtime: index.Time{Sec: f.ModTime.Unix(), Nsec: uint32(f.ModTime.Nanosecond())},
		Size:  int64(len(f.data)),
	}
	switch f.Typeflag {
	case tar.TypeDir:
		ino.Children = map[string]*index.Inode{}
	case tar.TypeSymlink:
		ino.Target = f.Linkname
	case tar.TypeChar, tar.TypeBlock:
		ino.Rdev = unix.Mkdev(uint32(f.Devmajor), uint32(f.Devminor))
	}
	for key, value := range f.PAXRecords {
		ino.Xattrs = append(ino.Xattrs, index.Xattr{Name: strings.TrimPrefix(key, "SCHILY.xattr."), Value: value})
	}
	if f.acl != "" {
		ino.Xattrs = append(ino.Xattrs, index.Xattr{Name: posixACL, Value: f.acl})
	}
	blob := 0
	if f.Name == hung {
		blob = 1
	}
	for off := 0; off < len(f.data); off += chunk.Size {
		p := f.data[off:min(off+chunk.Size, len(f.data))]
		if len(bytes.Trim(p, "\x00")) == 0 {
			continue // a hole
		}
		ino.Extents = append(ino.Extents, index.Extent{Off: int64(off), Chunk: uint32(len(tree.Chunks))})
		tree.Chunks = append(tree.Chunks, index.Chunk{
			Digest: chunk.Sum(chunk.BLAKE3, p), Size: uint32(len(p)), Blob: uint32(blob), Offset: int64(len(blobs[blob])),
		})
		blobs[blob] = append(blobs[blob], p...)
	}
	return ino
}
