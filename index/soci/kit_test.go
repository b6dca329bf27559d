package soci

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"io"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/layer"
	"github.com/shale-image/shale/index/stream"
)

// golden has the objects of an image and of its SOCI indexes by their digests, as
// the real tools have made them: testdata/README.md.
var golden = sync.OnceValue(func() map[string][]byte {
	f, err := os.Open("testdata/soci.tar.gz")
	if err != nil {
		panic(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		panic(err)
	}
	objects := map[string][]byte{}
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if err == io.EOF {
			return objects
		}
		p, err2 := io.ReadAll(r)
		if err != nil || err2 != nil {
			panic(err)
		}
		if hex, ok := strings.CutPrefix(h.Name, "blobs/sha256/"); ok {
			objects["sha256:"+hex] = p
		}
	}
})

// ztoc is one of the golden ones, and its layer.
type ztoc struct {
	Subject
	kind          string // media type of the layer
	stored, layer []byte
}

// ztocs are those of the index of a version, in the order of their layers.
func ztocs(t testing.TB, version string) (all []ztoc) {
	t.Helper()
	for _, p := range golden() {
		var m struct {
			Config struct{ MediaType string }
			Layers []struct {
				Digest      string
				Annotations map[string]string
			}
		}
		if json.Unmarshal(p, &m) != nil || m.Config.MediaType != "application/vnd.amazon.soci.index."+version+"+json" {
			continue
		}
		for _, l := range m.Layers {
			z := ztoc{kind: l.Annotations["com.amazon.soci.image-layer-mediaType"], stored: golden()[l.Digest]}
			z.Layer, z.Ztoc = l.Annotations["com.amazon.soci.image-layer-digest"], l.Digest
			z.layer = golden()[z.Layer]
			z.Size = int64(len(z.layer))
			all = append(all, z)
		}
	}
	if len(all) == 0 {
		t.Fatal("no ztocs of " + version)
	}
	return all
}

// compare fails the test unless l is what its layer has: every name, every
// attribute, and every byte.
func compare(t testing.TB, z *ztoc, l *Layer) {
	t.Helper()
	got := index.NewTree()
	if err := got.Apply(l.Changes); err != nil {
		t.Error(err)
		return
	}
	got.Chunks = l.Chunks
	got.Blobs = []index.Blob{{Digest: z.Layer, Size: z.Size, Spans: l.Spans}}
	if err := got.CheckSpans(); err != nil {
		t.Error(err)
		return
	}
	d, _, err := layer.Decompress(bytes.NewReader(z.layer), index.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	want := index.NewTree()
	a := want.Begin()
	data := map[string][]byte{}
	for r := layer.NewReader(d, "layer", index.Limits{}); ; {
		e, err := r.Next()
		if err == io.EOF {
			break
		}
		var p []byte
		if err == nil {
			p, err = io.ReadAll(r)
		}
		if err == nil {
			err = a.Apply(e.Change)
		}
		if err != nil {
			t.Fatal(err)
		}
		if e.Inode != nil && e.Inode.IsRegular() {
			data[e.Path] = p
		}
	}
	want.Chunks = got.Chunks
	for path, p := range data {
		ino, err := got.Lookup(path)
		if err != nil {
			t.Error(err)
			continue
		}
		other, _ := want.Lookup(path)
		other.Extents = ino.Extents
		content := make([]byte, ino.Size)
		for _, e := range ino.Extents {
			c := &got.Chunks[e.Chunk]
			err := got.CheckChunk(c)
			if err == nil {
				var b []byte
				b, err = z.content(l, c)
				copy(content[e.Off:], b)
			}
			if err != nil {
				t.Errorf("/%s at %d: %v", path, e.Off, err)
			}
		}
		if !bytes.Equal(content, p) {
			t.Errorf("/%s: other content", path)
		}
	}
	if err := index.Equal(want, got); err != nil {
		t.Error(err)
	}
}

// content decodes a chunk by what the ztoc says.
func (z *ztoc) content(l *Layer, c *index.Chunk) ([]byte, error) {
	b := index.Blob{Spans: l.Spans}
	spans := b.Cover(c.Offset, c.End())
	off, n := index.Stored(spans, c.Offset, c.End())
	var window []byte
	if w := spans[0].Window; w.Length > 0 {
		window = z.stored[w.Offset:][:w.Length]
	}
	r, err := stream.NewReader(bytes.NewReader(z.layer[off:off+n]), spans, c.Offset, c.End(), window)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	p, err := r.Next(int(c.Size))
	if err == nil {
		err = r.Verify(chunk.Digest{Algorithm: chunk.Origin}, p)
	}
	return bytes.Clone(p), err
}
