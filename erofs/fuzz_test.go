package erofs

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/shale-image/shale/index"
)

// Whatever an image says, reading it ends, with a tree that can be laid out
// again or with an error that says what is wrong with the image.
func FuzzOpen(f *testing.F) {
	_, img := small(f)
	f.Add(img)
	o := newWorld(1)
	o.tree.Root.Children["big"] = dir()
	for i := range 40 {
		o.tree.Root.Children["big"].Children[string(bytes.Repeat([]byte{byte('a' + i)}, 200))] = o.file(0)
	}
	o.tree.Root.Children["sparse"] = o.file(1<<20, index.Extent{Off: 8192, Chunk: o.chunk(1, 100, 0)})
	opt := o.options()
	opt.Checksum = false
	_, img = o.build(f, opt)
	f.Add(img)
	_, img = newWorld(0).build(f, Options{})
	f.Add(img)
	for _, name := range []string{os.Getenv("SHALE_FIXTURES"), filepath.Join("..", "..", "shared", "fixtures")} {
		if b, err := os.ReadFile(filepath.Join(name, "nydus", "rafs-v6-2.2.boot")); err == nil {
			f.Add(b)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		im, err := Open(bytes.NewReader(b), int64(len(b)), "image")
		var tree *index.Tree
		if err == nil {
			limits := Limits{Entries: 10000, MetadataBytes: 1 << 20, PathBytes: 4096, Runs: 1 << 20}
			tree, err = im.Tree(limits, func(path string, size int64, runs []Run) ([]index.Extent, error) {
				next := int64(0)
				for _, r := range runs {
					if r.Off < next || r.Length < 1 || r.Off > size-r.Length || r.Device < 1 || int(r.Device) > len(im.Devices()) {
						t.Fatalf("%q of %d bytes: run %+v", path, size, r)
					}
					next = r.Off + r.Length
				}
				return nil, nil
			})
		}
		if err != nil {
			if !errors.Is(err, index.ErrCorrupt) && !errors.Is(err, index.ErrUnsupported) && !errors.Is(err, index.ErrLimit) {
				t.Fatalf("unclassified error: %v", err)
			}
			return
		}
		l, err := NewLayout(tree, Options{})
		if err != nil {
			if errors.Is(err, index.ErrLimit) {
				return
			}
			t.Fatalf("what was read cannot be written: %v", err)
		}
		var out bytes.Buffer
		if _, err := l.WriteTo(&out); err != nil {
			t.Fatal(err)
		}
		_, again, _ := read(t, out.Bytes())
		same(t, tree.Root, again.Root)
	})
}
