package erofs

import (
	"bytes"
	"errors"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/index"
)

// Nodes tells file by file what Tree tells at once.
func TestNodes(t *testing.T) {
	w := awkward()
	o := w.options()
	o.Flat = true
	l, img := w.build(t, o)
	im, tree, _ := read(t, img)
	n := im.Nodes()
	flat := make([]byte, len(img))
	copy(flat, img)
	for i, d := range l.Devices() {
		at := int(d.Mapped) * BlockSize
		flat = append(flat, make([]byte, max(0, at+len(w.devices[i])-len(flat)))...)
		copy(flat[at:], w.devices[i])
	}
	links := map[*index.Inode]uint32{}
	tree.Walk(func(_ string, ino *index.Inode) error {
		links[ino]++
		return nil
	})
	var walk func(path string, nid uint64, ino, original *index.Inode)
	walk = func(path string, nid uint64, ino, original *index.Inode) {
		got, err := n.Stat(nid)
		if err != nil {
			t.Fatalf("%.100q: %v", path, err)
		}
		if got.Mode != ino.Mode || got.UID != ino.UID || got.GID != ino.GID || got.Mtime != ino.Mtime || got.Rdev != ino.Rdev ||
			ino.IsRegular() && got.Size != ino.Size || !ino.IsDir() && got.Nlink != links[ino] {
			t.Errorf("%.100q: %+v, %d links, want %+v", path, got, links[ino], facts(ino))
		}
		xs, err := n.Xattrs(nid)
		if err != nil || fmt.Sprint(xs) != fmt.Sprint(byName(ino.Xattrs)) {
			t.Errorf("%.100q: attributes %v, %v", path, xs, err)
		}
		switch ino.Type() {
		case unix.S_IFLNK:
			if target, err := n.Readlink(nid); err != nil || target != ino.Target {
				t.Errorf("%.100q: %.100q, %v", path, target, err)
			}
		case unix.S_IFREG:
			for _, off := range []int64{0, 1, 5000, 65000, ino.Size - 1, ino.Size} {
				w.sameMapped(t, n, flat, nid, original, max(off, 0))
			}
		case unix.S_IFDIR:
			seen := 0
			for from := int64(0); ; { // one name a call
				var e Name
				if err := n.List(nid, from, func(x Name) bool { e = x; return false }); err != nil {
					t.Fatal(err)
				}
				if e.Name == "" {
					break
				}
				from = e.Next
				if e.Name == "." || e.Name == ".." {
					continue
				}
				seen++
				child := ino.Children[e.Name]
				if child == nil || e.Type != child.Type() {
					t.Fatalf("%.100q: %.100q, type %o", path, e.Name, e.Type)
				}
				if found, err := n.Lookup(nid, e.Name); err != nil || found != e.NID {
					t.Errorf("%.100q: lookup of %.100q: %d, %v, want %d", path, e.Name, found, err, e.NID)
				}
				if _, err := n.Lookup(nid, e.Name+"\x00"); !errors.Is(err, index.ErrNotExist) {
					t.Errorf("%.100q: lookup of nothing: %v", path, err)
				}
				if seen < 200 {
					walk(path+"/"+e.Name, e.NID, child, original.Children[e.Name])
				}
			}
			if seen != len(ino.Children) {
				t.Errorf("%.100q: %d names, want %d", path, seen, len(ino.Children))
			}
		}
	}
	walk("", n.Root(), tree.Root, w.tree.Root)
}

// sameMapped compares what Map tells about a part of a file with its content.
func (w *world) sameMapped(t *testing.T, n *Nodes, flat []byte, nid uint64, ino *index.Inode, off int64) {
	t.Helper()
	const length = 100000
	pieces, err := n.Map(nid, off, length)
	if err != nil {
		t.Fatal(err)
	}
	want := w.content(ino, off, int(max(0, min(length, ino.Size-off))))
	var got []byte
	for _, p := range pieces {
		if p.Flat < 0 {
			got = append(got, make([]byte, p.Length)...)
		} else {
			got = append(got, flat[p.Flat:][:p.Length]...)
		}
	}
	if !bytes.Equal(got, want) {
		t.Errorf("inode %d at %d: %d bytes in %v, want %d", nid, off, len(got), pieces, len(want))
	}
}

// FuzzNodes walks hostile metadata file by file. It must end, without a panic.
func FuzzNodes(f *testing.F) {
	w := newWorld(2)
	w.tree.Root.Children["f"] = w.file(70000, index.Extent{Chunk: w.chunk(1, 65536, 0)}, index.Extent{Off: 65536, Chunk: w.chunk(2, 4464, 0)})
	w.tree.Root.Children["l"] = &index.Inode{Mode: unix.S_IFLNK | 0o777, Target: "f"}
	w.tree.Root.Children["d"] = dir()
	o := w.options()
	o.Checksum = false
	for _, o.Flat = range []bool{false, true} {
		_, img := w.build(f, o)
		f.Add(img)
	}
	f.Fuzz(func(t *testing.T, img []byte) {
		im, err := Open(bytes.NewReader(img), int64(len(img)), "image")
		if err != nil {
			return
		}
		n := im.Nodes()
		n.Find("d/../l/f")
		nids := []uint64{n.Root()}
		for i := 0; i < len(nids) && i < 100; i++ {
			nid := nids[i]
			s, err := n.Stat(nid)
			if err != nil {
				continue
			}
			n.Xattrs(nid)
			n.Readlink(nid)
			n.Lookup(nid, "f")
			for _, off := range []int64{0, s.Size / 2, s.Size - 1, 1<<63 - 1} {
				pieces, _ := n.Map(nid, off, 128<<10)
				for _, p := range pieces {
					if p.Length <= 0 || p.Flat < -1 {
						t.Fatalf("%+v", p)
					}
				}
			}
			n.List(nid, 0, func(e Name) bool { nids = append(nids, e.NID); return len(nids) < 200 })
		}
	})
}
