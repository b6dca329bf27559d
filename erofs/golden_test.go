package erofs

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// fixture returns a file of the collection of foreign images.
func fixture(t testing.TB, name string) []byte {
	t.Helper()
	base := os.Getenv("SHALE_FIXTURES")
	if base == "" {
		base = filepath.Join("..", "..", "shared", "fixtures") // beside the checkout
	}
	b, err := os.ReadFile(filepath.Join(base, name))
	if err != nil {
		t.Skipf("no fixture (set SHALE_FIXTURES): %v", err)
	}
	return b
}

// A bootstrap that Nydus wrote: two files in one blob of 1 MiB chunks.
func TestGoldenNydus(t *testing.T) {
	img := fixture(t, "nydus/rafs-v6-2.2.boot")
	im, tree, runs := read(t, img)
	s := im.Super()
	if s.RootNID != 0x80 || s.Inodes != 3 || s.MetaBlkaddr != 2 || s.FeatureCompat != 0x40000000 || s.FeatureIncompat != 0xc || s.Checksum != 0 {
		t.Errorf("super block is %+v", s)
	}
	wantDevices := []Device{{Tag: "be7d77eeb719f70884758d1aa800ed0fb09d701aaec469964e9d54325f0d5fef", Blocks: 9, Mapped: 0x200}}
	if d := cmp.Diff(wantDevices, im.Devices()); d != "" {
		t.Error(d)
	}
	if !bytes.Equal(im.Ext(), img[1152:1408]) {
		t.Error("wrong extension")
	}
	if d := cmp.Diff([]string{"lib.rs", "sync_io.rs"}, tree.Root.Names()); d != "" {
		t.Error(d)
	}
	wantRuns := map[string][]Run{
		"lib.rs":     {{Length: 0x4223, Device: 1, Block: 0, Index: 0}},
		"sync_io.rs": {{Length: 0x3458, Device: 1, Block: 5, Index: 1}},
	}
	if d := cmp.Diff(wantRuns, runs); d != "" {
		t.Error(d)
	}
	if f := tree.Root.Children["lib.rs"]; f.Size != 0x4223 || f.Mode != 0o100644 || f.Mtime.Sec != 0x63f23c61 {
		t.Errorf("lib.rs is %+v", f)
	}
}
