package stream

import (
	"context"
	"crypto/sha256"
	"fmt"

	"github.com/klauspost/compress/zstd"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/zframe"
)

// WindowSize is the most that a window decompresses to: what deflate can refer
// back to.
const WindowSize = 32 << 10

// MaxBeside bounds what Beside fetches, in stored bytes: spans have
// no larger states than they have content, and a chunk has 16 MiB of that.
const MaxBeside = 32 << 20

// Beside fetches what decoding spans of a tree needs besides (index.Beside), unless the
// tree has it itself. Unless a span has a Proof its window has no digest: if it is wrong,
// so are the chunks decoded with it.
func Beside(ctx context.Context, src blob.Source, t *index.Tree, spans []index.Span) ([]byte, error) {
	n, off, length := index.Beside(spans)
	if length == 0 {
		return nil, nil
	}
	if length > MaxBeside {
		return nil, fmt.Errorf("%w: windows of %d bytes, want at most %d", index.ErrLimit, length, MaxBeside)
	}
	b := &t.Blobs[n]
	if b.Data == nil {
		p, err := blob.ReadAll(ctx, src, blob.Ref{Digest: b.Digest, Size: b.Size}, off, length)
		if err != nil {
			err = fmt.Errorf("windows at offset %d of blob %s: %w", off, b.Digest, err)
		}
		return p, err
	}
	if off > int64(len(b.Data))-length {
		return nil, fmt.Errorf("%w: windows of %d bytes at offset %d of blob %s of %d", chunk.ErrCorrupt, length, off, b.Digest, len(b.Data))
	}
	return b.Data[off:][:length], nil
}

// window returns the window of a span, decompressed; nil if it has none.
func (r *Reader) window(s *index.Span) ([]byte, error) {
	w := s.Window
	if w.Length == 0 {
		return nil, nil
	}
	at := w.Offset - r.besideAt
	var stored []byte
	switch {
	case r.opt.More != nil:
		var err error
		if stored, err = r.opt.More(w.Blob, w.Offset, int64(w.Length)); err != nil {
			return nil, passed{err}
		}
	case at < 0 || at > int64(len(r.beside))-int64(w.Length):
		return nil, fmt.Errorf("%w: no window for the span at offset %d", chunk.ErrCorrupt, s.Offset)
	default:
		stored = r.beside[at:][:w.Length]
	}
	if s.Proof != nil && sha256.Sum256(stored) != s.Proof.Window {
		return nil, fmt.Errorf("%w: the digest of the window at offset %d of blob %d is sha256:%x, want sha256:%x", chunk.ErrCorrupt, w.Offset, w.Blob, sha256.Sum256(stored), s.Proof.Window)
	}
	switch s.Codec {
	case chunk.Deflate:
		return stored, nil
	case chunk.ZstdBlocks:
		p, err := stateDecoder.DecodeAll(stored, r.mem.state[:0])
		if err != nil {
			return nil, fmt.Errorf("%w: state of %d bytes: %v", chunk.ErrCorrupt, len(stored), err)
		}
		r.mem.state = p
		return p, nil
	}
	return OpenWindow(stored)
}

var stateDecoder, _ = zstd.NewReader(nil, zstd.WithDecoderConcurrency(0), zstd.WithDecoderMaxMemory(zframe.MaxState))

var windowDecoder, _ = zstd.NewReader(nil, zstd.WithDecoderConcurrency(0), zstd.WithDecoderMaxMemory(WindowSize), zstd.WithDecodeAllCapLimit(true))

// OpenWindow decompresses a window of gzip.
func OpenWindow(stored []byte) ([]byte, error) {
	p, err := windowDecoder.DecodeAll(stored, make([]byte, 0, WindowSize))
	if err != nil {
		return nil, fmt.Errorf("%w: window of %d bytes: %v", chunk.ErrCorrupt, len(stored), err)
	}
	return p, nil
}
