package artifact

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// TestDocumentedExample keeps docs/formats/index.md in step: it has every
// section of a small index, byte for byte.
func TestDocumentedExample(t *testing.T) {
	hello := &index.Inode{
		Mode: syscall.S_IFREG | 0o644, Mtime: index.Time{Sec: 1_700_000_000}, Size: 6,
		Extents: []index.Extent{{Chunk: 0}},
		Xattrs:  []index.Xattr{{Name: "user.a", Value: "b"}},
	}
	sparse := &index.Inode{Mode: syscall.S_IFREG | 0o644, UID: 1000, GID: 1000, Mtime: index.Time{Sec: -1, Nsec: 5}, Size: 1 << 20, Extents: []index.Extent{{Off: 4096, Chunk: 0}}}
	tr := &index.Tree{
		Root:   &index.Inode{Mode: syscall.S_IFDIR | 0o755, Mtime: index.Time{Sec: 1_700_000_000}},
		Chunks: []index.Chunk{{Digest: chunk.Sum(chunk.BLAKE3, []byte("hello\n")), Size: 6, Offset: 1024}},
		Blobs: []index.Blob{
			{Digest: digest(0xaa), Size: 200_000, Spans: []index.Span{
				{Size: 1_100_000, Offset: 10, Length: 150_000, Codec: chunk.Gzip},
				{Start: 1_100_000, Size: 100_000, Offset: 150_009, Length: 49_983, Codec: chunk.Gzip, Bits: 3, Window: index.Window{Blob: 1, Length: 9000}},
			}},
			{Digest: digest(0xbb), Size: 9000},
		},
	}
	tr.Root.Children = map[string]*index.Inode{
		"etc":     {Mode: syscall.S_IFDIR | 0o755, Mtime: index.Time{Sec: 1_700_000_000}, Children: map[string]*index.Inode{"motd": hello}},
		"greeted": sparse,
		"hello":   hello,
		"link":    {Mode: syscall.S_IFLNK | 0o777, Mtime: index.Time{Sec: 1_700_000_000}, Target: "etc/motd"},
		"null":    {Mode: syscall.S_IFCHR | 0o666, Mtime: index.Time{Sec: 1_700_000_000}, Rdev: 0x103},
	}
	info := Info{Manifest: digest(0xcc), DiffIDs: []string{digest(0xdd)}}
	roundTrip(t, tr, info)
	e := &encoder{t: tr}
	if err := e.encode(info); err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile("../../docs/formats/index.md")
	if err != nil {
		t.Fatal(err)
	}
	for id, s := range e.sec {
		if id == secImage || len(s) == 0 {
			continue
		}
		shown := strings.ReplaceAll(fmt.Sprintf("% x", s), strings.Repeat("00 ", 31), "00.. ")
		line := fmt.Sprintf("    %02x %02x  %s", id, len(s), shown)
		if !strings.Contains(string(page), line) {
			t.Errorf("docs/formats/index.md lacks the section %s:\n%s", sectionNames[id], line)
		}
	}
}
