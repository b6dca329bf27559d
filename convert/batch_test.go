package convert

import (
	"bytes"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/rafs"
)

// smallLayers are layers with many small files, most of which are in several of
// them, in another order; with larger ones in front of and between them, so that
// layers that are read at the same time meet chunks in any order.
func smallLayers(t testing.TB) []testLayer {
	var layers []testLayer
	for i := range 4 {
		files := []file{{name: fmt.Sprintf("large-%d", i), data: text(1000+i%2, 150000*(3-i)+5)}}
		for k := range 60 {
			n := (k*(7+i) + i) % 60 // another order
			files = append(files, file{name: fmt.Sprintf("%d/%02d", i, k), data: text(n, 1+n*n*3)})
			if k%20 == 7 {
				files = append(files, file{name: fmt.Sprintf("%d/%02d-large", i, k), data: text(2000+k, chunk.Size+k)})
			}
		}
		files = append(files, file{name: fmt.Sprintf("%d/again", i), data: text(3, 64)}, file{name: fmt.Sprintf("%d/zeros", i), data: strings.Repeat("\x00", 9000)},
			file{name: fmt.Sprintf("%d/noise", i), data: string(noise(i%3, 50000))}, file{name: fmt.Sprintf("%d/empty", i)})
		layers = append(layers, gz(archive(t, files...)))
	}
	return layers
}

// noise does not compress.
func noise(seed, n int) []byte {
	p := make([]byte, n)
	x := uint64(seed)*0x9e3779b97f4a7c15 + 1
	for i := range p {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		p[i] = byte(x >> 32)
	}
	return p
}

// TestBatches converts with batches of all sizes: the bytes depend on no order,
// the tree not even on the batches, and batches keep their limits.
func TestBatches(t *testing.T) {
	src := makeImage(t, smallLayers(t)...)
	alone := target(t)
	mustConvert(t, src, alone, Options{BatchSize: 1})
	want := tree(t, alone)
	if n := batches(t, want, 0); n != 0 {
		t.Errorf("%d batches of single files", n)
	}
	for _, o := range []Options{
		{}, {BatchSize: 5000}, {BatchSize: 1 << 30}, {Compress: true, Compressor: chunk.LZ4}, {Compress: true, Compressor: chunk.None}, {ChunkSize: 16 << 10},
	} {
		t.Run(fmt.Sprintf("%d-%d-%v", o.BatchSize, o.ChunkSize, o.Compressor), func(t *testing.T) {
			digest := ""
			for _, workers := range []int{1, 5, 5} {
				dst := target(t)
				o.Workers = workers
				res := mustConvert(t, src, dst, o)
				if digest == "" {
					digest = res.ManifestDigest
					got := tree(t, dst)
					if o.ChunkSize == 0 {
						if err := index.Equal(want, got); err != nil {
							t.Error(err)
						}
					}
					most := int64(o.BatchSize)
					if most == 0 {
						most = DefaultBatchSize
					}
					n := batches(t, got, most)
					if none := o.Compress && o.Compressor == chunk.None; none != (n == 0) {
						t.Errorf("%d batches", n)
					}
					if os.Geteuid() == 0 {
						same(t, exported(t, alone), exported(t, dst))
					}
				}
				if res.ManifestDigest != digest {
					t.Errorf("%d workers: %s, want %s", workers, res.ManifestDigest, digest)
				}
			}
		})
	}
}

// batches counts the spans with several chunks, and fails the test if one is too
// large, or a file has chunks in one and elsewhere.
func batches(t testing.TB, tr *index.Tree, most int64) (n int) {
	t.Helper()
	if err := tr.CheckSpans(); err != nil {
		t.Fatal(err)
	}
	type at struct {
		blob uint32
		span int
	}
	chunks := map[at]int{}
	digests := map[chunk.Digest]bool{}
	find := func(c *index.Chunk) at { return at{c.Blob, tr.Blobs[c.Blob].Find(c.Offset)} }
	for i := range tr.Chunks {
		c := &tr.Chunks[i]
		if err := tr.CheckChunk(c); err != nil {
			t.Error(err)
		}
		chunks[find(c)]++
		if digests[c.Digest] {
			t.Errorf("chunk %v is stored twice", c.Digest)
		}
		digests[c.Digest] = true
	}
	for a, k := range chunks {
		if k < 2 {
			continue
		}
		n++
		if s := tr.Blobs[a.blob].Spans[a.span]; s.Size > most || s.Codec == chunk.None {
			t.Errorf("batch of %d chunks: %+v, more than %d bytes or not compressed", k, s, most)
		}
	}
	tr.Walk(func(path string, ino *index.Inode) error {
		for _, e := range ino.Extents {
			if len(ino.Extents) > 1 && chunks[find(&tr.Chunks[e.Chunk])] > 1 {
				t.Errorf("%s has %d chunks and one of them is in a batch", path, len(ino.Extents))
			}
		}
		return nil
	})
	return n
}

// TestStrip takes any of the chunks of a batch out of it.
func TestStrip(t *testing.T) {
	for _, codec := range []chunk.Codec{chunk.None, chunk.Zstd, chunk.LZ4} {
		for known := range 16 {
			f, err := os.Create(t.TempDir() + "/spool")
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			c := &converter{o: Options{Compressor: codec}}
			m := &blobMaker{c: c, known: map[chunk.Digest]uint32{}}
			sp := &spool{file: f}
			b := batch{off: 0}
			var raw, want []byte
			var left []uint32
			for i := range uint32(4) {
				p := []byte(text(int(i), 1000+500*int(i)))
				d := chunk.Sum(chunk.BLAKE3, p)
				sp.chunks = append(sp.chunks, rafs.Piece{Size: uint32(len(p)), Digest: d})
				b.chunks, raw = append(b.chunks, i), append(raw, p...)
				if known&(1<<i) != 0 {
					m.known[d] = 99
				} else {
					want, left = append(want, p...), append(left, i)
				}
			}
			codec, stored, _ := c.encode(nil, bytes.Clone(raw))
			b.codec, b.size, b.length = codec, len(raw), len(stored)
			if _, err := f.Write(stored); err != nil {
				t.Fatal(err)
			}
			sp.size = int64(len(stored))
			before := bytes.Clone(stored)
			got, err := m.strip(sp, &b, stored)
			if err != nil || !slices.Equal(b.chunks, left) && len(left) > 0 || len(b.chunks) != len(left) {
				t.Fatalf("%v, %04b known: chunks %v, %v; want %v", codec, known, b.chunks, err, left)
			}
			if len(left) == 0 {
				continue
			}
			if known == 0 != (b.off == 0 && bytes.Equal(got, before)) {
				t.Errorf("%v, %04b known: now at %d", codec, known, b.off)
			}
			back := make([]byte, b.size)
			if err := b.codec.Decode(back, got); err != nil || !bytes.Equal(back, want) || len(got) != b.length {
				t.Errorf("%v, %04b known: other content, %v", codec, known, err)
			}
			// A second time nothing is known to be known.
			inFile := make([]byte, b.length)
			if _, err := f.ReadAt(inFile, b.off); err != nil || !bytes.Equal(inFile, got) || b.off+int64(b.length) != sp.size {
				t.Errorf("%v, %04b known: not what the spool has at %d of %d: %v", codec, known, b.off, sp.size, err)
			}
			// As if the others had never been there.
			if c2, s2, _ := c.encode(nil, want); c2 != b.codec || !bytes.Equal(s2, got) {
				t.Errorf("%v, %04b known: stored otherwise", codec, known)
			}
		}
	}
	// What is damaged is an error.
	f, err := os.Create(t.TempDir() + "/spool")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p := rafs.Piece{Size: 10, Digest: chunk.Sum(chunk.BLAKE3, nil)}
	m := &blobMaker{c: &converter{o: Options{Compressor: chunk.Zstd}}, known: map[chunk.Digest]uint32{p.Digest: 1}}
	if _, err := m.strip(&spool{file: f, chunks: []rafs.Piece{p}}, &batch{chunks: []uint32{0}, size: 10, codec: chunk.Zstd}, []byte("garbage")); err == nil {
		t.Error("garbage is a batch")
	}
}

// TestDictBatches refers to some chunks of batches of another image.
func TestDictBatches(t *testing.T) {
	base := target(t)
	src := makeImage(t, smallLayers(t)...)
	mustConvert(t, src, base, Options{})
	dict, err := OpenDict(t.Context(), base, amd64)
	if err != nil {
		t.Fatal(err)
	}
	var one, two []file
	for i := range 40 {
		one = append(one, file{name: fmt.Sprintf("old%d", i), data: text(i*3%60, 1+(i*3%60)*(i*3%60)*3)}, file{name: fmt.Sprintf("new%d", i), data: text(5000+i, 900*i)})
		two = append(two, file{name: fmt.Sprintf("two%d", i), data: text(5000+i/2, 900*(i/2))})
	}
	other := makeImage(t, gz(archive(t, one...)), gz(archive(t, two...)))
	plain := target(t)
	mustConvert(t, other, plain, Options{})
	digest := ""
	for _, workers := range []int{1, 5, 5} {
		dst := target(t)
		res := mustConvert(t, other, dst, Options{Dict: dict, Workers: workers})
		if digest == "" {
			digest = res.ManifestDigest
			tr := tree(t, dst)
			if err := index.Equal(tree(t, plain), tr); err != nil {
				t.Error(err)
			}
			if batches(t, tr, DefaultBatchSize) == 0 || res.DictChunks == 0 || res.DictChunks >= res.Chunks {
				t.Errorf("%+v", res)
			}
			// All of the dictionary's batches are told, so that theirs are the sizes.
			from := tree(t, base)
			for _, b := range tr.Blobs {
				for _, d := range from.Blobs {
					for _, s := range b.Spans {
						if d.Digest == b.Digest && !slices.ContainsFunc(d.Spans, func(x index.Span) bool {
							return x.Offset == s.Offset && x.Length == s.Length && x.Size == s.Size && x.Codec == s.Codec
						}) {
							t.Errorf("span %+v is not the dictionary's", s)
						}
					}
				}
			}
			if os.Geteuid() == 0 {
				same(t, exported(t, plain), exported(t, dst))
			}
		}
		if res.ManifestDigest != digest {
			t.Errorf("%d workers: %s, want %s", workers, res.ManifestDigest, digest)
		}
	}
	// A dictionary of a dictionary.
	second := target(t)
	mustConvert(t, other, second, Options{Dict: dict})
	again, err := OpenDict(t.Context(), second, amd64)
	if err != nil {
		t.Fatal(err)
	}
	last := target(t)
	mustConvert(t, src, last, Options{Dict: again})
	if err := index.Equal(tree(t, base), tree(t, last)); err != nil {
		t.Error(err)
	}
}

// TestBatchDamage flips a byte in a batch before it is pushed.
func TestBatchDamage(t *testing.T) {
	for _, at := range []int64{0, 20, 5000} {
		fails(t, makeImage(t, smallLayers(t)...), Options{damage: func(b *layerBlob) { flip(t, b, at) }}, chunk.ErrCorrupt, "does not read back")
	}
}
