package rafs

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/stream"
)

// zranInfo is the chunk info of the golden zran blob, decompressed, with the number
// of its entries, and what the bootstrap says of the blob.
func zranInfo(t testing.TB) (b BlobInfo, p []byte, n int) {
	t.Helper()
	boot, meta := golden(t, "zran.boot"), golden(t, "zran.meta")
	needs, err := Needs(bytes.NewReader(boot), int64(len(boot)), "boot")
	if err != nil || len(needs) != 1 {
		t.Fatalf("needs %v, %v", needs, err)
	}
	b = needs[0]
	if n, err = b.readHeader(bytes.NewReader(meta), int64(len(meta)), "meta", true); err != nil {
		t.Fatal(err)
	}
	p, err = readStored(bytes.NewReader(meta), "meta", int64(b.InfoOffset), b.InfoLength, b.InfoSize, b.InfoCodec)
	if err != nil {
		t.Fatal(err)
	}
	return b, p, n
}

// TestZranPlaces: the golden layer has what makes zran hard.
func TestZranPlaces(t *testing.T) {
	b, p, n := zranInfo(t)
	if err := b.decodeZran(p, n, "meta"); err != nil {
		t.Fatal(err)
	}
	var inside, empty, across int
	for i := range b.spans {
		if b.spans[i].Bits > 0 {
			inside++
		}
		w, err := stream.OpenWindow(b.windows[b.spans[i].Window.Offset:][:b.spans[i].Window.Length])
		if err != nil {
			t.Fatal(err)
		}
		if len(w) == 0 {
			empty++
		}
	}
	of := index.Blob{Spans: b.spans}
	for _, c := range b.Chunks {
		if len(of.Cover(c.Pos, c.Pos+int64(c.Size))) > 1 {
			across++
		}
	}
	if len(b.spans) < 3 || inside == 0 || empty == 0 || across == 0 {
		t.Errorf("%d spans, %d that begin inside of a byte, %d without a window, %d chunks that lie in several", len(b.spans), inside, empty, across)
	}
}

// TestZranStream decodes all that is told of the golden layer, and from the
// beginning of each span.
func TestZranStream(t *testing.T) {
	blob := read(t, "zran.tar.gz")
	z, err := gzip.NewReader(bytes.NewReader(blob))
	if err != nil {
		t.Fatal(err)
	}
	all, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	b, p, n := zranInfo(t)
	if err := b.decodeZran(p, n, "meta"); err != nil {
		t.Fatal(err)
	}
	base := int64(binary.LittleEndian.Uint64(p[int(b.ChunkCount)*infoV2Size+8:]))
	tr := tree(t, golden(t, "zran.boot"), golden(t, "zran.meta"))
	for i, s := range b.spans {
		for _, to := range []int64{s.Start + 1, s.End(), b.spans[len(b.spans)-1].End()} {
			got, err := decode(tr, index.Chunk{Blob: 0, Offset: s.Start, Size: uint32(to - s.Start)}, blob)
			if err != nil || !bytes.Equal(got, all[base+s.Start:base+to]) {
				t.Errorf("span %d, %d bytes: %v", i, to-s.Start, err)
			}
		}
	}
}

// TestBatches: of the same files the golden batches are of the same content as the
// golden chunks.
func TestBatches(t *testing.T) {
	all := sources(t)
	want, err := readAll(all["none"][0], all["none"][1], nil, map[stored][]byte{})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"batch", "batchlz4"} {
		s := all[name]
		got, err := readAll(s[0], s[1], s[2], map[stored][]byte{})
		if err != nil || !maps.Equal(got, want) {
			t.Errorf("%s: %d files, %v", name, len(got), err)
		}
		if tr := tree(t, s[0], s[2]); len(tr.Blobs[0].Spans) < 2 || len(tr.Blobs[0].Spans) >= len(tr.Chunks) {
			t.Errorf("%s: %d chunks in %d spans", name, len(tr.Chunks), len(tr.Blobs[0].Spans))
		}
	}
}

// TestAgainstTar compares the golden trees over archives with what tar makes of
// these.
func TestAgainstTar(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("devices and owners need root")
	}
	for _, name := range []string{"zran", "tarref"} {
		s := sources(t)[name]
		dir := t.TempDir()
		archive := filepath.Join(t.TempDir(), "layer")
		if err := os.WriteFile(archive, s[1], 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command("tar", "--delay-directory-restore", "--xattrs", "--xattrs-include=*", "--numeric-owner", "-xpf", archive, "-C", dir).CombinedOutput(); err != nil {
			t.Fatalf("tar: %v\n%s", err, out)
		}
		tr := tree(t, s[0], s[2])
		st, err := os.Stat(dir)
		if err != nil {
			t.Fatal(err)
		}
		tr.Root.Mode, tr.Root.Mtime = 0o40000|uint32(st.Mode().Perm()), index.Time{Sec: st.ModTime().Unix(), Nsec: uint32(st.ModTime().Nanosecond())} // the archive has none
		compare(t, dir, tr, contents(t, tr, [][]byte{s[1]}))
	}
}

func TestHostileZran(t *testing.T) {
	b, p, n := zranInfo(t)
	le := binary.LittleEndian
	chunkAt := func(k, at int) int { return k*infoV2Size + at }
	entry := func(k, at int) int { return int(b.ChunkCount)*infoV2Size + k*pointSize + at }
	last := n - 1
	for _, c := range []struct {
		what  string
		at, n int
		v     uint64
		kind  error
		text  string
	}{
		{"not zran", chunkAt(0, 7), 1, infoCompressed, index.ErrCorrupt, "flags 0x1"},
		{"batch", chunkAt(0, 7), 1, infoCompressed | infoZran | infoBatch, index.ErrCorrupt, "flags 0x7"},
		{"encrypted", chunkAt(0, 7), 1, infoCompressed | infoZran | infoEncrypted, index.ErrUnsupported, "encryption"},
		{"no such entry", chunkAt(0, 20), 4, uint64(n), index.ErrCorrupt, "from entry"},
		{"far from any entry", chunkAt(0, 20), 4, 1<<32 - 1, index.ErrCorrupt, "from entry"},
		{"behind the stream", chunkAt(int(b.ChunkCount)-1, 16), 4, 1<<32 - 1, index.ErrCorrupt, "bytes at"},
		{"before the chunk before", chunkAt(3, 16), 4, 0, index.ErrCorrupt, "before ends"},
		{"stored behind the blob", chunkAt(0, 8), 5, 1<<40 - 1, index.ErrCorrupt, "stored in"},
		{"address behind the space", chunkAt(0, 0), 4, 1<<32 - 1, index.ErrCorrupt, "address"},
		{"address before", chunkAt(2, 0), 4, 0, index.ErrCorrupt, "before ends"},
		{"entry behind the blob", entry(last, 0), 8, uint64(b.Size) + 1, index.ErrCorrupt, "entry"},
		{"entry far behind", entry(last, 0), 8, 1<<64 - 1, index.ErrCorrupt, "entry"},
		{"entries in no order", entry(1, 0), 8, 0, index.ErrCorrupt, "entry 1"},
		{"entries that decode to less", entry(2, 8), 8, 0, index.ErrCorrupt, "entry 2"},
		{"entry far behind the stream", entry(last, 8), 8, 1 << 63, index.ErrCorrupt, "entry"},
		{"window elsewhere", entry(1, 16), 8, uint64(len(p)), index.ErrCorrupt, "a window of"},
		{"window far away", entry(1, 16), 8, 1<<64 - 1, index.ErrCorrupt, "a window of"},
		{"window too large", entry(1, 32), 4, maxWindow + 1, index.ErrCorrupt, "a window of 32769"},
		{"stored in more", entry(last, 24), 4, 1<<32 - 1, index.ErrCorrupt, "entry"},
		{"of nothing", entry(last, 28), 4, 0, index.ErrCorrupt, "entry"},
		{"of less than its chunks", entry(last, 28), 4, 1, index.ErrCorrupt, "of a stream of"},
		{"more than a byte before", entry(1, 37), 1, 8, index.ErrCorrupt, "8 bits"},
		{"bits before the first byte", entry(0, 37), 1, 8, index.ErrCorrupt, "bits"},
	} {
		q := patched(p, c.at, c.v, c.n)
		x := b
		err := x.decodeZran(q, n, "meta")
		if !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v, want %v, %q", c.what, err, c.kind, c.text)
		}
	}
	// Of two entries where the same comes out one is enough.
	q := bytes.Clone(p)
	copy(q[entry(1, 8):entry(1, 16)], q[entry(0, 8):entry(0, 16)])
	for k := range int(b.ChunkCount) {
		if le.Uint32(q[chunkAt(k, 20):]) != 0 {
			le.PutUint32(q[chunkAt(k, 20):], uint32(last))
			le.PutUint32(q[chunkAt(k, 16):], uint32(k)<<20)
		}
	}
	x := b
	if err := x.decodeZran(q, n, "meta"); err == nil {
		tr := index.Tree{Blobs: []index.Blob{{Size: b.Size, Spans: x.spans}}}
		if err := tr.CheckSpans(); err != nil || len(x.spans) != n-1 {
			t.Errorf("%d spans of %d entries: %v", len(x.spans), n, err)
		}
	}
}

// FuzzZran reads chunk info with entries of zran.
func FuzzZran(f *testing.F) {
	b, p, n := zranInfo(f)
	f.Add(p, uint32(n), b.ChunkCount)
	f.Fuzz(func(t *testing.T, p []byte, n, count uint32) {
		x := b
		x.ChunkCount = count
		if n == 0 || n > count || uint64(count)*infoV2Size+uint64(n)*pointSize > uint64(len(p)) {
			return // readHeader refuses it
		}
		if x.decodeZran(p, int(n), "meta") != nil {
			return
		}
		tr := index.Tree{Blobs: []index.Blob{{Digest: "layer", Size: x.Size, Spans: x.spans}}}
		if err := tr.CheckSpans(); err != nil {
			t.Fatal(err)
		}
		for _, c := range x.Chunks {
			if err := tr.CheckChunk(&index.Chunk{Digest: chunk.Digest{Algorithm: chunk.BLAKE3}, Offset: c.Pos, Size: c.Size}); err != nil {
				t.Fatal(err)
			}
		}
		for _, s := range x.spans {
			if _, err := stream.OpenWindow(x.windows[s.Window.Offset:][:s.Window.Length]); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// FuzzMeta reads images that need the chunk info of their blob.
func FuzzMeta(f *testing.F) {
	for _, s := range sources(f) {
		if s[2] != nil {
			f.Add(s[0], s[2])
		}
	}
	f.Fuzz(func(t *testing.T, boot, meta []byte) {
		im, err := Open(bytes.NewReader(boot), int64(len(boot)), "boot", metas(meta))
		if err != nil {
			return
		}
		tr, err := im.Tree(index.Limits{})
		if err != nil {
			return
		}
		if err := tr.CheckSpans(); err != nil {
			t.Fatal(err)
		}
		for i := range tr.Chunks {
			if err := tr.CheckChunk(&tr.Chunks[i]); err != nil {
				t.Fatal(err)
			}
		}
	})
}
