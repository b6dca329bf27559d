package zstdchunked_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/estargz/estargztest"
	"github.com/shale-image/shale/index/zstdchunked"
)

// A large file that is cut by content is cut again, by the frames' digests: none of it is
// fetched but what is read. Another file with the same content shares its chunks, one
// that differs in a frame shares what lies in none of that.
func TestLargeFile(t *testing.T) {
	big := make([]byte, 20<<20)
	rand.NewChaCha8([32]byte{1}).Read(big)
	clear(big[5<<20 : 7<<20])
	other := bytes.Clone(big)
	other[18<<20] ^= 1
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for name, p := range map[string][]byte{"big": big, "again": big, "other": other, "small": big[:1<<20]} {
		w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(p)), Format: tar.FormatPAX})
		w.Write(p)
	}
	w.Close()
	blob, annotations := estargztest.Build(t, b.Bytes(), estargztest.Options{Zstd: true})
	l := read(t, blob, annotations)
	estargztest.Compare(t, blob, l)
	at, _ := zstdchunked.Locate(annotations, int64(len(blob)), "layer")
	n := len(big) / chunk.Size
	if _, err := zstdchunked.Read(blob[at.Offset:][:at.Length], at, "layer", index.Limits{Entries: 1200}); !errors.Is(err, index.ErrLimit) || !strings.Contains(err.Error(), "(Entries)") {
		t.Errorf("some 1000 entries and %d pieces: %v", 3*n, err)
	}
	origins := 0
	for _, c := range l.Chunks {
		if c.Digest.Algorithm == chunk.Origin {
			origins++
			if c.Size != chunk.Size {
				t.Errorf("a chunk of %d bytes", c.Size)
			}
		}
	}
	// Those of big, and the few of other that the frame with its change touches.
	if origins <= n || origins > n+3 {
		t.Errorf("%d chunks, want some more than %d", origins, n)
	}
	for _, c := range l.Changes {
		if k := len(c.Inode.Extents); c.Path == "small" && k != 1 || c.Path != "small" && k != n {
			t.Errorf("%s has %d extents", c.Path, k)
		}
	}
}
