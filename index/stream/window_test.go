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
	for w, want := range map[index.Window][]byte{a: full, b: small, {}: nil, {Offset: 99}: nil} {
		if p, err := Window(t.Context(), src, ref, &index.Span{Codec: chunk.Gzip, Window: w}); err != nil || !bytes.Equal(p, want) {
			t.Errorf("%+v: %d bytes, %v", w, len(p), err)
		}
	}
	for name, w := range map[string]index.Window{"large": large, "garbage": garbage, "endless": endless, "cut": cut} {
		if _, err := Window(t.Context(), src, ref, &index.Span{Codec: chunk.Gzip, Window: w}); !errors.Is(err, chunk.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Window(t.Context(), src, ref, &index.Span{Window: index.Window{Offset: int64(len(all)), Length: 1}}); !errors.Is(err, blob.ErrRange) {
		t.Errorf("behind the blob: %v", err)
	}
	raw := src.Put(full)
	span := &index.Span{Codec: chunk.Deflate, Window: index.Window{Offset: 5, Length: 100}, Proof: &index.Proof{Window: sha256.Sum256(full[5:105])}}
	if p, err := Window(t.Context(), src, raw, span); err != nil || !bytes.Equal(p, full[5:105]) {
		t.Errorf("a proved window: %d bytes, %v", len(p), err)
	}
	span.Proof.Window[3] ^= 1
	if _, err := Window(t.Context(), src, raw, span); !errors.Is(err, chunk.ErrCorrupt) {
		t.Errorf("a window with another digest: %v", err)
	}
	src.Fault = func(context.Context, blob.Ref, int64, int64) *memblob.Fault {
		return &memblob.Fault{After: 3, Err: blob.ErrUnavailable}
	}
	if _, err := Window(t.Context(), src, ref, &index.Span{Window: a}); !errors.Is(err, blob.ErrUnavailable) || errors.Is(err, chunk.ErrCorrupt) {
		t.Errorf("a source that fails: %v", err)
	}
}
