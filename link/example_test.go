package link

import (
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// The bytes in docs/formats/linked-image.md are those we write.
func TestDocument(t *testing.T) {
	root := directory()
	root.Children["hello"] = &index.Inode{Mode: syscall.S_IFREG | 0o644, Size: 6, Extents: []index.Extent{{}}}
	tree := &index.Tree{Root: root, Blobs: []index.Blob{{Digest: "sha256:" + strings.Repeat("0", 64), Spans: []index.Span{{Size: 6, Length: 6, Offset: 512}}}},
		Chunks: []index.Chunk{{Digest: chunk.Sum(chunk.BLAKE3, []byte("hello\n")), Size: 6}}}
	dir := filepath.Join(t.TempDir(), "im")
	if err := Link(t.Context(), tree, openPool(t), dir); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(dir, "map"))
	if err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile("../docs/formats/linked-image.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(hex.Dump(b), "\n")[mapHeader/16 : (mapHeader+mapRecord+mapSpan)/16] {
		if !strings.Contains(string(page), line) {
			t.Errorf("the page lacks %s", line)
		}
	}
}
