package zstdchunked_test

import (
	"encoding/json"
	"os"
	"testing"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/estargz"
	"github.com/shale-image/shale/index/estargz/estargztest"
	"github.com/shale-image/shale/index/zstdchunked"
)

// golden returns a layer of testdata and its annotations (testdata/README.md).
func golden(t testing.TB, name string) (blob []byte, annotations map[string]string) {
	t.Helper()
	blob, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	j, err := os.ReadFile("testdata/" + name + ".json")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(j, &annotations); err != nil {
		t.Fatal(err)
	}
	return blob, annotations
}

func read(t testing.TB, blob []byte, annotations map[string]string) *estargz.Layer {
	t.Helper()
	at, err := zstdchunked.Locate(annotations, int64(len(blob)), "layer")
	if err != nil {
		t.Fatal(err)
	}
	l, err := zstdchunked.Read(blob[at.Offset:][:at.Length], at, "layer", index.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestGolden(t *testing.T) {
	for name, exact := range map[string]bool{"podman.zst": true, "skopeo.zst": true, "stargz.zst": false} {
		t.Run(name, func(t *testing.T) {
			blob, annotations := golden(t, name)
			l := read(t, blob, annotations)
			estargztest.Compare(t, blob, l)
			for _, c := range l.Changes {
				if n := 6; c.Path == "holes" && !exact && len(c.Inode.Extents) != n {
					t.Errorf("%d extents of a file of 42,000 bytes, want %d of at most 8192", len(c.Inode.Extents), n)
				} else if c.Path == "holes" && exact && len(c.Inode.Extents) != 1 {
					t.Errorf("%d extents of a file cut by content, want 1", len(c.Inode.Extents))
				}
			}
			more := 0
			for _, s := range l.Spans {
				if err := s.Codec.Decode(make([]byte, s.Size), blob[s.Offset:][:s.Length]); err != nil {
					more++
				}
			}
			if exact != (more == 0) {
				t.Errorf("%d spans of %d have more than their size", more, len(l.Spans))
			}
			if n := len(l.Prefetch); n != 0 {
				t.Errorf("%d files to prefetch", n)
			}
		})
	}
}

// TestFramesOfOneFile: what was cut by content is one chunk over several frames.
func TestFramesOfOneFile(t *testing.T) {
	blob, annotations := golden(t, "podman.zst")
	tree := estargztest.Tree(t, blob, read(t, blob, annotations))
	ino, err := tree.Lookup("holes")
	if err != nil {
		t.Fatal(err)
	}
	c := &tree.Chunks[ino.Extents[0].Chunk]
	spans := tree.Blobs[0].Cover(c.Offset, c.End())
	if len(spans) != 6 || spans[1].Size != 9000 || int64(c.Size) != ino.Size || c.Digest.Algorithm != chunk.SHA256 {
		t.Errorf("a chunk of %d bytes over %d spans, want 6, the second of 9000 zeros", c.Size, len(spans))
	}
}
