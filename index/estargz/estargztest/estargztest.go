// Package estargztest makes layers with tables of contents, also such as other
// tools refuse to make, and compares what a table says of a layer with the
// layer: every name, every attribute, and every byte of its files, decoded as a
// reader would from the stored bytes that the table points to.
package estargztest

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/estargz"
	"github.com/shale-image/shale/index/layer"
)

// Compare fails the test unless l is what blob, a whole layer, has.
func Compare(t testing.TB, blob []byte, l *estargz.Layer) {
	t.Helper()
	if tree := Tree(t, blob, l); tree != nil {
		compare(t, blob, tree)
	}
}

// Tree returns the tree that l makes, checked for what readers of an index check,
// or nil.
func Tree(t testing.TB, blob []byte, l *estargz.Layer) *index.Tree {
	t.Helper()
	tree := index.NewTree()
	if err := tree.Apply(l.Changes); err != nil {
		t.Error(err)
		return nil
	}
	tree.Chunks = l.Chunks
	tree.Blobs = []index.Blob{{Digest: chunk.Sum(chunk.SHA256, blob).String(), Size: int64(len(blob)), Spans: l.Spans}}
	if err := tree.CheckSpans(); err != nil {
		t.Error(err)
		return nil
	}
	for i := range tree.Chunks {
		if err := tree.CheckChunk(&tree.Chunks[i]); err != nil {
			t.Error(err)
			return nil
		}
	}
	return tree
}

func compare(t testing.TB, blob []byte, got *index.Tree) {
	t.Helper()
	contents := make([][]byte, len(got.Chunks))
	for i := range got.Chunks {
		c := &got.Chunks[i]
		p, err := Content(blob, got.Blobs[0].Cover(c.Offset, c.End()), c)
		if err == nil && c.Digest.Algorithm == chunk.Origin {
			err = proved(blob, got.Blobs[0].Cover(c.Offset, c.End()))
		} else if err == nil {
			err = c.Digest.Verify(p)
		}
		if err != nil {
			t.Errorf("chunk %d, %d bytes at %d: %v", i, c.Size, c.Offset, err)
			return
		}
		contents[i] = p
	}
	want, data := read(t, blob)
	want.Chunks = got.Chunks
	err := want.Walk(func(path string, ino *index.Inode) error {
		other, err := got.Lookup(path)
		if err != nil {
			return err
		}
		if !ino.IsRegular() {
			return nil
		}
		p := make([]byte, other.Size)
		for _, e := range other.Extents {
			copy(p[e.Off:], contents[e.Chunk])
		}
		if !bytes.Equal(p, data[ino]) {
			t.Errorf("/%s: other content", path)
		}
		ino.Extents = other.Extents
		return nil
	})
	if err == nil {
		err = index.Equal(want, got)
	}
	if err != nil {
		t.Error(err)
	}
}

// proved verifies what spans decode to.
func proved(blob []byte, spans []index.Span) error {
	for i := range spans {
		s := &spans[i]
		p, err := Content(blob, spans[i:i+1], &index.Chunk{Offset: s.Start, Size: uint32(s.Size)})
		if err == nil && s.Proof == nil {
			err = errors.New("no proof")
		}
		if err == nil {
			err = chunk.Digest{Algorithm: chunk.SHA256, Sum: s.Proof.Stored}.Verify(p)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// read reads a layer as a whole, with the content of its files.
func read(t testing.TB, blob []byte) (*index.Tree, map[*index.Inode][]byte) {
	t.Helper()
	z, _, err := layer.Decompress(bytes.NewReader(blob), index.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	tree, data := index.NewTree(), map[*index.Inode][]byte{}
	r, a := layer.NewReader(z, "layer", index.Limits{}), tree.Begin()
	for {
		e, err := r.Next()
		if err == io.EOF {
			return tree, data
		}
		var p []byte
		if err == nil {
			p, err = io.ReadAll(r)
		}
		// What the format puts into the archive for its own use.
		if err == nil && !slices.Contains([]string{".prefetch.landmark", ".no.prefetch.landmark", "stargz.index.json"}, e.Path) {
			err = a.Apply(e.Change)
		}
		if err != nil {
			t.Fatal(err)
		}
		data[e.Inode] = p
	}
}

// Content decodes a chunk from a layer's bytes.
func Content(blob []byte, spans []index.Span, c *index.Chunk) ([]byte, error) {
	var all []byte
	for i := range spans {
		s := &spans[i]
		part := make([]byte, s.Size)
		if err := decode(part, blob[s.Offset:s.Offset+s.Length], s.Codec); err != nil {
			return nil, err
		}
		all = append(all, part...)
	}
	return all[c.Offset-spans[0].Start:][:c.Size], nil
}

func decode(to, stored []byte, codec chunk.Codec) error {
	var r io.Reader
	if codec == chunk.Gzip {
		z, err := gzip.NewReader(bytes.NewReader(stored))
		if err != nil {
			return err
		}
		r = z
	} else {
		z, err := zstd.NewReader(bytes.NewReader(stored), zstd.WithDecoderConcurrency(1))
		if err != nil {
			return err
		}
		defer z.Close()
		r = z
	}
	_, err := io.ReadFull(r, to)
	return err
}
