package erofs

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/shale-image/shale/index"
)

// read opens an image and returns its tree and each file's runs by path.
func read(t testing.TB, img []byte) (*Image, *index.Tree, map[string][]Run) {
	t.Helper()
	im, err := Open(bytes.NewReader(img), int64(len(img)), "image")
	if err != nil {
		t.Fatal(err)
	}
	runs := map[string][]Run{}
	tree, err := im.Tree(Limits{}, func(path string, size int64, r []Run) ([]index.Extent, error) {
		runs[path] = slices.Clone(r)
		return nil, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return im, tree, runs
}

// attributes is what an inode says about itself.
type attributes struct {
	Mode, UID, GID uint32
	Mtime          index.Time
	Rdev           uint64
	Size           int64
	Target         string
	Xattrs         []index.Xattr
}

func facts(i *index.Inode) attributes {
	return attributes{i.Mode, i.UID, i.GID, i.Mtime, i.Rdev, i.Size, i.Target, byName(i.Xattrs)}
}

// same compares trees except for data. Hard links must be the same ones.
func same(t testing.TB, want, got *index.Inode) {
	t.Helper()
	pairs := map[*index.Inode]*index.Inode{}
	var walk func(path string, a, b *index.Inode)
	walk = func(path string, a, b *index.Inode) {
		if known := pairs[a]; known != nil {
			if known != b {
				t.Errorf("%.100q: hard link is lost", path)
			}
			return
		}
		pairs[a] = b
		if d := cmp.Diff(facts(a), facts(b)); d != "" {
			t.Errorf("%.100q: %s", path, d)
		}
		if d := cmp.Diff(a.Names(), b.Names()); d != "" {
			t.Errorf("%.100q: names: %s", path, d)
			return
		}
		for name, c := range a.Children {
			walk(path+"/"+name, c, b.Children[name])
		}
	}
	walk("", want, got)
}

// sameData compares the content that runs point to with that of the world.
func (w *world) sameData(t testing.TB, runs map[string][]Run) {
	t.Helper()
	done := map[*index.Inode]bool{}
	w.tree.Walk(func(path string, ino *index.Inode) error {
		rs, ok := runs[path]
		if !ok {
			return nil
		}
		done[ino] = true
		covered := int64(0)
		for _, r := range rs {
			covered += r.Length
			got := w.devices[r.Device-1][int64(r.Block)*BlockSize:]
			if want := w.content(ino, r.Off, int(r.Length)); !bytes.HasPrefix(got, want) {
				t.Errorf("%s: wrong data in %+v", path, r)
			}
		}
		least := int64(0)
		for _, e := range ino.Extents {
			least += int64(w.tree.Chunks[e.Chunk].Size)
		}
		if covered < least || covered > ino.Size {
			t.Errorf("%s: runs have %d bytes, extents %d", path, covered, least)
		}
		return nil
	})
	w.tree.Walk(func(path string, ino *index.Inode) error {
		if ino.IsRegular() && ino.Size > 0 && !done[ino] {
			t.Errorf("%.100q: no runs were told", path)
		}
		return nil
	})
}

func TestRoundTrip(t *testing.T) {
	for _, flat := range []bool{false, true} {
		t.Run(fmt.Sprintf("flat=%t", flat), func(t *testing.T) { roundTrip(t, flat) })
	}
}

func roundTrip(t *testing.T, flat bool) {
	w := awkward()
	o := w.options()
	o.Flat = flat
	o.Ext, o.Compat = []byte("extension"), CompatMtime
	l, img := w.build(t, o)
	im, tree, runs := read(t, img)
	same(t, w.tree.Root, tree.Root)
	w.sameData(t, runs)
	if d := cmp.Diff(l.Devices(), im.Devices()); d != "" {
		t.Error(d)
	}
	if string(im.Ext()[:10]) != "extension\x00" || len(im.Ext()) != MaxExt {
		t.Errorf("extension is %q", im.Ext())
	}
	s := im.Super()
	inodes := map[*index.Inode]bool{}
	w.tree.Walk(func(_ string, ino *index.Inode) error { inodes[ino] = true; return nil })
	if s.UUID != o.UUID || s.BuildTime != o.BuildTime || s.Blocks != l.Blocks() || s.Inodes != uint64(len(inodes)) ||
		s.FeatureCompat != CompatChecksum|CompatMtime || s.FeatureIncompat != 0xc || s.ExtraDevices != 3 || s.DevtSlotOff != 11 {
		t.Errorf("super block is %+v", s)
	}
	for path, n := range map[string]int{"one": 1, "contiguous": 1, "padded": 1, "odd": 1, "fragmented": 7, "blocks": 3, "hole": 0, "endless": 0} {
		if len(runs[path]) != n {
			t.Errorf("%s: %d runs, want %d: %+v", path, len(runs[path]), n, runs[path])
		}
	}
}

// What is written depends on the tree alone, and on nothing else that differs
// between two runs.
func TestDeterministic(t *testing.T) {
	w := awkward()
	l, a := w.build(t, w.options())
	w2 := awkward()
	for _, i := range []string{"attrs", "sub"} {
		w2.tree.Root.Children[i].Xattrs = slices.Clone(w2.tree.Root.Children[i].Xattrs)
		slices.Reverse(w2.tree.Root.Children[i].Xattrs)
	}
	many := w2.tree.Root.Children["many"]
	many.Children = maps.Collect(maps.All(many.Children))
	_, b := w2.build(t, w2.options())
	if !bytes.Equal(a, b) {
		t.Error("two builds of one tree differ")
	}
	var again bytes.Buffer
	if _, err := l.WriteTo(&again); err != nil || !bytes.Equal(a, again.Bytes()) {
		t.Errorf("writing again differs: %v", err)
	}
}

// RAFS: all chunks have one size, entries carry the chunk's index, and an
// extension is filled in after the layout is known.
func TestFixedChunks(t *testing.T) {
	w := newWorld(2)
	var es []index.Extent
	for i := range int64(5) {
		es = append(es, index.Extent{Off: i << 20, Chunk: w.chunk(1+int(i%2), 1<<20, 0)})
	}
	es = append(es, index.Extent{Off: 6 << 20, Chunk: w.chunk(2, 1234, 0)})
	w.tree.Root.Children["f"] = w.file(6<<20+1234, es...)
	for i := range w.locs {
		w.locs[i].Index = uint32(i) << 14
	}
	w.locs[5].Index = 1<<24 - 1
	o := w.options()
	o.ChunkBits, o.Checksum, o.FlatAlign = 20, false, 512
	l, err := NewLayout(&w.tree, o)
	if err != nil {
		t.Fatal(err)
	}
	if d := l.Devices(); d[0].Mapped != 512 || d[1].Mapped != 512+1024 {
		t.Errorf("devices are mapped at %+v", d)
	}
	l.SetExt(bytes.Repeat([]byte{byte(l.Blocks())}, MaxExt))
	var buf bytes.Buffer
	if _, err := l.WriteTo(&buf); err != nil {
		t.Fatal(err)
	}
	im, tree, runs := read(t, buf.Bytes())
	same(t, w.tree.Root, tree.Root)
	w.sameData(t, runs)
	if im.Ext()[255] != byte(l.Blocks()) || im.Super().Checksum != 0 {
		t.Errorf("extension ends in %d, checksum is %d", im.Ext()[255], im.Super().Checksum)
	}
	for i, r := range runs["f"] {
		if r.Index != w.locs[i].Index || r.Device != w.locs[i].Device || r.Block != w.locs[i].Block {
			t.Errorf("run %d is %+v, want %+v", i, r, w.locs[i])
		}
	}
	l.SetExt(make([]byte, MaxExt+1))
	if _, err := l.WriteTo(&buf); !errors.Is(err, index.ErrUnsupported) {
		t.Errorf("too long an extension: %v", err)
	}
}

// With many devices the table passes block 0, and nids count from further on.
func TestManyDevices(t *testing.T) {
	for _, n := range []int{0, 1, 20, 21, 22, 254, 255, 256, 500, maxDevices} {
		w := newWorld(n)
		if n > 0 {
			for d := range n {
				w.devices[d] = make([]byte, BlockSize)
			}
			w.tree.Root.Children["f"] = w.file(9, index.Extent{Chunk: w.chunk(n, 9, 0)})
		}
		_, img := w.build(t, w.options())
		im, tree, runs := read(t, img)
		same(t, w.tree.Root, tree.Root)
		w.sameData(t, runs)
		if len(im.Devices()) != n || im.Super().RootNID == 0 {
			t.Errorf("%d devices: root nid %d, table has %d", n, im.Super().RootNID, len(im.Devices()))
		}
	}
}
