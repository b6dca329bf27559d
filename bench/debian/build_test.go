package debian

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/shale-image/shale/bench/oci"
)

// TestBuild builds the base image from packages, which takes a minute and the
// network: only where it is asked for. `make demo` does the same all the time.
func TestBuild(t *testing.T) {
	cache := os.Getenv("SHALE_IMAGES")
	if cache == "" {
		t.Skip("needs SHALE_IMAGES, a directory to build images in")
	}
	for _, r := range []Recipe{Base, Python} {
		dir, err := Build(t.Context(), r, cache, t.Output())
		if err != nil {
			t.Fatal(err)
		}
		l := oci.Layout(dir)
		m, _, err := l.Manifest()
		if err != nil {
			t.Fatal(err)
		}
		config, err := l.Config(m)
		if err != nil {
			t.Fatal(err)
		}
		if len(m.Layers) != len(config.RootFS.DiffIDs) {
			t.Errorf("%s: %d layers, %d diff ids", r.Name, len(m.Layers), len(config.RootFS.DiffIDs))
		}
		var size int64
		for _, d := range m.Layers {
			size += d.Size
			name, err := l.Blob(d.Digest)
			if err != nil {
				t.Fatal(err)
			}
			p, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			if oci.Digest(p) != d.Digest {
				t.Errorf("%s: layer is %s, want %s", r.Name, oci.Digest(p), d.Digest)
			}
		}
		if want := int64(50e6); size < want {
			t.Errorf("%s: %d bytes of layers, want more than %d", r.Name, size, want)
		}
	}
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
	want := cached(t, cache, Python)
	got, err := Build(t.Context(), Python, cache, io.Discard)
	if err != nil || got != want {
		t.Errorf("got %s, %v, want %s", got, err, want)
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
