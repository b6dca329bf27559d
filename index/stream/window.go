package stream

import (
	"context"
	"crypto/sha256"
	"fmt"

	"github.com/klauspost/compress/zstd"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// WindowSize is the most that a window decompresses to: what deflate can refer
// back to.
const WindowSize = 32 << 10

// Window fetches the window of a span from its blob, ref, and decompresses it. What
// the zero Window stands for is nil. Unless the span has a Proof a window has no
// digest: if it is wrong, so are the chunks decoded with it.
func Window(ctx context.Context, src blob.Source, ref blob.Ref, s *index.Span) ([]byte, error) {
	w := s.Window
	if w.Length == 0 {
		return nil, nil
	}
	stored, err := blob.ReadAll(ctx, src, ref, w.Offset, int64(w.Length))
	if err != nil {
		return nil, fmt.Errorf("window at offset %d of blob %s: %w", w.Offset, ref.Digest, err)
	}
	if s.Proof != nil && sha256.Sum256(stored) != s.Proof.Window {
		return nil, fmt.Errorf("%w: the digest of the window at offset %d of blob %s is sha256:%x, want sha256:%x", chunk.ErrCorrupt, w.Offset, ref.Digest, sha256.Sum256(stored), s.Proof.Window)
	}
	if s.Codec == chunk.Deflate {
		return stored, nil
	}
	return OpenWindow(stored)
}

// WindowOf is Window where the tree is at hand, which may have the blob itself.
func WindowOf(ctx context.Context, src blob.Source, t *index.Tree, s *index.Span) ([]byte, error) {
	w, b := s.Window, &t.Blobs[s.Window.Blob]
	if b.Data == nil || w.Length == 0 {
		return Window(ctx, src, blob.Ref{Digest: b.Digest, Size: b.Size}, s)
	}
	if w.Offset > int64(len(b.Data))-int64(w.Length) {
		return nil, fmt.Errorf("%w: window of %d bytes at offset %d of blob %s of %d", chunk.ErrCorrupt, w.Length, w.Offset, b.Digest, len(b.Data))
	}
	return OpenWindow(b.Data[w.Offset:][:w.Length])
}

var windowDecoder, _ = zstd.NewReader(nil, zstd.WithDecoderConcurrency(0), zstd.WithDecoderMaxMemory(WindowSize), zstd.WithDecodeAllCapLimit(true))

// OpenWindow decompresses a window.
func OpenWindow(stored []byte) ([]byte, error) {
	p, err := windowDecoder.DecodeAll(stored, make([]byte, 0, WindowSize))
	if err != nil {
		return nil, fmt.Errorf("%w: window of %d bytes: %v", chunk.ErrCorrupt, len(stored), err)
	}
	return p, nil
}
