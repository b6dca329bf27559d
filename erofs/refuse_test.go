package erofs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/index"
)

// What EROFS cannot say, and trees that make no sense, are refused by path.
func TestRefuse(t *testing.T) {
	link := func(target string) *index.Inode { return &index.Inode{Mode: unix.S_IFLNK | 0o777, Target: target} }
	attrs := func(xs ...index.Xattr) func(*world, *index.Inode) {
		return func(_ *world, f *index.Inode) { f.Xattrs = xs }
	}
	for name, c := range map[string]struct {
		want error
		says string
		make func(w *world, f *index.Inode) // f is "d/f", a file of one block
	}{
		"xattr prefix":    {index.ErrUnsupported, `d/f: not supported: attribute "system.nfs4_acl"`, attrs(index.Xattr{Name: "system.nfs4_acl"})},
		"xattr no prefix": {index.ErrUnsupported, `attribute "plain"`, attrs(index.Xattr{Name: "plain"})},
		"xattr rest":      {index.ErrUnsupported, `attribute "user."`, attrs(index.Xattr{Name: "user."})},
		"xattr acl rest":  {index.ErrUnsupported, `attribute "system.posix_acl_accessx"`, attrs(index.Xattr{Name: "system.posix_acl_accessx"})},
		"xattr NUL":       {index.ErrUnsupported, "no NUL", attrs(index.Xattr{Name: "user.a\x00b"})},
		"xattr twice":     {index.ErrCorrupt, "occurs twice", attrs(index.Xattr{Name: "user.a"}, index.Xattr{Name: "user.b"}, index.Xattr{Name: "user.a"})},
		"xattr name":      {index.ErrUnsupported, "1 to 255 bytes", attrs(index.Xattr{Name: "user." + strings.Repeat("x", 251)})},
		"xattr value":     {index.ErrUnsupported, "65536 bytes", attrs(index.Xattr{Name: "user.a", Value: strings.Repeat("x", 65536)})},
		"xattr sum": {index.ErrUnsupported, "all attributes take", func(_ *world, f *index.Inode) {
			for _, n := range "abcde" {
				f.Xattrs = append(f.Xattrs, index.Xattr{Name: "user." + string(n), Value: strings.Repeat("x", 65535)})
			}
		}},
		"name long":    {index.ErrUnsupported, "more than 255", func(w *world, f *index.Inode) { w.tree.Root.Children[strings.Repeat("n", 256)] = f }},
		"name slash":   {index.ErrUnsupported, "slash", func(w *world, f *index.Inode) { w.tree.Root.Children["a/b"] = f }},
		"name NUL":     {index.ErrUnsupported, "NUL", func(w *world, f *index.Inode) { w.tree.Root.Children["a\x00"] = f }},
		"name empty":   {index.ErrUnsupported, "empty", func(w *world, f *index.Inode) { w.tree.Root.Children[""] = f }},
		"name dots":    {index.ErrUnsupported, "..: not supported: the name is reserved", func(w *world, f *index.Inode) { w.tree.Root.Children[".."] = f }},
		"no inode":     {index.ErrCorrupt, "n: corrupt", func(w *world, f *index.Inode) { w.tree.Root.Children["n"] = nil }},
		"cycle":        {index.ErrCorrupt, "d/up: corrupt data: the directory has a second name", func(w *world, f *index.Inode) { w.tree.Root.Children["d"].Children["up"] = w.tree.Root }},
		"root":         {index.ErrCorrupt, "/: ", func(w *world, f *index.Inode) { w.tree.Root = f }},
		"mode":         {index.ErrUnsupported, "d/f: not supported: mode", func(w *world, f *index.Inode) { f.Mode = 0o644 }},
		"time":         {index.ErrCorrupt, "d/f: ", func(w *world, f *index.Inode) { f.Mtime.Nsec = 1e9 }},
		"link empty":   {index.ErrUnsupported, "d/l: ", func(w *world, f *index.Inode) { w.tree.Root.Children["d"].Children["l"] = link("") }},
		"link long":    {index.ErrUnsupported, "4096 bytes", func(w *world, f *index.Inode) { w.tree.Root.Children["l"] = link(strings.Repeat("x", 4096)) }},
		"link NUL":     {index.ErrUnsupported, "no NUL", func(w *world, f *index.Inode) { w.tree.Root.Children["l"] = link("x\x00") }},
		"rdev":         {index.ErrUnsupported, "4096:1", func(w *world, f *index.Inode) { f.Mode, f.Rdev = unix.S_IFCHR, unix.Mkdev(4096, 1) }},
		"size":         {index.ErrCorrupt, "size is -1", func(w *world, f *index.Inode) { f.Size, f.Extents = -1, nil }},
		"no chunk":     {index.ErrCorrupt, "chunk 99", func(w *world, f *index.Inode) { f.Extents[0].Chunk = 99 }},
		"empty chunk":  {index.ErrCorrupt, "is empty", func(w *world, f *index.Inode) { w.tree.Chunks[0].Size = 0 }},
		"past the end": {index.ErrCorrupt, "of 4095", func(w *world, f *index.Inode) { f.Size-- }},
		"before":       {index.ErrCorrupt, "offset -4096", func(w *world, f *index.Inode) { f.Extents[0].Off = -4096 }},
		"far":          {index.ErrCorrupt, "offset 9223372036854771712", func(w *world, f *index.Inode) { f.Extents[0].Off = 1<<63 - 4096 }},
		"unaligned":    {index.ErrUnsupported, "does not start", func(w *world, f *index.Inode) { f.Extents[0].Off, f.Size = 512, 8192 }},
		"overlap":      {index.ErrCorrupt, "overlaps", func(w *world, f *index.Inode) { f.Extents = append(f.Extents, f.Extents[0]) }},
		"device":       {index.ErrCorrupt, "device 2 of 1", func(w *world, f *index.Inode) { w.locs[0].Device = 2 }},
		"device 0":     {index.ErrCorrupt, "device 0 of 1", func(w *world, f *index.Inode) { w.locs[0].Device = 0 }},
		"device end":   {index.ErrCorrupt, "ends at block 2 of device 1, which has 1", func(w *world, f *index.Inode) { w.locs[0].Block = 1 }},
		"chunk index":  {index.ErrUnsupported, "has no place", func(w *world, f *index.Inode) { w.locs[0].Index = 1 << 24 }},
		"too fine":     {index.ErrLimit, "d/f: limit exceeded: 68719480832 bytes in pieces of 4096", func(w *world, f *index.Inode) { f.Size = 64<<30 + 4096 }},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(1)
			f := w.file(BlockSize, index.Extent{Chunk: w.chunk(1, BlockSize, 0)})
			d := dir()
			w.tree.Root.Children["d"], d.Children["f"] = d, f
			c.make(w, f)
			o := w.options()
			_, err := NewLayout(&w.tree, o)
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v, want %v that says %q", err, c.want, c.says)
			}
		})
	}
}

func TestRefuseOptions(t *testing.T) {
	for says, change := range map[string]func(w *world, o *Options){
		"tag":               func(_ *world, o *Options) { o.Devices[0].Tag = strings.Repeat("t", 65) },
		"chunk bits are 11": func(_ *world, o *Options) { o.ChunkBits = 11 },
		"chunk bits are 44": func(_ *world, o *Options) { o.ChunkBits = 44 },
		"65536 devices":     func(_ *world, o *Options) { o.Devices = make([]Device, 65536) },
		"257 bytes":         func(_ *world, o *Options) { o.Ext = make([]byte, 257) },
		"build time":        func(_ *world, o *Options) { o.BuildTime.Nsec = 1e9 },
		"beyond 2^32-1":     func(_ *world, o *Options) { o.Devices = append(o.Devices, Device{Blocks: 1<<32 - 1}) },
		"inside a chunk":    func(_ *world, o *Options) { o.ChunkBits = 13 },
		"has no place":      func(w *world, o *Options) { o.Flat, w.locs[0].Index = true, 1 },
		"more than the fixed": func(w *world, o *Options) {
			o.ChunkBits, w.locs[0].Index = 13, 1
			w.tree.Root.Children["f"].Extents = w.tree.Root.Children["f"].Extents[:1]
			w.tree.Chunks[0].Size = 3 * BlockSize
		},
	} {
		w := newWorld(1)
		a, b := w.chunk(1, BlockSize, 0), w.chunk(1, BlockSize, 1)
		w.tree.Root.Children["f"] = w.file(3*BlockSize, index.Extent{Chunk: a}, index.Extent{Off: BlockSize, Chunk: b})
		o := w.options()
		change(w, &o)
		if _, err := NewLayout(&w.tree, o); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("got %v, want an error that says %q", err, says)
		}
	}
	w := newWorld(1)
	o := w.options()
	o.Devices[0].Blocks, o.Devices[0].Mapped, o.KeepMapped = 1<<32-1, 7, true
	if l, err := NewLayout(&w.tree, o); err != nil || l.Devices()[0].Mapped != 7 {
		t.Errorf("KeepMapped: %v", err)
	}
}

// small is an image whose places are known: root, then "d", then "f" and "l".
func small(t testing.TB) (*Layout, []byte) {
	w := newWorld(1)
	d := dir()
	w.tree.Root.Children["d"] = d
	d.Children["f"] = w.file(9000, index.Extent{Chunk: w.chunk(1, 9000, 0)})
	d.Children["f"].Xattrs = []index.Xattr{{Name: "user.a", Value: "b"}}
	d.Children["l"] = &index.Inode{Mode: unix.S_IFLNK | 0o777, Target: "target"}
	o := w.options()
	o.Checksum = false
	return w.build(t, o)
}

// Damage of every kind is refused with the kind of error that says so.
func TestCorrupt(t *testing.T) {
	l, good := small(t)
	le := binary.LittleEndian
	root, d, f, link := l.nodes[0].pos, l.nodes[1].pos, l.nodes[2].pos, l.nodes[3].pos
	for name, c := range map[string]struct {
		want error
		hit  func(b []byte)
	}{
		"magic":          {index.ErrCorrupt, func(b []byte) { b[superOff]++ }},
		"512 blocks":     {index.ErrUnsupported, func(b []byte) { b[superOff+sbBlockBits] = 9 }},
		"feature":        {index.ErrUnsupported, func(b []byte) { b[superOff+sbIncompat] |= 0x10 }},
		"new feature":    {index.ErrUnsupported, func(b []byte) { b[superOff+sbIncompat+3] |= 0x80 }},
		"checksum":       {index.ErrCorrupt, func(b []byte) { b[superOff+sbCompat] |= CompatChecksum }},
		"device table":   {index.ErrCorrupt, func(b []byte) { le.PutUint16(b[superOff+sbExtraDevices:], 1000) }},
		"root nid":       {index.ErrCorrupt, func(b []byte) { le.PutUint16(b[superOff+sbRootNID:], 65535) }},
		"meta address":   {index.ErrCorrupt, func(b []byte) { le.PutUint32(b[superOff+sbMetaBlkaddr:], 1<<32-1) }},
		"root is a file": {index.ErrCorrupt, func(b []byte) { le.PutUint16(b[root+4:], unix.S_IFREG) }},
		"mode":           {index.ErrCorrupt, func(b []byte) { le.PutUint16(b[f+4:], 0) }},
		"time":           {index.ErrCorrupt, func(b []byte) { le.PutUint32(b[f+40:], 1e9) }},
		"format":         {index.ErrUnsupported, func(b []byte) { b[f+1] = 1 }},
		"layout":         {index.ErrUnsupported, func(b []byte) { b[f] = formatExtended | 7<<1 }},
		"compressed":     {index.ErrUnsupported, func(b []byte) { b[f] = formatExtended | 3<<1 }},
		"inline data":    {index.ErrUnsupported, func(b []byte) { b[f] = formatExtended | layoutInline<<1 }},
		"chunked dir":    {index.ErrUnsupported, func(b []byte) { b[d] = formatExtended | layoutChunked<<1 }},
		"48-bit chunks":  {index.ErrUnsupported, func(b []byte) { b[f+16] |= 0x40 }},
		"negative size":  {index.ErrCorrupt, func(b []byte) { b[f+15] = 0x80 }},
		"huge size":      {index.ErrCorrupt, func(b []byte) { b[f+14], b[f+16] = 0x80, chunkIndexes }},
		"huge dir":       {index.ErrCorrupt, func(b []byte) { b[d], b[d+14] = formatExtended, 0x80 }},
		"inline crosses": {index.ErrCorrupt, func(b []byte) { le.PutUint64(b[d+8:], 4000) }},
		"long link":      {index.ErrCorrupt, func(b []byte) { le.PutUint64(b[link+8:], 4096) }},
		"empty link":     {index.ErrCorrupt, func(b []byte) { le.PutUint64(b[link+8:], 0) }},
		"NUL in link":    {index.ErrCorrupt, func(b []byte) { b[link+64] = 0 }},
		"device 0":       {index.ErrUnsupported, func(b []byte) { le.PutUint16(b[f+88+2:], 0x100) }},
		"xattrs end":     {index.ErrCorrupt, func(b []byte) { le.PutUint16(b[f+2:], 0xffff) }},
		"xattr entry":    {index.ErrCorrupt, func(b []byte) { b[f+76] = 200 }},
		"xattr prefix":   {index.ErrUnsupported, func(b []byte) { b[f+77] = 5 }},
		"xattr prefix 0": {index.ErrUnsupported, func(b []byte) { b[f+77] = 0 }},
		"xattr acl name": {index.ErrCorrupt, func(b []byte) { b[f+77] = 2 }},
		"xattr shared":   {index.ErrCorrupt, func(b []byte) { b[f+68] = 9 }},
		"first nameoff":  {index.ErrCorrupt, func(b []byte) { b[d+64+8]++ }},
		"nameoff":        {index.ErrCorrupt, func(b []byte) { b[d+64+12+8] = 1 }},
		"empty name":     {index.ErrCorrupt, func(b []byte) { b[d+64+12+8] = b[d+64+8] }},
		"order":          {index.ErrCorrupt, func(b []byte) { b[d+64+48+3] = 'm' }},
		"twice":          {index.ErrCorrupt, func(b []byte) { b[d+64+48+3] = 'l' }},
		"slash":          {index.ErrCorrupt, func(b []byte) { b[d+64+48+3] = '/' }},
		"dot":            {index.ErrCorrupt, func(b []byte) { b[d+64] ^= 1 }},
		"dotdot":         {index.ErrCorrupt, func(b []byte) { b[d+64+12] ^= 1 }},
		"file type":      {index.ErrCorrupt, func(b []byte) { b[d+64+24+10] = 2 }},
		"far nid":        {index.ErrCorrupt, func(b []byte) { b[d+64+24+7] = 0x7f }},
		"cycle": {index.ErrCorrupt, func(b []byte) {
			copy(b[d+64+24:], b[d+64:][:8])
			b[d+64+24+10] = 2
		}},
	} {
		t.Run(name, func(t *testing.T) {
			b := bytes.Clone(good)
			c.hit(b)
			err := readAll(b, Limits{})
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), "image") {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
	if err := readAll(good, Limits{}); err != nil {
		t.Error(err)
	}
}

func TestLimits(t *testing.T) {
	_, img := small(t)
	for says, l := range map[string]Limits{
		"(Entries)": {Entries: 2}, "(MetadataBytes)": {MetadataBytes: 15}, "PathBytes": {PathBytes: 2},
	} {
		if err := readAll(img, l); !errors.Is(err, index.ErrLimit) || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: got %v", says, err)
		}
	}
	if err := readAll(img, Limits{Entries: 3, MetadataBytes: 16, PathBytes: 4, Runs: 1}); err != nil {
		t.Errorf("limits that are just met: %v", err)
	}
}

// A file that ends early is a fault of the file, not of the image.
func TestShortFile(t *testing.T) {
	_, img := small(t)
	_, err := Open(bytes.NewReader(img[:3000]), int64(len(img)), "image")
	if !errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, index.ErrCorrupt) {
		t.Errorf("got %v", err)
	}
	if _, err = Open(bytes.NewReader(img), 3000, "image"); !errors.Is(err, index.ErrCorrupt) {
		t.Errorf("3000 bytes: got %v", err)
	}
}

// A writer that fails ends the writing with its error.
func TestWriteError(t *testing.T) {
	w := awkward()
	l, img := w.build(t, w.options())
	for _, n := range []int{0, 1 << 17, len(img) - 1} {
		if _, err := l.WriteTo(&limited{n: n}); !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("after %d bytes: got %v", n, err)
		}
	}
}

type limited struct{ n int }

func (l *limited) Write(p []byte) (int, error) {
	if len(p) > l.n {
		return l.n, io.ErrClosedPipe
	}
	l.n -= len(p)
	return len(p), nil
}

func readAll(b []byte, limits Limits) error {
	im, err := Open(bytes.NewReader(b), int64(len(b)), "image")
	if err != nil {
		return err
	}
	_, err = im.Tree(limits, func(path string, size int64, runs []Run) ([]index.Extent, error) { return nil, nil })
	return err
}
