package link

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// attach shows an image through the kernel.
func attach(t *testing.T, meta string, devices []string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	fs, err := unix.Fsopen("erofs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		t.Skipf("the kernel has no erofs: fsopen: %v", err)
	}
	defer unix.Close(fs)
	check := func(what string, err error) {
		t.Helper()
		if errors.Is(err, unix.ENOTBLK) {
			t.Skip("the kernel has no file-backed EROFS mounts (Linux 6.12)")
		}
		if err != nil {
			log := make([]byte, 4096) // the kernel's own words
			n, _ := unix.Read(fs, log)
			t.Fatalf("%s: %v: %s", what, err, log[:max(n, 0)])
		}
	}
	check("source", unix.FsconfigSetString(fs, "source", meta))
	for _, d := range devices {
		check("device", unix.FsconfigSetString(fs, "device", d))
	}
	check("create", unix.FsconfigCreate(fs))
	m, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY)
	check("fsmount", err)
	defer unix.Close(m)
	dir := t.TempDir()
	check("move_mount", unix.MoveMount(m, "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH))
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount: %v", err)
			unix.Unmount(dir, unix.MNT_DETACH)
		}
	})
	return dir
}

// compare compares a mounted image with the tree it was made from.
func (w *world) compare(t *testing.T, mnt string) {
	t.Helper()
	err := w.tree.Walk(func(path string, ino *index.Inode) error {
		name := filepath.Join(mnt, path)
		switch {
		case ino.IsRegular():
			got, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			if !bytes.Equal(got, w.bytes(ino)) {
				t.Errorf("%s: wrong content", path)
			}
		case ino.IsDir():
			des, err := os.ReadDir(name)
			if err != nil {
				return err
			}
			var names []string
			for _, de := range des {
				names = append(names, de.Name())
			}
			if !slices.Equal(names, ino.Names()) {
				t.Errorf("%s: %q, want %q", path, names, ino.Names())
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// Three images over several segments, with shared chunks and holes, from one
// device a segment and from one flat file.
func TestKernel(t *testing.T) {
	p, dir := openPool(t), t.TempDir()
	for n := range 3 {
		w := newWorld(2)
		for i := range 12 {
			seed := uint64(5*n + i)
			a, b, c := w.chunk(0, seed, chunk.Size), w.chunk(1, seed+1000, chunk.Size), w.chunk(0, seed+2000, 1+i*5000)
			w.file(fmt.Sprint("whole", i), a, b, c)
			sub := directory()
			w.tree.Root.Children[fmt.Sprint("dir", i)] = sub
			holes := &index.Inode{Mode: unix.S_IFREG | 0o600, Size: 10*chunk.Size + 77}
			holes.Extents = []index.Extent{{Off: 4096, Chunk: c}, {Off: 3 * chunk.Size, Chunk: a}, {Off: 8 * chunk.Size, Chunk: b}, {Off: 9 * chunk.Size, Chunk: a}}
			sub.Children["holes"] = holes
			sub.Children["hard"] = w.tree.Root.Children["whole0"]
			sub.Children["empty"] = &index.Inode{Mode: unix.S_IFREG}
		}
		im := w.link(t, p, filepath.Join(dir, fmt.Sprint(n)))
		if len(im.Segments) != n+1 {
			t.Errorf("image %d has %d segments", n, len(im.Segments))
		}
		w.fill(t, p, im)
		var devices []string
		for _, s := range im.Segments {
			ps, _ := p.Segment(s.ID)
			devices = append(devices, ps.Path())
		}
		t.Run(fmt.Sprint("devices", n), func(t *testing.T) { w.compare(t, attach(t, filepath.Join(im.Dir, "meta"), devices)) })
		t.Run(fmt.Sprint("flat", n), func(t *testing.T) { w.compare(t, attach(t, flatten(t, p, im), nil)) })
	}
}

// The kernel takes two extents for neighbours whose flat addresses are apart by as much
// as the first one's device is from the start of flat addresses, and reads on behind the
// first (Options.Flat of package erofs). Files of every such distance are read right.
func TestKernelNeighbours(t *testing.T) {
	p, w := openPool(t), newWorld(1)
	var chunks []uint32
	for i := range 64 {
		chunks = append(chunks, w.chunk(0, uint64(i), chunk.Block))
	}
	for i := range chunks {
		for _, last := range []int{31, 63} { // the last one ends where the segment does
			f := &index.Inode{Mode: unix.S_IFREG | 0o644, Size: 2 * chunk.Block}
			f.Extents = []index.Extent{{Off: 0, Chunk: chunks[last]}, {Off: chunk.Block, Chunk: chunks[i]}}
			w.tree.Root.Children[fmt.Sprintf("%d-%d", last, i)] = f
		}
	}
	im := w.link(t, p, filepath.Join(t.TempDir(), "linked"))
	w.fill(t, p, im)
	s, _ := p.Segment(im.Segments[0].ID)
	t.Run("devices", func(t *testing.T) { w.compare(t, attach(t, filepath.Join(im.Dir, "meta"), []string{s.Path()})) })
	t.Run("flat", func(t *testing.T) { w.compare(t, attach(t, flatten(t, p, im), nil)) })
}

// A file whose chunks meet in two segments is found, and reads right from files.
func TestKernelMeets(t *testing.T) {
	p := openPool(t)
	old := newWorld(1)
	for i := range 8 {
		old.file(fmt.Sprint("a", i), old.chunk(0, uint64(i), chunk.Block))
	}
	if im := old.link(t, p, filepath.Join(t.TempDir(), "linked")); im.Meets {
		t.Error("an image of one segment meets")
	}
	for _, meets := range []bool{false, true} {
		w := newWorld(1)
		var chunks []uint32
		for i := range 8 {
			chunks = append(chunks, w.chunk(0, uint64(i), chunk.Block)) // of the first segment
		}
		for i := range 8 {
			c := w.chunk(0, uint64(1000+i), chunk.Block)
			chunks = append(chunks, c)
			w.file(fmt.Sprint("b", i), c)
		}
		f := &index.Inode{Mode: unix.S_IFREG | 0o644, Size: 3 * chunk.Block}
		f.Extents = []index.Extent{{Off: 0, Chunk: chunks[4]}, {Off: 2 * chunk.Block, Chunk: chunks[8+6]}}
		if meets {
			f.Extents[1].Chunk = chunks[8+5]
		}
		w.tree.Root.Children["both"] = f
		im := w.link(t, p, filepath.Join(t.TempDir(), "linked"))
		if len(im.Segments) != 2 || im.Meets != meets {
			t.Errorf("%d segments, meets %v; want 2, %v", len(im.Segments), im.Meets, meets)
		}
		w.fill(t, p, im)
		var devices []string
		for _, s := range im.Segments {
			ps, _ := p.Segment(s.ID)
			devices = append(devices, ps.Path())
		}
		w.compare(t, attach(t, filepath.Join(im.Dir, "meta"), devices))
	}
}
