package debian

import (
	"bufio"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"

	"github.com/klauspost/compress/zstd"

	"github.com/shale-image/shale/bench/oci"
)

// recompress makes out the image from with its gzip layers in zstd. The config
// stays, as it names layers by what is in them.
func recompress(ctx context.Context, from, out oci.Layout, c Compression) error {
	m, _, err := from.Manifest()
	if err != nil {
		return err
	}
	config, err := from.Config(m)
	if err != nil {
		return err
	}
	if len(config.RootFS.DiffIDs) != len(m.Layers) {
		return fmt.Errorf("%s has %d layers and %d diff ids", from, len(m.Layers), len(config.RootFS.DiffIDs))
	}
	for i, d := range m.Layers {
		if err := ctx.Err(); err != nil {
			return err
		}
		if m.Layers[i], err = recompressLayer(from, out, d.Digest, config.RootFS.DiffIDs[i], c); err != nil {
			return fmt.Errorf("layer %s: %w", d.Digest, err)
		}
	}
	return out.Finish(config, m.Layers)
}

func recompressLayer(from, out oci.Layout, digest, diffID string, c Compression) (oci.Descriptor, error) {
	src, err := from.Blob(digest)
	if err != nil {
		return oci.Descriptor{}, err
	}
	f, err := os.Open(src)
	if err != nil {
		return oci.Descriptor{}, err
	}
	defer f.Close()
	r, err := gzip.NewReader(bufio.NewReaderSize(f, 1<<20))
	if err != nil {
		return oci.Descriptor{}, err
	}
	l, err := writeBlob(out, c, func(w io.Writer) error {
		_, err := io.Copy(w, r)
		return err
	})
	if err == nil && l.diffID != diffID {
		err = fmt.Errorf("diff id is %s, want %s", l.diffID, diffID)
	}
	return l.Descriptor, err
}

type layer struct {
	oci.Descriptor
	diffID string
}

// writeBlob adds a layer to the layout: what fn writes, compressed.
func writeBlob(out oci.Layout, c Compression, fn func(io.Writer) error) (layer, error) {
	tmp, err := os.CreateTemp(string(out), "layer")
	if err != nil {
		return layer{}, err
	}
	defer os.Remove(tmp.Name())
	defer tmp.Close()
	blob := &digester{w: tmp, h: sha256.New()}
	z, mediaType, err := compressor(blob, c)
	if err != nil {
		return layer{}, err
	}
	diff := &digester{w: z, h: sha256.New()}
	if err := errors.Join(fn(diff), z.Close(), tmp.Chmod(0o644), tmp.Close()); err != nil {
		return layer{}, err
	}
	l := layer{oci.Descriptor{MediaType: mediaType, Digest: blob.digest(), Size: blob.n}, diff.digest()}
	name, err := out.Blob(l.Digest)
	if err != nil {
		return layer{}, err
	}
	return l, os.Rename(tmp.Name(), name)
}

// compressor returns a writer that compresses into w what image builders would
// have made of it, and the media type of such a layer. One goroutine makes
// the same zstd at each run; level 3 is what they take.
func compressor(w io.Writer, c Compression) (io.WriteCloser, string, error) {
	if c.zstd() {
		z, err := zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.EncoderLevelFromZstd(3)), zstd.WithEncoderConcurrency(1))
		if c == ZstdFrames {
			return &frames{Encoder: z, w: w}, oci.TypeZstd, err
		}
		return z, oci.TypeZstd, err
	}
	z, err := gzip.NewWriterLevel(w, 6)
	return z, oci.TypeGzip, err
}

func (c Compression) zstd() bool { return c == Zstd || c == ZstdFrames }

// frames begins a frame after each frameSize bytes.
type frames struct {
	*zstd.Encoder
	w io.Writer
	n int // bytes in this one
}

const frameSize = 256 << 10

func (f *frames) Write(p []byte) (n int, err error) {
	for len(p) > 0 && err == nil {
		if f.n == frameSize {
			if err = f.Close(); err != nil {
				break
			}
			f.Reset(f.w)
			f.n = 0
		}
		var k int
		k, err = f.Encoder.Write(p[:min(len(p), frameSize-f.n)])
		n, f.n, p = n+k, f.n+k, p[k:]
	}
	return n, err
}

// digester counts and hashes what passes through it.
type digester struct {
	w io.Writer
	h hash.Hash
	n int64
}

func (d *digester) Write(p []byte) (int, error) {
	n, err := d.w.Write(p)
	d.h.Write(p[:n])
	d.n += int64(n)
	return n, err
}

func (d *digester) digest() string { return "sha256:" + hex.EncodeToString(d.h.Sum(nil)) }
