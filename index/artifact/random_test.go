package artifact

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"syscall"
	"testing"

	"github.com/klauspost/compress/zstd"
	"pgregory.net/rapid"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// drawTree draws any tree that an index can have.
func drawTree(t *rapid.T) *index.Tree {
	small := rapid.IntRange(0, 3)
	tr := &index.Tree{}
	layers := rapid.IntRange(1, 3).Draw(t, "layers")
	for i := range layers {
		b := index.Blob{Digest: digest(100 + i)}
		windowed := rapid.SampledFrom([]chunk.Codec{chunk.Gzip, chunk.ZstdBlocks}).Draw(t, "windowed")
		state := index.Window{Blob: uint32(layers), Offset: rapid.Int64Range(0, 1<<40).Draw(t, "states")}
		for range rapid.IntRange(1, 4).Draw(t, "spans") {
			var end int64
			if n := len(b.Spans); n > 0 {
				end = b.Spans[n-1].Offset + b.Spans[n-1].Length
			}
			s := index.Span{Codec: chunk.Codec(small.Draw(t, "codec")), Size: rapid.Int64Range(1, 1<<22).Draw(t, "size")}
			s.Offset = end + rapid.Int64Range(0, 700).Draw(t, "apart")
			s.Length = s.Size
			if s.Codec == chunk.Gzip {
				s.Codec = windowed
			}
			if s.Codec == chunk.ZstdBlocks {
				s.Size = (s.Size-1)%(1<<20) + 1
				s.Length = rapid.Int64Range(1, 2*s.Size+index.MoreStored).Draw(t, "length")
				if n := rapid.Uint32Range(0, uint32(s.Size)+1<<10).Draw(t, "state"); n > 0 {
					state.Offset, state.Length = state.Offset+int64(state.Length), n
					s.Window = state
				}
			}
			if s.Codec == chunk.Gzip {
				s.Length = rapid.Int64Range(1, 1<<22).Draw(t, "length")
				s.Bits = uint8(rapid.IntRange(0, 7).Draw(t, "bits"))
				if s.Window.Length = uint32(rapid.IntRange(0, 33<<10).Draw(t, "window")); s.Window.Length > 0 {
					s.Window.Blob = uint32(layers)
					s.Window.Offset = rapid.Int64Range(0, 1<<40).Draw(t, "where")
				}
				if s.Bits > 0 && end > 0 && s.Offset == end {
					s.Offset--
				}
			}
			b.Append(s)
		}
		tr.Blobs = append(tr.Blobs, b)
	}
	tr.Blobs = append(tr.Blobs, index.Blob{Digest: digest(99), Size: rapid.Int64Range(0, 1<<50).Draw(t, "windows")})
	for range rapid.IntRange(0, 12).Draw(t, "chunks") {
		blob := rapid.IntRange(0, layers-1).Draw(t, "blob")
		size := tr.Blobs[blob].StreamSize()
		c := index.Chunk{Blob: uint32(blob), Offset: rapid.Int64Range(0, size-1).Draw(t, "offset")}
		c.Size = uint32(rapid.Int64Range(1, min(chunk.MaxSize, size-c.Offset)).Draw(t, "size"))
		if rapid.Bool().Draw(t, "whole") && c.Size > 4096 {
			c.Size &^= 4095
		}
		c.Digest = chunk.Sum(chunk.Algorithm(rapid.IntRange(1, 2).Draw(t, "algorithm")), []byte{byte(small.Draw(t, "content"))})
		tr.Chunks = append(tr.Chunks, c)
	}
	var files []*index.Inode
	var inode func(depth int) *index.Inode
	inode = func(depth int) *index.Inode {
		types := []uint32{syscall.S_IFDIR, syscall.S_IFREG, syscall.S_IFREG, syscall.S_IFLNK, syscall.S_IFCHR, syscall.S_IFBLK, syscall.S_IFIFO, syscall.S_IFSOCK}
		typ := rapid.SampledFrom(types).Draw(t, "type")
		switch {
		case depth == 0:
			typ = syscall.S_IFDIR
		case typ == syscall.S_IFDIR && depth > 4:
			typ = syscall.S_IFREG
		case typ != syscall.S_IFDIR && len(files) > 0 && rapid.IntRange(0, 5).Draw(t, "link") == 0:
			return rapid.SampledFrom(files).Draw(t, "linked")
		}
		ino := &index.Inode{
			Mode: typ | rapid.Uint32Range(0, 0o7777).Draw(t, "mode"),
			UID:  rapid.Uint32().Draw(t, "uid"), GID: uint32(small.Draw(t, "gid")),
			Mtime: index.Time{Sec: rapid.Int64().Draw(t, "sec"), Nsec: rapid.Uint32Range(0, maxNsec).Draw(t, "nsec")},
		}
		for i := range small.Draw(t, "xattrs") {
			ino.Xattrs = append(ino.Xattrs, index.Xattr{Name: fmt.Sprint("user.", 9-i), Value: string(rapid.SliceOfN(rapid.Byte(), 0, 9).Draw(t, "value"))})
		}
		switch typ {
		case syscall.S_IFDIR:
			for range rapid.IntRange(0, 5).Draw(t, "children") {
				name := rapid.SliceOfN(rapid.Byte().Filter(func(b byte) bool { return b != 0 && b != '/' && b != '.' }), 1, 5).Draw(t, "name")
				if ino.Children == nil {
					ino.Children = map[string]*index.Inode{}
				}
				ino.Children[string(name)] = inode(depth + 1)
			}
			return ino
		case syscall.S_IFLNK:
			ino.Target = rapid.StringN(1, 100, 400).Filter(func(s string) bool { return !bytes.Contains([]byte(s), []byte{0}) }).Draw(t, "target")
		case syscall.S_IFCHR, syscall.S_IFBLK:
			ino.Rdev = rapid.Uint64().Draw(t, "rdev")
		case syscall.S_IFREG:
			for range small.Draw(t, "extents") {
				if len(tr.Chunks) == 0 {
					break
				}
				n := rapid.IntRange(0, len(tr.Chunks)-1).Draw(t, "chunk")
				off := up(ino.Size, 4096) + 4096*int64(small.Draw(t, "hole"))
				ino.Extents = append(ino.Extents, index.Extent{Off: off, Chunk: uint32(n)})
				ino.Size = off + int64(tr.Chunks[n].Size)
			}
			ino.Size += rapid.Int64Range(0, 1<<40).Filter(func(n int64) bool { return n&1 == 0 }).Draw(t, "tail") >> 1
		}
		files = append(files, ino)
		return ino
	}
	tr.Root = inode(0)
	return tr
}

func TestRandomTrees(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		tr := drawTree(rt)
		p, err := Encode(tr, someInfo1, index.Limits{})
		if err != nil {
			rt.Fatal(err)
		}
		got, info, err := Decode(p, "test", index.Limits{})
		if err != nil {
			rt.Fatal(err)
		}
		if err := index.Equal(tr, got); err != nil {
			rt.Fatal(err)
		}
		if !slices.Equal(placesOf(tr), placesOf(got)) {
			rt.Fatal("chunks lie elsewhere")
		}
		for i := range tr.Blobs {
			if !slices.Equal(tr.Blobs[i].Spans, got.Blobs[i].Spans) {
				rt.Fatalf("spans of blob %d: %v, want %v", i, got.Blobs[i].Spans, tr.Blobs[i].Spans)
			}
		}
		if again, err := Encode(got, info, index.Limits{}); err != nil || !bytes.Equal(again, p) {
			rt.Fatal("not the same again:", err)
		}
	})
}

var someInfo1 = Info{Manifest: digest(1), DiffIDs: []string{digest(2)}}

// TestDamage flips and cuts: the checksum sees all of it. Damage with a right
// checksum gives an error or some tree.
func TestDamage(t *testing.T) {
	p, err := Encode(small(), someInfo, index.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	for n := range p {
		if _, _, err := Decode(p[:n], "test", index.Limits{}); err == nil {
			t.Errorf("%d bytes of %d: no error", n, len(p))
		}
		if n >= headerSize+sumSize {
			sound(t, reseal(p[:n]))
		}
		q := bytes.Clone(p)
		for bit := range 8 {
			q[n] = p[n] ^ 1<<bit
			if _, _, err := Decode(q, "test", index.Limits{}); err == nil {
				t.Errorf("bit %d of byte %d: no error", bit, n)
			}
		}
		q[n] = p[n] ^ 1<<(n%8)
		sound(t, reseal(q))
	}
	// And what the frames decode to.
	forge(t, small(), func(e *encoder) {
		content := slices.Concat(e.content()...)
		for n := range content {
			content[n] ^= 1 << (n % 8)
			survive(t, quick(e.sums(), content))
			content[n] ^= 1 << (n % 8)
		}
	})
	forge(t, blocks(), func(e *encoder) {
		content := slices.Concat(e.content()...)
		for n := range content {
			content[n] ^= 1 << (n % 8)
			survive(t, quick(e.sums(), content))
			content[n] ^= 1 << (n % 8)
		}
	})
	forge(t, awkward(), func(e *encoder) {
		content := slices.Concat(e.content()...)
		for n := range content {
			if n%97 == 0 || n < 300 {
				content[n] ^= 1 << (n % 8)
				sound(t, quick(e.sums(), content))
				content[n] ^= 1 << (n % 8)
			}
		}
	})
}

var fast, _ = zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1))

// quick is seal, in less time.
func quick(sums, content []byte) []byte {
	p := seal(1, sums)
	p = fast.EncodeAll(content, p[:len(p)-sumSize])
	binary.LittleEndian.PutUint64(p[16:], uint64(len(content)))
	return reseal(append(p, make([]byte, sumSize)...))
}

// survive decodes anything. What is accepted must be sound, and encode to what
// says the same.
func survive(t *testing.T, p []byte) {
	t.Helper()
	tr, info := sound(t, p)
	if tr == nil {
		return
	}
	q, err := Encode(tr, info, index.Limits{})
	if err != nil {
		t.Fatalf("accepted, but cannot be encoded: %v", err)
	}
	if again, _, err := Decode(q, "test", index.Limits{}); err != nil || index.Equal(tr, again) != nil {
		t.Fatalf("encoded again it is another: %v", err)
	}
}

// sound decodes anything, and returns nothing or a tree that is sound.
func sound(t *testing.T, p []byte) (*index.Tree, Info) {
	t.Helper()
	tr, info, err := Decode(p, "test", index.Limits{Entries: 1 << 16, Memory: 1 << 24})
	if err != nil {
		return nil, info
	}
	if err := tr.CheckSpans(); err != nil {
		t.Fatal(err)
	}
	for i := range tr.Chunks {
		if err := tr.CheckChunk(&tr.Chunks[i]); err != nil {
			t.Fatal(err)
		}
	}
	err = tr.Walk(func(path string, ino *index.Inode) error {
		end := int64(0)
		for _, x := range ino.Extents {
			if x.Off < end || x.Off%alignment != 0 {
				return fmt.Errorf("%s: content at %d, that before ends at %d", path, x.Off, end)
			}
			end = x.Off + int64(tr.Chunks[x.Chunk].Size)
		}
		if end > ino.Size || ino.Size < 0 {
			return fmt.Errorf("%s: content up to %d of %d", path, end, ino.Size)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return tr, info
}

// FuzzDecode takes its input for an index, and for what the frames of one with
// some chunks decode to.
func FuzzDecode(f *testing.F) {
	for _, tr := range []*index.Tree{small(), index.NewTree(), blocks()} {
		e := &encoder{t: tr}
		if err := e.encode(Info{Manifest: digest(1)}); err != nil {
			f.Fatal(err)
		}
		f.Add(slices.Concat(e.content()...), byte(len(e.chunks)))
		f.Add(seal(1, e.sums(), e.content()...), byte(0))
	}
	f.Fuzz(func(t *testing.T, p []byte, chunks byte) {
		survive(t, p)
		survive(t, quick(make([]byte, int(chunks)*sumSize), p))
	})
}
