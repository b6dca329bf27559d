package artifact

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/layer"
)

// realTree reads the OCI layout that ARTIFACT_IMAGE names: its files cut at
// chunk.Size, each content once, and a checkpoint every MiB of a layer. It
// returns the bytes of the layers, too.
func realTree(tb testing.TB) (*index.Tree, Info, int64) {
	dir := os.Getenv("ARTIFACT_IMAGE")
	if dir == "" {
		tb.Skip("ARTIFACT_IMAGE names no OCI layout")
	}
	read := func(digest string, v any) {
		p, err := os.ReadFile(blobPath(dir, digest))
		if err == nil {
			err = json.Unmarshal(p, v)
		}
		if err != nil {
			tb.Fatal(err)
		}
	}
	var top, manifest struct {
		Manifests, Layers []struct {
			Digest string
			Size   int64
		}
		Config struct{ Digest string }
	}
	p, err := os.ReadFile(filepath.Join(dir, "index.json"))
	if err == nil {
		err = json.Unmarshal(p, &top)
	}
	if err != nil {
		tb.Fatal(err)
	}
	read(top.Manifests[0].Digest, &manifest)
	var config struct {
		RootFS struct {
			DiffIDs []string `json:"diff_ids"`
		} `json:"rootfs"`
	}
	read(manifest.Config.Digest, &config)
	info := Info{Manifest: top.Manifests[0].Digest, DiffIDs: config.RootFS.DiffIDs}
	t := index.NewTree()
	seen := map[chunk.Digest]uint32{}
	windows := index.Window{Blob: uint32(len(manifest.Layers)), Length: 12000}
	var total int64
	for n, l := range manifest.Layers {
		total += l.Size
		f, err := os.Open(blobPath(dir, l.Digest))
		if err != nil {
			tb.Fatal(err)
		}
		changes, size := realLayer(tb, f, t, uint32(n), seen)
		f.Close()
		if err := t.Apply(changes); err != nil {
			tb.Fatal(err)
		}
		b := index.Blob{Digest: l.Digest, Size: l.Size}
		var stored int64
		for at := int64(0); at < size; {
			s := index.Span{Codec: chunk.Gzip, Size: min(48<<10+at%32749, size-at), Offset: stored}
			at += s.Size
			if b.Spans != nil {
				s.Bits, s.Window = uint8(at%8), windows
				s.Offset -= int64(min(s.Bits, 1))
				windows.Offset += int64(windows.Length)
				windows.Length = 500 + uint32(at%3200)
			}
			end := int64(float64(l.Size) * (float64(at) / float64(size)))
			s.Length = end - s.Offset
			stored = end
			b.Append(s)
		}
		t.Blobs = append(t.Blobs, b)
	}
	t.Blobs = append(t.Blobs, index.Blob{Digest: info.Manifest, Size: windows.Offset})
	return t, info, total
}

func blobPath(dir, digest string) string {
	return filepath.Join(dir, "blobs", strings.ReplaceAll(digest, ":", "/"))
}

// realLayer returns the changes of a layer and the size of its archive, and
// adds its chunks.
func realLayer(tb testing.TB, f io.Reader, t *index.Tree, blob uint32, seen map[chunk.Digest]uint32) (changes []index.Change, size int64) {
	z, _, err := layer.Decompress(f, index.Limits{})
	if err != nil {
		tb.Fatal(err)
	}
	defer z.Close()
	count := &counter{r: z}
	r := layer.NewReader(count, "layer", index.Limits{})
	buf := make([]byte, chunk.Size)
	for {
		e, err := r.Next()
		if errors.Is(err, io.EOF) {
			return changes, count.n
		}
		if err != nil {
			tb.Fatal(err)
		}
		changes = append(changes, e.Change)
		if e.Op != index.Add || !e.Inode.IsRegular() {
			continue
		}
		_, err = layer.Cut(r, e, chunk.Size, func(p layer.Piece) ([]byte, func(), error) {
			return buf[:p.Size], func() {
				if p.At < 0 {
					return
				}
				d := chunk.Sum(chunk.BLAKE3, buf[:p.Size])
				n, ok := seen[d]
				if !ok {
					n = uint32(len(t.Chunks))
					seen[d] = n
					t.Chunks = append(t.Chunks, index.Chunk{Digest: d, Size: uint32(p.Size), Blob: blob, Offset: p.At})
				}
				e.Inode.Extents = append(e.Inode.Extents, index.Extent{Off: p.Off, Chunk: n})
			}, nil
		})
		if err != nil {
			tb.Fatal(err)
		}
	}
}

type counter struct {
	r io.Reader
	n int64
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

// TestReal tells what an index of a real image costs.
func TestReal(t *testing.T) {
	tr, info, layers := realTree(t)
	p := roundTrip(t, tr, info)
	e := &encoder{t: tr}
	if err := e.encode(info); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d names, %d chunks, %d bytes of layers: index of %d bytes, %.2f%%", e.names, len(e.chunks), layers, len(p), 100*float64(len(p))/float64(layers))
	t.Logf("sums %d, frames %d of %d", len(e.sums()), len(p)-headerSize-len(e.sums())-sumSize, len(slices.Concat(e.content()...)))
	z := encoders.Get().(*zstd.Encoder)
	for id, s := range e.sec {
		t.Logf("%-12s%8d%8d alone", sectionNames[id], len(s), len(z.EncodeAll(s, nil)))
	}
}

func BenchmarkReal(b *testing.B) {
	tr, info, _ := realTree(b)
	benchmark(b, tr, info)
}
