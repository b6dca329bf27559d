package daemon

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/shale-image/shale/chunk"
)

func TestOriginsFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), originsFile)
	find := origins(path)
	origin := func(n byte) chunk.Digest { return chunk.Digest{Algorithm: chunk.Origin, Sum: [32]byte{n, 7}} }
	if _, ok := find(origin(2)); ok {
		t.Error("found without a file")
	}
	var p []byte
	for n := byte(2); n < 100; n += 2 {
		p = append(p, make([]byte, originSize)...)
		p[len(p)-originSize], p[len(p)-originSize+1], p[len(p)-32] = n, 7, n+1
	}
	for _, end := range []int{len(p), len(p) - 1, originSize, 0} {
		if err := os.WriteFile(path, p[:end], 0o600); err != nil {
			t.Fatal(err)
		}
		for n := range byte(102) {
			d, ok := find(origin(n))
			if want := n >= 2 && n%2 == 0 && int(n)/2*originSize <= end; ok != want || ok && (d != chunk.Digest{Algorithm: chunk.BLAKE3, Sum: [32]byte{n + 1}}) {
				t.Errorf("%d of %d bytes: %v, %v", n, end, d, ok)
			}
		}
	}
}
