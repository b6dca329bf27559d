package stream

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/memblob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

func TestWindow(t *testing.T) {
	e, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	src := memblob.New(nil)
	var all []byte
	put := func(p []byte) index.Window {
		w := index.Window{Offset: int64(len(all)), Length: uint32(len(p))}
		all = append(all, p...)
		return w
	}
	full, small := text(1, WindowSize), text(2, 7)
	a, b := put(e.EncodeAll(full, nil)), put(e.EncodeAll(small, nil))
	large, garbage := put(e.EncodeAll(text(3, WindowSize+1), nil)), put(text(4, 50))
	endless := put(e.EncodeAll(make([]byte, 1<<26), nil))
	cut := a
	cut.Length--
	ref := src.Put(all)
	tree := &index.Tree{Blobs: []index.Blob{{Digest: ref.Digest, Size: ref.Size}, {Data: all}}}
	read := func(s index.Span) ([]byte, error) {
		var got [2][]byte
		var errs [2]error
		for i := range got { // fetched, and at hand
			s.Window.Blob = uint32(i)
			spans := []index.Span{s}
			r := Reader{mem: new(memory)}
			if r.beside, errs[i] = Beside(t.Context(), src, tree, spans); errs[i] == nil {
				_, r.besideAt, _ = index.Beside(spans)
				got[i], errs[i] = r.window(&s)
			}
		}
		if !bytes.Equal(got[0], got[1]) || (errs[0] == nil) != (errs[1] == nil) {
			t.Errorf("%+v: %d bytes, %v; at hand %d, %v", s.Window, len(got[0]), errs[0], len(got[1]), errs[1])
		}
		return got[0], errs[0]
	}
	for w, want := range map[index.Window][]byte{a: full, b: small, {}: nil, {Offset: 99}: nil} {
		if p, err := read(index.Span{Codec: chunk.Gzip, Window: w}); err != nil || !bytes.Equal(p, want) {
			t.Errorf("%+v: %d bytes, %v", w, len(p), err)
		}
	}
	for name, w := range map[string]index.Window{"large": large, "garbage": garbage, "endless": endless, "cut": cut} {
		if _, err := read(index.Span{Codec: chunk.Gzip, Window: w}); !errors.Is(err, chunk.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if p, err := read(index.Span{Codec: chunk.ZstdBlocks, Window: large}); err != nil || len(p) != WindowSize+1 {
		t.Errorf("a state: %d bytes, %v", len(p), err)
	}
	if _, err := read(index.Span{Codec: chunk.ZstdBlocks, Window: endless}); !errors.Is(err, chunk.ErrCorrupt) {
		t.Errorf("an endless state: %v", err)
	}
	behind := index.Span{Codec: chunk.Gzip, Window: index.Window{Offset: int64(len(all)), Length: 1}}
	if _, err := read(behind); !errors.Is(err, blob.ErrRange) {
		t.Errorf("behind the blob: %v", err)
	}
	first, last := index.Span{Codec: chunk.ZstdBlocks, Window: a}, index.Span{Codec: chunk.ZstdBlocks, Window: large}
	if p, err := Beside(t.Context(), src, tree, []index.Span{{Codec: chunk.ZstdBlocks}, first, last}); err != nil || !bytes.Equal(p, all[:large.Offset+int64(large.Length)]) {
		t.Errorf("of several spans: %d bytes, %v", len(p), err)
	}
	span := index.Span{Codec: chunk.Deflate, Window: index.Window{Offset: 5, Length: 100}, Proof: &index.Proof{Window: sha256.Sum256(all[5:105])}}
	if p, err := read(span); err != nil || !bytes.Equal(p, all[5:105]) {
		t.Errorf("a proved window: %d bytes, %v", len(p), err)
	}
	span.Proof.Window[3] ^= 1
	if _, err := read(span); !errors.Is(err, chunk.ErrCorrupt) {
		t.Errorf("a window with another digest: %v", err)
	}
	src.Fault = func(context.Context, blob.Ref, int64, int64) *memblob.Fault {
		return &memblob.Fault{After: 3, Err: blob.ErrUnavailable}
	}
	if _, err := Beside(t.Context(), src, tree, []index.Span{first}); !errors.Is(err, blob.ErrUnavailable) || errors.Is(err, chunk.ErrCorrupt) {
		t.Errorf("a source that fails: %v", err)
	}
}

// TestBesideBound: no more windows are fetched at once than there can be for a chunk.
func TestBesideBound(t *testing.T) {
	var spans []index.Span
	for i := range int64(MaxBeside>>20 + 1) {
		spans = append(spans, index.Span{Codec: chunk.ZstdBlocks, Window: index.Window{Offset: i << 20, Length: 1 << 20}})
	}
	tree := &index.Tree{Blobs: []index.Blob{{Data: make([]byte, MaxBeside+1<<20)}}}
	if p, err := Beside(t.Context(), nil, tree, spans[1:]); err != nil || len(p) != MaxBeside {
		t.Errorf("%d bytes, %v", len(p), err)
	}
	if _, err := Beside(t.Context(), nil, tree, spans); !errors.Is(err, index.ErrLimit) {
		t.Errorf("a state more: %v", err)
	}
}
