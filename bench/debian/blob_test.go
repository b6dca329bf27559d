package debian

import (
	"context"
	"errors"
	"os"
	"testing"

	"github.com/shale-image/shale/bench/oci"
)

func TestRecompress(t *testing.T) {
	for _, c := range []Compression{Zstd, ZstdFrames} {
		t.Run(string(c), func(t *testing.T) { testRecompress(t, c) })
	}
}

func testRecompress(t *testing.T, c Compression) {
	from, _ := stack(t)
	before := checkImage(t, from)
	var images []oci.Manifest
	for range 2 {
		out, err := oci.Create(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		if err := recompress(t.Context(), from, out, c); err != nil {
			t.Fatal(err)
		}
		images = append(images, checkImage(t, out))
	}
	m := images[0]
	if m.Config != before.Config {
		t.Errorf("the config is %v, want that of the image with gzip, %v", m.Config, before.Config)
	}
	for i, d := range m.Layers {
		if d.MediaType != oci.TypeZstd {
			t.Errorf("layer %d is of type %s", i, d.MediaType)
		}
		if d != images[1].Layers[i] {
			t.Errorf("layer %d is once %v and once %v", i, d, images[1].Layers[i])
		}
	}
}

func TestRecompressRefusesAnotherImage(t *testing.T) {
	from, _ := stack(t)
	m, _, err := from.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	out, err := oci.Create(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := recompress(ctx, from, out, Zstd); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want that it was cancelled", err)
	}
	top, err := from.Blob(m.Layers[2].Digest)
	if err != nil {
		t.Fatal(err)
	}
	other, err := from.Blob(m.Layers[1].Digest)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(other, top); err != nil {
		t.Fatal(err)
	}
	if err := recompress(t.Context(), from, out, Zstd); err == nil {
		t.Error("an image with the wrong layers is taken")
	}
}
