package content

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/memblob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

const size = 64 << 10 // of a chunk

// file makes a file of chunks in one blob; nil is a hole. Stored bytes are
// compressed where that helps.
func file(t *testing.T, parts ...[]byte) (*index.Tree, *index.Inode, *memblob.Source, []byte) {
	t.Helper()
	tree, ino := index.NewTree(), &index.Inode{Mode: 0o100644}
	src := memblob.New(nil)
	var stored, want []byte
	var b index.Blob
	for _, p := range parts {
		if p == nil {
			want = append(want, make([]byte, size)...)
			continue
		}
		s := index.Span{Size: int64(len(p)), Codec: chunk.Zstd, Offset: int64(len(stored))}
		out, ok := s.Codec.Encode(nil, p)
		if !ok {
			s.Codec, out = chunk.None, p
		}
		s.Length = int64(len(out))
		c := index.Chunk{Digest: chunk.Sum(chunk.BLAKE3, p), Size: uint32(len(p)), Offset: b.Append(s)}
		ino.Extents = append(ino.Extents, index.Extent{Off: int64(len(want)), Chunk: uint32(len(tree.Chunks))})
		tree.Chunks = append(tree.Chunks, c)
		stored, want = append(stored, out...), append(want, p...)
	}
	ino.Size = int64(len(want))
	ref := src.Put(stored)
	b.Digest, b.Size = ref.Digest, ref.Size
	tree.Blobs = []index.Blob{b}
	return tree, ino, src, want
}

func part(c string) []byte { return []byte(strings.Repeat(c, size/len(c))) }

func TestCopy(t *testing.T) {
	for name, parts := range map[string][][]byte{
		"empty":           {},
		"one":             {[]byte("x")},
		"many":            {part("a"), part("bc"), part("defg"), []byte("end")},
		"holes":           {nil, part("a"), nil, nil, part("b"), nil},
		"a hole":          {nil},
		"does not shrink": {[]byte("\x00\x01\x02"), []byte("\x03\x04")},
	} {
		tree, ino, src, want := file(t, parts...)
		var got bytes.Buffer
		if err := Copy(t.Context(), &got, tree, src, ino); err != nil || !bytes.Equal(got.Bytes(), want) {
			t.Errorf("%s: %d bytes, want %d; %v", name, got.Len(), len(want), err)
		}
	}
}

// TestMerges counts requests: chunks that lie together come together.
func TestMerges(t *testing.T) {
	var parts [][]byte
	for i := range 50 {
		parts = append(parts, part(string(rune('a'+i))))
	}
	tree, ino, src, _ := file(t, parts...)
	requests := 0
	src.Fault = func(context.Context, blob.Ref, int64, int64) *memblob.Fault {
		requests++
		return nil
	}
	if err := Copy(t.Context(), &bytes.Buffer{}, tree, src, ino); err != nil || requests != 1 {
		t.Errorf("%d requests, %v", requests, err)
	}
}

// TestCorrupt has what is wrong found, and the blob named.
func TestCorrupt(t *testing.T) {
	tree, ino, src, _ := file(t, part("a"), part("b"))
	src.Fault = func(_ context.Context, _ blob.Ref, _, n int64) *memblob.Fault {
		return &memblob.Fault{Flip: 1, After: n}
	}
	if err := Copy(t.Context(), &bytes.Buffer{}, tree, src, ino); !errors.Is(err, chunk.ErrCorrupt) || !strings.Contains(err.Error(), tree.Blobs[0].Digest) {
		t.Errorf("a flipped byte: %v", err)
	}
	src.Fault = nil
	for name, change := range map[string]func(*index.Chunk, *index.Span){
		"digest":   func(c *index.Chunk, _ *index.Span) { c.Digest.Sum[3] ^= 1 },
		"size":     func(c *index.Chunk, _ *index.Span) { c.Size++ },
		"too long": func(c *index.Chunk, _ *index.Span) { c.Size = chunk.MaxSize + 1 },
		"codec":    func(_ *index.Chunk, s *index.Span) { s.Codec = chunk.LZ4 },
	} {
		tree, ino, src, _ := file(t, part("a"), part("b"))
		change(&tree.Chunks[1], &tree.Blobs[0].Spans[1])
		if err := Copy(t.Context(), &bytes.Buffer{}, tree, src, ino); !errors.Is(err, chunk.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
	src.Fault = func(context.Context, blob.Ref, int64, int64) *memblob.Fault {
		return &memblob.Fault{After: -1, Err: blob.ErrUnavailable}
	}
	if err := Copy(t.Context(), &bytes.Buffer{}, tree, src, ino); !errors.Is(err, blob.ErrUnavailable) || errors.Is(err, chunk.ErrCorrupt) {
		t.Errorf("where the source fails: %v", err)
	}
}

// hand is a source that has some chunks at hand, and one of them wrong.
type hand struct {
	*memblob.Source
	chunks map[uint32][]byte
}

func (h *hand) Chunk(_ context.Context, _ *index.Tree, chunk uint32, p []byte) bool {
	return copy(p, h.chunks[chunk]) == len(p)
}

// TestAtHand: what is at hand is not fetched, unless it is wrong or nobody can tell.
func TestAtHand(t *testing.T) {
	tree, ino, src, want := file(t, part("a"), part("b"), nil, part("c"), part("d"))
	requests := 0
	src.Fault = func(context.Context, blob.Ref, int64, int64) *memblob.Fault {
		requests++
		return nil
	}
	for _, c := range []struct {
		here     map[uint32][]byte
		requests int
	}{
		{map[uint32][]byte{0: part("a"), 1: part("b"), 2: part("c"), 3: part("d")}, 0},
		{map[uint32][]byte{0: part("a"), 1: part("b"), 3: part("d")}, 1},
		{map[uint32][]byte{0: part("x"), 1: part("b"), 2: part("c"), 3: part("d")}, 1},
		{nil, 1},
	} {
		requests = 0
		var got bytes.Buffer
		h := &hand{src, c.here}
		if err := Copy(t.Context(), &got, tree, h, ino); err != nil || !bytes.Equal(got.Bytes(), want) || requests != c.requests {
			t.Errorf("with %d at hand: %d bytes, %v, %d requests, want %d", len(c.here), got.Len(), err, requests, c.requests)
		}
		got.Reset()
		if err := Copy(t.Context(), &got, tree, Cached(h, t.TempDir()), ino); err != nil || !bytes.Equal(got.Bytes(), want) {
			t.Errorf("cached, with %d at hand: %v", len(c.here), err)
		}
	}
	tree.Chunks[0].Digest.Algorithm = chunk.Origin
	if err := Copy(t.Context(), &bytes.Buffer{}, tree, &hand{src, map[uint32][]byte{0: part("a")}}, ino); err == nil {
		t.Error("what has no digest is believed")
	}
}
