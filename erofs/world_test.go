package erofs

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/index"
)

// world is a tree together with the bytes of its devices.
type world struct {
	tree    index.Tree
	devices [][]byte
	locs    []Location
	rnd     *rand.Rand
}

func newWorld(devices int) *world {
	return &world{
		tree:    index.Tree{Root: dir()},
		devices: make([][]byte, devices),
		rnd:     rand.New(rand.NewPCG(1, 2)),
	}
}

func dir() *index.Inode {
	return &index.Inode{Mode: unix.S_IFDIR | 0o755, Children: map[string]*index.Inode{}, Mtime: index.Time{Sec: 1e9, Nsec: 5}}
}

// chunk puts size random bytes at the end of a device, after skip free blocks,
// and returns the number of the chunk.
func (w *world) chunk(device, size, skip int) uint32 {
	d := &w.devices[device-1]
	*d = append(*d, make([]byte, skip*BlockSize)...)
	block := len(*d) / BlockSize
	for range size {
		*d = append(*d, byte(w.rnd.Uint32()))
	}
	*d = append(*d, make([]byte, -len(*d)&(BlockSize-1))...)
	w.tree.Chunks = append(w.tree.Chunks, index.Chunk{Size: uint32(size)})
	w.locs = append(w.locs, Location{Device: uint16(device), Block: uint32(block)})
	return uint32(len(w.locs) - 1)
}

func (w *world) file(size int64, extents ...index.Extent) *index.Inode {
	return &index.Inode{Mode: unix.S_IFREG | 0o644, Size: size, Extents: extents, Mtime: index.Time{Sec: 1700000000, Nsec: 999999999}}
}

func (w *world) options() Options {
	o := Options{Locate: func(c uint32) Location { return w.locs[c] }, Checksum: true, UUID: [16]byte{1, 2, 3}, BuildTime: index.Time{Sec: 1234567890, Nsec: 17}}
	for i, d := range w.devices {
		o.Devices = append(o.Devices, Device{Tag: fmt.Sprintf("segment-%d", i), Blocks: uint32(len(d) / BlockSize)})
	}
	return o
}

// content returns n bytes of a file from an offset.
func (w *world) content(ino *index.Inode, off int64, n int) []byte {
	out := make([]byte, n)
	for _, e := range ino.Extents {
		loc, size := w.locs[e.Chunk], int64(w.tree.Chunks[e.Chunk].Size)
		from, to := max(off, e.Off), min(off+int64(n), e.Off+size)
		if from < to {
			copy(out[from-off:], w.devices[loc.Device-1][int64(loc.Block)*BlockSize+from-e.Off:][:to-from])
		}
	}
	return out
}

// build lays out a world and returns the image.
func (w *world) build(t testing.TB, o Options) (*Layout, []byte) {
	t.Helper()
	l, err := NewLayout(&w.tree, o)
	if err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	n, err := l.WriteTo(&buf)
	if err != nil || n != int64(buf.Len()) || n != int64(l.Blocks())*BlockSize {
		t.Fatalf("WriteTo says %d bytes, %v; has %d, planned %d blocks", n, err, buf.Len(), l.Blocks())
	}
	return l, buf.Bytes()
}

// store writes the image and its devices as files, and all in one flat file.
func (w *world) store(t testing.TB, l *Layout, img []byte) (meta string, devices []string, flat string) {
	t.Helper()
	base := t.TempDir()
	write := func(name string, b []byte) string {
		p := filepath.Join(base, name)
		if err := os.WriteFile(p, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	meta, flat = write("meta", img), write("flat", img)
	f, err := os.OpenFile(flat, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for i, d := range l.Devices() {
		devices = append(devices, write(fmt.Sprintf("device%d", i), w.devices[i]))
		if _, err := f.WriteAt(w.devices[i], int64(d.Mapped)*BlockSize); err != nil {
			t.Fatal(err)
		}
	}
	return meta, devices, flat
}

// awkward is a world with everything that is hard.
func awkward() *world {
	w := newWorld(3)
	root := w.tree.Root
	root.Mode |= unix.S_ISVTX
	root.Xattrs = []index.Xattr{{Name: "user.root", Value: "yes"}}
	add := func(name string, ino *index.Inode) *index.Inode {
		root.Children[name] = ino
		return ino
	}
	ext := func(off int64, c uint32) index.Extent { return index.Extent{Off: off, Chunk: c} }

	add("empty", w.file(0))
	add("one", w.file(1, ext(0, w.chunk(1, 1, 0))))
	add("block", w.file(BlockSize, ext(0, w.chunk(1, BlockSize, 3))))
	add("odd", w.file(5000, ext(0, w.chunk(2, 5000, 0))))
	add("padded", w.file(5500, ext(0, w.chunk(2, 5000, 0)))) // a chunk, then zeros in its last block
	var run []index.Extent
	for i := range int64(5) { // contiguous: one entry
		run = append(run, ext(i<<16, w.chunk(1, 65536, 0)))
	}
	run = append(run, ext(5<<16, w.chunk(1, 70, 0)))
	add("contiguous", w.file(5<<16+70, run...))
	var frag []index.Extent
	for i := range int64(7) { // pieces of 64 KiB all over the devices
		frag = append(frag, ext(i<<16, w.chunk(1+int(i%3), 65536, 1)))
	}
	add("fragmented", w.file(7<<16, frag...))
	add("shared", w.file(2<<16, ext(0, frag[3].Chunk), ext(65536, frag[0].Chunk)))
	add("blocks", w.file(9000, ext(0, w.chunk(3, 4096, 1)), ext(4096, w.chunk(2, 4096, 1)), ext(8192, w.chunk(1, 808, 1))))
	add("sparse", w.file(10<<20, ext(1<<20, w.chunk(2, 65536, 0)), ext(1<<20+65536, w.chunk(2, 100, 0)), ext(9<<20, w.chunk(1, 4096, 0))))
	add("hole", w.file(3<<20))
	add("huge", w.file(5<<40+1))
	add("endless", w.file(1<<62))

	old := add("old", w.file(0))
	old.Mtime = index.Time{Sec: -1234567, Nsec: 123456789}
	old.Mode, old.UID, old.GID = unix.S_IFREG|unix.S_ISUID|0o711, 4000000000, 70000
	linked := add("linked", w.file(5000, ext(0, w.chunk(3, 5000, 0))))
	add("link", linked)
	sub := add("sub", dir())
	sub.Children["another"] = linked
	sub.Children["fifo"] = &index.Inode{Mode: unix.S_IFIFO | 0o600}
	sub.Children["socket"] = &index.Inode{Mode: unix.S_IFSOCK | 0o600}
	sub.Children["whiteout"] = &index.Inode{Mode: unix.S_IFCHR}
	sub.Children["whiteout2"] = sub.Children["whiteout"]
	sub.Children["char"] = &index.Inode{Mode: unix.S_IFCHR | 0o666, Rdev: unix.Mkdev(4095, 0xfffff)}
	sub.Children["disk"] = &index.Inode{Mode: unix.S_IFBLK | 0o660, Rdev: unix.Mkdev(8, 300)}
	sub.Children["void"] = dir()
	for _, n := range []int{1, 59, 3000, 4000, 4031, 4032, 4033, 4095} {
		sub.Children[fmt.Sprintf("symlink%d", n)] = &index.Inode{Mode: unix.S_IFLNK | 0o777, Target: strings.Repeat("t", n)}
	}

	names := add("names", dir())
	for _, n := range []string{"!", "-", "+", "...", "..a", ".-", ".a", "a b", "\n", "\xff\xfe", "\x01", "ü", strings.Repeat("n", 255), strings.Repeat("\xc3", 255), "A", "a"} {
		names.Children[n] = w.file(0)
	}
	for _, n := range []int{16, 17, 100} { // directories of full blocks and just beyond
		d := add(fmt.Sprintf("long%d", n), dir())
		for i := range n {
			d.Children[fmt.Sprintf("%0255d", i)] = linked
		}
	}
	exact := add("exact", dir()) // 13+14 for the dots, 15 names of 255: 4032, and one of 52: 4096
	for i := range 15 {
		exact.Children[fmt.Sprintf("%0255d", i)] = linked
	}
	exact.Children[strings.Repeat("x", 52)] = linked
	many := add("many", dir())
	for i := range 10000 {
		many.Children[fmt.Sprintf("entry-%d", i)] = w.file(0)
	}
	deep := add("deep", dir())
	for i := range 400 {
		next := dir()
		deep.Children[fmt.Sprintf("directory-number-%d", i)] = next
		deep = next
	}
	deep.Children["bottom"] = w.file(70000, ext(0, w.chunk(1, 65536, 0)), ext(65536, w.chunk(1, 4464, 0)))

	attrs := add("attrs", w.file(100, ext(0, w.chunk(2, 100, 0))))
	acl := "\x02\x00\x00\x00" + "\x01\x00\x06\x00\xff\xff\xff\xff" + "\x02\x00\x04\x00\xe8\x03\x00\x00" +
		"\x04\x00\x04\x00\xff\xff\xff\xff" + "\x10\x00\x04\x00\xff\xff\xff\xff" + "\x20\x00\x04\x00\xff\xff\xff\xff"
	attrs.Xattrs = []index.Xattr{ // not in order of names
		{Name: "user.empty"}, {Name: "user.binary", Value: "\x00\xff\x00\n"}, {Name: "user.large", Value: strings.Repeat("v", 60000)},
		{Name: "system.posix_acl_access", Value: acl}, {Name: "trusted.overlay.opaque", Value: "y"},
		{Name: "security.capability", Value: "\x01\x00\x00\x02\x00\x20" + strings.Repeat("\x00", 14)},
		{Name: "user." + strings.Repeat("l", 250), Value: "1"}, {Name: "user.x", Value: "abcde"},
	}
	sub.Xattrs = []index.Xattr{{Name: "system.posix_acl_default", Value: acl}, {Name: "user.large", Value: strings.Repeat("z", 5000)}}
	sub.Children["symlink59"].Xattrs = []index.Xattr{{Name: "trusted.of", Value: "a link"}}
	sub.Children["char"].Xattrs = []index.Xattr{{Name: "trusted.of", Value: "a device"}}
	return w
}
