package soci

import (
	"bytes"
	"compress/gzip"
	"io"
	"testing"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/soci/socitest"
)

// What socitest makes of the layers that the real tool had says what is in them, too:
// other tests rely on it.
func TestBuilt(t *testing.T) {
	for _, z := range ztocs(t, "v2") {
		for _, span := range []int64{50, 20000, 1 << 20} {
			p, err := socitest.Build(z.layer, span)
			if err != nil { // it makes none of several members, with which only newer ones do better
				if err.Error() != "several members" {
					t.Error(err)
				}
				continue
			}
			z.stored = p
			got, err := Read(p, z.Subject, index.Limits{})
			if err != nil {
				t.Errorf("span %d: %v", span, err)
				continue
			}
			compare(t, &z, got)
		}
	}
}

// A layer of stored blocks and of long ones, of spans of any size.
func TestLevels(t *testing.T) {
	z := ztocs(t, "v2")[1] // not compressed
	for level := range 10 {
		var b bytes.Buffer
		w, err := gzip.NewWriterLevel(&b, level)
		if err != nil {
			t.Fatal(err)
		}
		w.Name = "layer.tar"
		io.Copy(w, bytes.NewReader(z.layer))
		w.Close()
		for _, span := range []int64{1, 10_000, 1 << 30} {
			x := ztoc{layer: b.Bytes()}
			x.Layer, x.Size, x.Ztoc = chunk.Sum(chunk.SHA256, x.layer).String(), int64(b.Len()), "sha256:z"
			if x.stored, err = socitest.Build(x.layer, span); err != nil {
				t.Fatal(err)
			}
			l, err := Read(x.stored, x.Subject, index.Limits{})
			if err != nil {
				t.Fatal(err)
			}
			compare(t, &x, l)
		}
	}
}
