package debian

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/shale-image/shale/bench/oci"
)

// TestBuild builds all images from packages, which takes minutes and the
// network: only where it is asked for. `make demo` does the same all the time.
func TestBuild(t *testing.T) {
	cache := os.Getenv("SHALE_IMAGES")
	if cache == "" {
		t.Skip("needs SHALE_IMAGES, a directory to build images in")
	}
	for _, c := range []Compression{Gzip, Zstd, ZstdFrames} {
		base := ""
		for _, r := range Images {
			dir, err := Build(t.Context(), r.With(c), cache, t.Output())
			if err != nil {
				t.Fatal(err)
			}
			m := checkImage(t, oci.Layout(dir))
			if base == "" {
				base = m.Layers[0].Digest
			}
			if m.Layers[0].Digest != base {
				t.Errorf("%s, %s: the base layer is %s, not %s, that of the others", r.Name, c, m.Layers[0].Digest, base)
			}
			if (len(r.Packages) > 0) != (len(m.Layers) > 1) {
				t.Errorf("%s, %s: %d layers", r.Name, c, len(m.Layers))
			}
		}
	}
}

// checkImage fails the test unless all blobs of an image are what they are said
// to be.
func checkImage(t *testing.T, l oci.Layout) oci.Manifest {
	t.Helper()
	m, _, err := l.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	config, err := l.Config(m)
	if err != nil {
		t.Fatal(err)
	}
	if len(m.Layers) != len(config.RootFS.DiffIDs) {
		t.Fatalf("%s: %d layers, %d diff ids", l, len(m.Layers), len(config.RootFS.DiffIDs))
	}
	for i, d := range m.Layers {
		name, err := l.Blob(d.Digest)
		if err != nil {
			t.Fatal(err)
		}
		p, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if oci.Digest(p) != d.Digest || int64(len(p)) != d.Size {
			t.Errorf("%s: layer is %s of %d bytes, want %s of %d", l, oci.Digest(p), len(p), d.Digest, d.Size)
		}
		if got := oci.Digest(decompress(t, d.MediaType, p)); got != config.RootFS.DiffIDs[i] {
			t.Errorf("%s: diff id is %s, want %s", l, got, config.RootFS.DiffIDs[i])
		}
	}
	return m
}

func decompress(t *testing.T, mediaType string, p []byte) []byte {
	t.Helper()
	var r io.Reader
	var err error
	if mediaType == oci.TypeZstd {
		var z *zstd.Decoder
		if z, err = zstd.NewReader(bytes.NewReader(p)); err == nil {
			defer z.Close()
			r = z
		}
	} else {
		r, err = gzip.NewReader(bytes.NewReader(p))
	}
	if err != nil {
		t.Fatal(err)
	}
	out, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// cached makes an image that is complete, as far as Build looks.
func cached(t *testing.T, cache string, r Recipe) string {
	t.Helper()
	dir := filepath.Join(cache, r.key(runtime.GOARCH))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "index.json"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestBuildUsesTheCache(t *testing.T) {
	t.Setenv("PATH", "") // nothing can be built
	cache := t.TempDir()
	for _, r := range []Recipe{Python, Python.With(Zstd)} {
		want := cached(t, cache, r)
		got, err := Build(t.Context(), r, cache, io.Discard)
		if err != nil || got != want {
			t.Errorf("got %s, %v, want %s", got, err, want)
		}
	}
	r := Python
	r.Compression = Gzip // what it is without
	if got, err := Build(t.Context(), r, cache, io.Discard); err != nil || got != cached(t, cache, Python) {
		t.Errorf("got %s, %v", got, err)
	}
}

func TestBuildRefusesOtherCompressions(t *testing.T) {
	cache := t.TempDir()
	if dir, err := Build(t.Context(), Python.With("lz4"), cache, io.Discard); err == nil || !strings.Contains(err.Error(), "lz4") {
		t.Errorf("built %s, %v, want an error that names the compression", dir, err)
	}
}

func TestFailedBuildLeavesNothing(t *testing.T) {
	t.Setenv("PATH", "")
	cache := t.TempDir()
	if _, err := Build(t.Context(), Base, cache, io.Discard); err == nil {
		t.Fatal("an image was built without mmdebstrap")
	}
	entries, err := os.ReadDir(cache)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if filepath.Ext(e.Name()) != ".lock" {
			t.Errorf("%s is left", e.Name())
		}
	}
}

func TestBuildsWaitForEachOther(t *testing.T) {
	t.Setenv("PATH", "")
	cache := t.TempDir()
	final := filepath.Join(cache, Base.key(runtime.GOARCH))
	unlock, err := lock(t.Context(), final+".lock")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := Build(ctx, Base, cache, io.Discard); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("while another builds: %v, want to wait", err)
	}
	done := make(chan error)
	go func() {
		dir, err := Build(t.Context(), Base, cache, io.Discard)
		if err == nil && dir != final {
			err = errors.New("another image: " + dir)
		}
		done <- err
	}()
	cached(t, cache, Base) // the other has it
	unlock()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
