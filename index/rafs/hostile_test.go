package rafs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"reflect"
	"strings"
	"testing"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// stored is a chunk and where it is stored, whatever else the blob has.
type stored struct {
	index.Chunk // Offset in the span
	span        index.Span
}

// readAll reads an image as a suspicious client does: every file by its
// chunks, and every chunk verified. cache has chunks verified before.
func readAll(boot, blob, meta []byte, cache map[stored][]byte) (map[string]string, error) {
	im, err := Open(bytes.NewReader(boot), int64(len(boot)), "boot", metas(meta))
	if err != nil {
		return nil, err
	}
	tr, err := im.Tree(index.Limits{})
	if err != nil {
		return nil, err
	}
	files := map[string]string{}
	err = tr.Walk(func(path string, ino *index.Inode) error {
		if !ino.IsRegular() {
			return nil
		}
		p := make([]byte, min(ino.Size, 2<<20))
		for _, e := range ino.Extents {
			c := tr.Chunks[e.Chunk]
			if e.Off+int64(c.Size) > int64(len(p)) {
				return fmt.Errorf("%w: %s: chunk out of range", index.ErrCorrupt, path)
			}
			at := stored{c, span(tr, c)}
			at.span.Start, at.Offset = 0, at.Offset-at.span.Start
			part, ok := cache[at]
			if !ok {
				if part, err = decode(tr, c, blob); err != nil {
					return err
				}
				if err := c.Digest.Verify(part); err != nil {
					return err
				}
				cache[at] = part
			}
			copy(p[e.Off:], part)
		}
		files[path] = string(p)
		return nil
	})
	return files, err
}

// typed fails unless err says what kind of error it is.
func typed(t *testing.T, what string, err error) {
	t.Helper()
	for _, k := range []error{index.ErrCorrupt, index.ErrUnsupported, index.ErrLimit} {
		if errors.Is(err, k) {
			return
		}
	}
	t.Errorf("%s: untyped error: %v", what, err)
}

func flips(p []byte, from, to int, f func(what string, p []byte)) {
	for at := from; at < to; at++ {
		x := []byte{0x01, 0x80, 0xff}[at%3]
		q := bytes.Clone(p)
		q[at] ^= x
		f(fmt.Sprintf("byte %d ^ %#x", at, x), q)
	}
}

// allSources are the golden images and ours with batches.
func allSources(t testing.TB) map[string][3][]byte {
	m := sources(t)
	maps.Copy(m, batchSources(t))
	return m
}

func TestFlippedBootstrap(t *testing.T) {
	for name, s := range allSources(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			im := open(t, s[0], s[2])
			cache := map[stored][]byte{}
			want, err := readAll(s[0], s[1], s[2], cache)
			if err != nil {
				t.Fatal(err)
			}
			sameOrError := func(what string, p []byte) {
				got, err := readAll(p, s[1], s[2], cache)
				if err != nil {
					typed(t, what, err)
				} else if !reflect.DeepEqual(got, want) {
					t.Errorf("%s: other content", what)
				}
			}
			e := im.ext
			flips(s[0], extOffset, deviceOffset+deviceSize, sameOrError)
			flips(s[0], int(e.blobOff), int(e.blobOff)+blobEntrySize, sameOrError)
			for at := int(e.chunkOff); at < int(e.chunkOff+e.chunkTabSize); at += chunkEntrySize {
				flips(s[0], at+28, at+chunkEntrySize, sameOrError) // with the end of the digest
			}
			// What follows changes names, types and sizes, which no digest
			// in the image covers; it must not panic.
			flips(s[0], superOffset, extOffset, func(what string, p []byte) { readAll(p, s[1], s[2], cache) })
			flips(s[0], 8192, 8192+1500, func(what string, p []byte) { readAll(p, s[1], s[2], cache) })
			for n := 0; n < len(s[0]); n += 512 {
				sameOrError(fmt.Sprintf("cut at %d", n), s[0][:n])
			}
		})
	}
}

// readBlob reads everything of a blob but its data.
func readBlob(p []byte, b *BlobInfo) (map[string]string, error) {
	parts := map[string]string{}
	toc, err := ReadTOC(bytes.NewReader(p), int64(len(p)), "blob")
	if err != nil {
		return nil, err
	}
	for _, e := range toc.Entries {
		if e.Name == tocBlob {
			continue
		}
		q, err := toc.Extract(e.Name)
		if err != nil {
			return nil, err
		}
		parts[e.Name] = string(q)
	}
	meta, err := ReadBlobMeta(bytes.NewReader(p), int64(len(p)), "blob", b)
	if err != nil {
		return nil, err
	}
	parts["chunks"] = fmt.Sprint(meta.Chunks)
	return parts, nil
}

func TestFlippedBlob(t *testing.T) {
	for name, s := range allSources(t) {
		if open(t, s[0], s[2]).Blobs()[0].Features&FeatureTOC == 0 {
			continue // it has no table of contents
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := open(t, s[0], s[2]).Blobs()[0]
			if s[2] != nil {
				s[1] = s[2]
			}
			want, err := readBlob(s[1], &b)
			if err != nil {
				t.Fatal(err)
			}
			sameOrError := func(what string, p []byte) {
				got, err := readBlob(p, &b)
				if err != nil {
					typed(t, what, err)
				} else if !reflect.DeepEqual(got, want) {
					t.Errorf("%s: other content", what)
				}
			}
			end := len(s[1])
			if b.TOCSize == 0 {
				// A bootstrap in the blob cannot know the digest of the
				// table of contents; its names are not covered.
				toc, _ := ReadTOC(bytes.NewReader(s[1]), int64(end), "blob")
				flips(s[1], end-int(toc.Size), end, func(what string, p []byte) { readBlob(p, &b) })
				end -= int(toc.Size)
			}
			header := int(b.InfoOffset + b.InfoLength)
			flips(s[1], int(b.InfoOffset), header+64, sameOrError)
			flips(s[1], header+headerSize-4, end, sameOrError)
			for n := 0; n < len(s[1]); n += 512 {
				sameOrError(fmt.Sprintf("cut at %d", n), s[1][:n])
			}
		})
	}
}

// patched returns boot with a field set, by its offset in the file.
func patched(boot []byte, at int, v uint64, n int) []byte {
	p := bytes.Clone(boot)
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], v)
	copy(p[at:at+n], b[:])
	return p
}

func TestRefusesByName(t *testing.T) {
	boot := golden(t, "zstd.boot")
	e := open(t, boot).ext
	blob, chunks := int(e.blobOff), int(e.chunkOff)
	for _, c := range []struct {
		at   int
		v    uint64
		n    int
		kind error
		text string
	}{
		{superOffset, 1, 4, index.ErrCorrupt, "magic"},
		{superOffset + superCompat, 0, 4, index.ErrUnsupported, "not RAFS"},
		{superOffset + superBlockBits, 13, 1, index.ErrUnsupported, "2^13"},
		{superOffset + superIncompat, 0xd, 4, index.ErrUnsupported, "feature_incompat"},
		{superOffset + superXattr, 9, 4, index.ErrUnsupported, "shared"},
		{superOffset + superDevices, 300, 2, index.ErrCorrupt, "300 device slots"},
		{extOffset, uint64(e.flags | FlagAES128XTS), 8, index.ErrUnsupported, "encryption"},
		{extOffset, uint64(e.flags | FlagTarfs), 8, index.ErrUnsupported, "tarfs"},
		{extOffset, uint64(e.flags | FlagLZ4), 8, index.ErrCorrupt, "one compressor"},
		{extOffset, uint64(e.flags | FlagSHA256), 8, index.ErrCorrupt, "one digest"},
		{extOffset + 8, 1 << 62, 8, index.ErrCorrupt, "blob table"},
		{extOffset + 20, 5000, 4, index.ErrCorrupt, "chunk size"},
		{extOffset + 24, e.blobOff, 8, index.ErrCorrupt, "table"},
		{extOffset + 32, 0, 8, index.ErrUnsupported, "without a chunk table"},
		{extOffset + 32, ^uint64(0) - 79, 8, index.ErrCorrupt, "chunk table"},
		{blob + 64, 1, 4, index.ErrCorrupt, "index"},
		{blob + 72, 1 << 30, 4, index.ErrCorrupt, "chunks"},
		{blob + 76, algZstd + 1, 4, index.ErrCorrupt, "compressor"},
		{blob + 76, algGzip, 4, index.ErrUnsupported, "gzip of its own"},
		{blob + 84, FeatureAligned | FeatureZran, 4, index.ErrCorrupt, "zran"},
		{blob + 84, FeatureAligned | FeatureZran | FeatureSeparate | FeatureChunkInfoV2 | FeatureBatch, 4, index.ErrCorrupt, "zran"},
		{blob + 84, FeatureAligned | FeatureExternal, 4, index.ErrUnsupported, "external"},
		{blob + 108, algGzip, 4, index.ErrUnsupported, "gzip"},
		{blob + 84, FeatureAligned | FeatureBatch, 4, index.ErrCorrupt, "batches"},
		{blob + 200, 1 << 63, 8, index.ErrCorrupt, "with chunk info"},
		{blob + 84, FeatureAligned | 1<<20, 4, index.ErrUnsupported, "unknown"},
		{blob + 84, FeatureTOC, 4, index.ErrUnsupported, "aligned"},
		{blob + 96, 1 << 50, 8, index.ErrCorrupt, "addresses"},
		{blob + 216, 1, 4, index.ErrUnsupported, "encryption"},
		{chunks + 32, 1, 4, index.ErrCorrupt, "blob 1 of 1"},
		{chunks + 36, 4, 4, index.ErrUnsupported, "flags"},
		{chunks + 40, 1 << 31, 4, index.ErrCorrupt, "stored"},
		{chunks + 44, 0, 4, index.ErrCorrupt, "0 bytes"},
		{chunks + 48, 1 << 63, 8, index.ErrCorrupt, "stored bytes at"},
		{chunks + 56, 4097, 8, index.ErrCorrupt, "address"},
		{chunks + 56, 0, 8, index.ErrCorrupt, "second chunk"},
		{chunks + 72, 1 << 24, 4, index.ErrCorrupt, "chunk 16777216"},
	} {
		p := patched(boot, c.at, c.v, c.n)
		_, err := Open(bytes.NewReader(p), int64(len(p)), "boot", nil)
		var at *index.Error
		if !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.text) || !errors.As(err, &at) || at.Offset < 0 {
			t.Errorf("%d at %d: %v, want %v, %q and an offset", c.v, c.at, err, c.kind, c.text)
		}
	}
}

// TestReadError tells failing storage from bad data.
func TestReadError(t *testing.T) {
	boot := golden(t, "zstd.boot")
	for n := 0; n < 100; n++ {
		im, err := Open(&failing{bytes.NewReader(boot), n}, int64(len(boot)), "boot", nil)
		if err == nil {
			_, err = im.Tree(index.Limits{})
		}
		if err == nil {
			return
		}
		if errors.Is(err, index.ErrCorrupt) || !errors.Is(err, io.ErrClosedPipe) {
			t.Fatalf("failing read %d: %v", n, err)
		}
	}
	t.Error("reads without an end")
}

// failing fails after some reads.
type failing struct {
	r    io.ReaderAt
	left int
}

func (f *failing) ReadAt(p []byte, off int64) (int, error) {
	if f.left--; f.left < 0 {
		return 0, io.ErrClosedPipe
	}
	return f.r.ReadAt(p, off)
}

func TestChunkInfoForms(t *testing.T) {
	for _, c := range []ChunkRef{
		{Size: 1, Length: 1},
		{Size: MaxChunkSize, Length: MaxChunkSize - 1, Offset: 1<<40 - 1, Addr: 1<<44 - 4096, Compressed: true},
		{Size: 0x123457, Length: 0xfedcb, Offset: 0x12_3456_789a, Addr: 0xabc_def1_2000, Compressed: true},
	} {
		if got := decodeInfoV1(appendInfoV1(nil, &c)); got != c {
			t.Errorf("V1: %+v, want %+v", got, c)
		}
		got, batch, flags := decodeInfoV2(appendInfoV2(nil, &c, 7))
		if got != c || batch != 0 || flags&^infoCompressed != 0 {
			t.Errorf("V2: %+v, batch %d, flags %#x, want %+v", got, batch, flags, c)
		}
		c.Batch, c.In, c.Length = true, 0xfedcba, 0 // the stored bytes are the batch's
		if got, batch, flags = decodeInfoV2(appendInfoV2(nil, &c, 0xabcdef)); got != c || batch != 0xabcdef || flags&^infoCompressed != infoBatch {
			t.Errorf("V2: %+v, batch %#x, flags %#x, want %+v", got, batch, flags, c)
		}
	}
	// The first chunk of the v2.2 fixture: 16931 bytes at address 0, stored as
	// 4828 bytes at 0, that is 16930<<44 and 4827<<44.
	c := ChunkRef{Size: 16931, Length: 4828, Compressed: true}
	if got := fmt.Sprintf("%x", appendInfoV1(nil, &c)); got != "00000000002022040000000000b02d01" {
		t.Errorf("V1 is %s", got)
	}
}

// TestBlobMetaV2 reads the 24-byte form, as older data blobs have it.
func TestBlobMetaV2(t *testing.T) {
	b := BlobInfo{Features: FeatureAligned | FeatureChunkInfoV2 | FeatureCapTarTOC, ChunkCount: 2, Span: 12288,
		InfoOffset: 5000, InfoLength: 48, InfoSize: 48, InfoCodec: chunk.None}
	want := []ChunkRef{{Index: 0, Size: 8192, Length: 900, Compressed: true}, {Index: 1, Size: 4096, Length: 4096, Offset: 900, Addr: 8192}}
	p := make([]byte, 5000)
	for _, c := range want {
		p = appendInfoV2(p, &c, 0)
	}
	p = append(p, encodeHeader(&b)...)
	read := func() (*BlobInfo, error) { return ReadBlobMeta(bytes.NewReader(p), int64(len(p)), "blob", &b) }
	got, err := read()
	if err != nil || !reflect.DeepEqual(got.Chunks, want) {
		t.Errorf("%+v, %v; want %+v", got, err, want)
	}
	p[5007] |= infoBatch
	if _, err := read(); !errors.Is(err, index.ErrCorrupt) {
		t.Errorf("chunk of a batch, of which there are none: %v", err)
	}
	p[5007] ^= infoBatch | infoEncrypted
	if _, err := read(); !errors.Is(err, index.ErrUnsupported) {
		t.Errorf("encrypted chunk: %v", err)
	}
	p[5007] &^= infoEncrypted
	p[5007] &^= infoCompressed
	if _, err := read(); !errors.Is(err, index.ErrCorrupt) {
		t.Errorf("chunk of 900 bytes, 8192 stored: %v", err)
	}
}

func TestTarHeader(t *testing.T) {
	for _, size := range []uint64{0, 1, 0o777, 1<<33 - 1, 1 << 33, 1 << 40} {
		name, n, ok := parseTar(tarHeader(tocName, size))
		if name != tocName || n != size || !ok {
			t.Errorf("%s, %d, %v; want %d", name, n, ok, size)
		}
	}
}

func FuzzBootstrap(f *testing.F) {
	for _, s := range allSources(f) {
		f.Add(s[0])
	}
	for _, n := range []string{"batch", "enc", "zran", "tarfs"} {
		f.Add(golden(f, n+".boot"))
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		im, err := Open(bytes.NewReader(p), int64(len(p)), "boot", nil)
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
		WriteBootstrap(io.Discard, tr, im.Blobs(), BlobOptions{im.ChunkSize(), im.Compressor(), im.Digester()})
	})
}

func FuzzTOC(f *testing.F) {
	for _, s := range allSources(f) {
		f.Add(s[1][max(0, len(s[1])-9000):])
	}
	f.Fuzz(func(t *testing.T, p []byte) { readBlob(p, nil) })
}
