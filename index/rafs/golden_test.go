package rafs

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/stream"
)

var update = flag.Bool("update", false, "rewrite the golden listings in testdata")

// golden reads a file that nydus-image v2.4.4 made (docs/formats/rafs-v6.md
// tells how), kept compressed in testdata.
func golden(t testing.TB, name string) []byte {
	t.Helper()
	f, err := os.Open(filepath.Join("testdata", name+".gz"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	p, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// read reads a file of testdata.
func read(t testing.TB, name string) []byte {
	t.Helper()
	p, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// fixture reads a file of Nydus' own test data, made by nydus-image v2.2.
func fixture(t testing.TB, name string) []byte {
	t.Helper()
	dir := os.Getenv("SHALE_FIXTURES")
	if dir == "" {
		dir = "../../../shared/fixtures"
	}
	p, err := os.ReadFile(filepath.Join(dir, "nydus", name))
	if err != nil {
		t.Skipf("no fixtures (set SHALE_FIXTURES to the directory that has nydus/%s): %v", name, err)
	}
	return p
}

const fixtureBlob = "be7d77eeb719f70884758d1aa800ed0fb09d701aaec469964e9d54325f0d5fef"

// metas has the chunk info of the one blob there is.
func metas(meta []byte) Metas {
	if meta == nil {
		return nil
	}
	return func(int, *BlobInfo) (io.ReaderAt, int64, string, error) {
		return bytes.NewReader(meta), int64(len(meta)), "meta", nil
	}
}

// open opens a bootstrap and, if need be, the chunk info of its blob.
func open(t testing.TB, p []byte, meta ...[]byte) *Image {
	t.Helper()
	im, err := Open(bytes.NewReader(p), int64(len(p)), "boot", metas(append(meta, nil)[0]))
	if err != nil {
		t.Fatal(err)
	}
	return im
}

func tree(t testing.TB, p []byte, meta ...[]byte) *index.Tree {
	t.Helper()
	tr, err := open(t, p, meta...).Tree(index.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	return tr
}

// span returns the span that a chunk is in.
func span(t *index.Tree, c index.Chunk) index.Span {
	b := &t.Blobs[c.Blob]
	return b.Spans[b.Find(c.Offset)]
}

// decode returns the content of a chunk, from its blob.
func decode(t *index.Tree, c index.Chunk, blob []byte) ([]byte, error) {
	spans := t.Blobs[c.Blob].Cover(c.Offset, c.End())
	off, n := index.Stored(spans, c.Offset, c.End())
	if off < 0 || off > int64(len(blob)) || n > int64(len(blob))-off {
		return nil, fmt.Errorf("%w: %d bytes at %d of %d", index.ErrCorrupt, n, off, len(blob))
	}
	w, err := stream.Beside(context.Background(), nil, t, spans)
	if err != nil {
		return nil, err
	}
	r, err := stream.NewReader(bytes.NewReader(blob[off:][:n]), spans, c.Offset, c.End(), w)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	p, err := r.Next(int(c.Size))
	return bytes.Clone(p), err
}

// list prints everything a tree says.
func list(t *index.Tree) string {
	var b strings.Builder
	first := map[*index.Inode]string{}
	t.Walk(func(path string, i *index.Inode) error {
		if old, ok := first[i]; ok {
			fmt.Fprintf(&b, "/%s = /%s\n", path, old)
			return nil
		}
		first[i] = path
		fmt.Fprintf(&b, "/%s %o %d:%d %d.%09d size %d rdev %#x", path, i.Mode, i.UID, i.GID, i.Mtime.Sec, i.Mtime.Nsec, i.Size, i.Rdev)
		if i.Target != "" {
			fmt.Fprintf(&b, " -> %q", i.Target)
		}
		for _, x := range i.Xattrs {
			fmt.Fprintf(&b, " %s=%q", x.Name, x.Value)
		}
		b.WriteByte('\n')
		for _, e := range i.Extents {
			c := t.Chunks[e.Chunk]
			s := span(t, c)
			fmt.Fprintf(&b, "\t%d+%d %v in %d: %d+%d %v", e.Off, c.Size, c.Digest, c.Blob, s.Offset, s.Length, s.Codec)
			if s.Size > int64(c.Size) {
				fmt.Fprintf(&b, ", %d of %d", c.Offset-s.Start, s.Size)
			}
			b.WriteByte('\n')
		}
		return nil
	})
	for i, s := range t.Blobs {
		fmt.Fprintf(&b, "blob %d %s %d\n", i, s.Digest, s.Size)
	}
	return b.String()
}

func describe(im *Image) string {
	var b strings.Builder
	fmt.Fprintf(&b, "flags %#x chunk size %d, %v, %v, prefetch %d\n", uint64(im.Flags()), im.ChunkSize(), im.Compressor(), im.Digester(), im.Prefetch())
	for _, s := range im.Blobs() {
		s.Chunks, s.spans, s.windows = nil, nil, nil
		fmt.Fprintf(&b, "%+v\n", s)
	}
	return b.String()
}

func compareGolden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs:\n%s", name, got)
	}
}

// sources are the golden images: bootstrap, blob and, if the bootstrap does not tell
// all, what has the chunk info.
func sources(t testing.TB) map[string][3][]byte {
	m := map[string][3][]byte{}
	for _, n := range []string{"zstd", "lz4", "none"} {
		m[n] = [3][]byte{golden(t, n+".boot"), golden(t, n+".blob")}
	}
	for _, n := range []string{"batch", "batchlz4"} {
		blob := golden(t, n+".blob")
		m[n] = [3][]byte{golden(t, n+".boot"), blob, blob}
	}
	m["zran"] = [3][]byte{golden(t, "zran.boot"), read(t, "zran.tar.gz"), golden(t, "zran.meta")}
	m["tarref"] = [3][]byte{golden(t, "tarref.boot"), golden(t, "tarref.tar"), golden(t, "tarref.meta")}
	blob := golden(t, "inline.blob")
	toc, err := ReadTOC(bytes.NewReader(blob), int64(len(blob)), "inline")
	if err != nil {
		t.Fatal(err)
	}
	boot, err := toc.Extract("image.boot")
	if err != nil {
		t.Fatal(err)
	}
	m["inline"] = [3][]byte{boot, blob, nil}
	return m
}

func TestGoldenTrees(t *testing.T) {
	for name, s := range sources(t) {
		t.Run(name, func(t *testing.T) {
			im := open(t, s[0], s[2])
			tr, err := im.Tree(index.Limits{})
			if err != nil {
				t.Fatal(err)
			}
			compareGolden(t, name+".txt", describe(im)+list(tr))
		})
	}
}

func TestFixtureTree(t *testing.T) {
	im := open(t, fixture(t, "rafs-v6-2.2.boot"))
	tr, err := im.Tree(index.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	compareGolden(t, "fixture-2.2.txt", describe(im)+list(tr))
	blob := fixture(t, fixtureBlob)
	checkBlob(t, im, tr, blob, blob)
}

func TestGoldenChunks(t *testing.T) {
	for name, s := range sources(t) {
		t.Run(name, func(t *testing.T) {
			meta := s[2]
			if meta == nil {
				meta = s[1]
			}
			checkBlob(t, open(t, s[0], s[2]), tree(t, s[0], s[2]), s[1], meta)
		})
	}
}

// checkBlob decodes and verifies every chunk, and compares the chunk table with
// what the blob says itself, or the one that has its chunk info.
func checkBlob(t *testing.T, im *Image, tr *index.Tree, blob, says []byte) {
	t.Helper()
	for i, c := range tr.Chunks {
		p, err := decode(tr, c, blob)
		if err != nil {
			t.Fatalf("chunk %d: %v", i, err)
		}
		if err := c.Digest.Verify(p); err != nil {
			t.Errorf("chunk %d: %v", i, err)
		}
	}
	b := im.Blobs()[0]
	meta, err := ReadBlobMeta(bytes.NewReader(says), int64(len(says)), "blob", &b)
	if err != nil {
		t.Fatal(err)
	}
	if len(meta.Chunks) != len(b.Chunks) {
		t.Fatalf("%d chunks in the blob, %d in the image", len(meta.Chunks), len(b.Chunks))
	}
	for i := range meta.Chunks {
		if !meta.Chunks[i].Same(&b.Chunks[i]) {
			t.Errorf("chunk info %+v, chunk table %+v", meta.Chunks[i], b.Chunks[i])
		}
	}
	if b.Features&FeatureTOC == 0 {
		return
	}
	toc, err := ReadTOC(bytes.NewReader(says), int64(len(says)), "blob")
	if err != nil {
		t.Fatal(err)
	}
	if b.TOCSize != 0 && (toc.Digest != b.TOCDigest || toc.Size != b.TOCSize) {
		t.Errorf("table of contents %d %x, blob table %d %x", toc.Size, toc.Digest, b.TOCSize, b.TOCDigest)
	}
	digests, err := toc.Extract("blob.digest")
	if err != nil {
		t.Fatal(err)
	}
	_, offsets := b.Spans()
	for i, c := range b.Chunks {
		for _, x := range tr.Chunks {
			if x.Offset == offsets[i] && !bytes.Equal(x.Digest.Sum[:], digests[32*c.Index:][:32]) {
				t.Errorf("chunk %d: digest %v, the blob says %x", i, x.Digest, digests[32*c.Index:][:32])
			}
		}
	}
}

// TestTablesAgain encodes what was decoded and expects the same bytes.
func TestTablesAgain(t *testing.T) {
	for name, s := range sources(t) {
		t.Run(name, func(t *testing.T) {
			im := open(t, s[0], s[2])
			if !im.blobs[0].Referable() {
				t.Skip("we write no such image")
			}
			if got := im.ext.encode(); !bytes.Equal(got, s[0][extOffset:extOffset+extSize]) {
				t.Errorf("extended super block:\n%x\n%x", got, s[0][extOffset:extOffset+extSize])
			}
			got, err := encodeBlob(nil, 0, &im.blobs[0])
			if err != nil {
				t.Fatal(err)
			}
			if want := s[0][im.ext.blobOff:][:blobEntrySize]; !bytes.Equal(got, want) {
				t.Errorf("blob table:\n%x\n%x", got, want)
			}
			b := &im.blobs[0]
			if got, want := encodeHeader(b), s[1][b.InfoOffset+b.InfoLength:][:headerSize]; !bytes.Equal(got, want) {
				t.Errorf("meta header:\n%x\n%x", got[:64], want[:64])
			}
		})
	}
}

// TestBlobAgain writes nydus-image's blob again, byte by byte, where no
// compressor of chunk info comes between.
func TestBlobAgain(t *testing.T) {
	writeAgain := func(t *testing.T, boot, blob []byte) []byte {
		im, tr := open(t, boot), tree(t, boot)
		var out bytes.Buffer
		w := NewBlobWriter(&out, BlobOptions{im.ChunkSize(), im.blobs[0].Compressor, im.Digester()})
		_, offsets := im.blobs[0].Spans()
		for i, r := range im.blobs[0].Chunks {
			for _, c := range tr.Chunks {
				if c.Offset == offsets[i] {
					got, err := w.Add(c.Size, c.Digest, span(tr, c).Codec, blob[r.Offset:][:r.Length])
					if err != nil {
						t.Fatal(err)
					}
					if got != r {
						t.Fatalf("chunk %+v, want %+v", got, r)
					}
				}
			}
		}
		info, err := w.Close()
		if err != nil {
			t.Fatal(err)
		}
		if info.Size != int64(out.Len()) {
			t.Errorf("size %d, %d bytes were written", info.Size, out.Len())
		}
		return out.Bytes()
	}
	t.Run("v2.4", func(t *testing.T) {
		blob := golden(t, "none.blob")
		if got := writeAgain(t, golden(t, "none.boot"), blob); !bytes.Equal(got, blob) {
			t.Errorf("blob differs: %d bytes, want %d", len(got), len(blob))
		}
	})
	t.Run("v2.2", func(t *testing.T) {
		blob := fixture(t, fixtureBlob)
		got := writeAgain(t, fixture(t, "rafs-v6-2.2.boot"), blob)
		// nydus-image v2.2 left the unused ends of entries as they were in
		// memory, and gave image.blob its size as offset.
		for i := range 4 {
			at := len(blob) - tarSize - (4-i)*entrySize
			copy(blob[at+80:], make([]byte, 48))
			if i == 0 {
				copy(blob[at+56:], make([]byte, 8))
			}
		}
		if !bytes.Equal(got, blob) {
			t.Error("blob differs")
		}
	})
}

func TestRefused(t *testing.T) {
	for name, want := range map[string]string{
		"batch": "not at hand", "enc": "encryption", "zran": "not at hand", "tarfs": "512 bytes",
	} {
		p := golden(t, name+".boot")
		_, err := Open(bytes.NewReader(p), int64(len(p)), name, nil)
		if !errors.Is(err, index.ErrUnsupported) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want it to say %q", name, err, want)
		}
	}
}
