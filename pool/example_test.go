package pool

import (
	"encoding/hex"
	"os"
	"strings"
	"testing"

	"github.com/shale-image/shale/chunk"
)

// The bytes in docs/formats/pool.md are those we write.
func TestDocument(t *testing.T) {
	hello, zeros := []byte("hello\n"), make([]byte, 20000)
	es := []Entry{{Digest: chunk.Sum(chunk.BLAKE3, hello), Size: 6}, {Digest: chunk.Sum(chunk.SHA256, zeros), Size: 20000}}
	size, err := place(es)
	if err != nil {
		t.Fatal(err)
	}
	table, err := encodeTable(es, size, 0)
	if err != nil {
		t.Fatal(err)
	}
	id := tableID(table)
	present := append(presenceHeader(id, 3, "01234567-89ab-cdef-0123-456789abcdef"), make([]byte, recSize)...)
	encodeRecord(present[pageSize:], id, 0, 0b111, 0b001)
	page, err := os.ReadFile("../docs/formats/pool.md")
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(hex.Dump(table)), "\n")
	dump := strings.Split(strings.TrimSpace(hex.Dump(present)), "\n")
	lines = append(append(lines, dump[:4]...), dump[pageSize/16:]...)
	for _, line := range append(lines, segmentName(id)) {
		if !strings.Contains(string(page), line) {
			t.Errorf("the page lacks %s", line)
		}
	}
}
