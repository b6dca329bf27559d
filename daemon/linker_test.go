package daemon

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/shale-image/shale/config"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/reader"
)

// A linker waits for its order, however long that is, and reads the file that comes with
// it; without one it ends.
func TestLinkProcess(t *testing.T) {
	dir := t.TempDir()
	s := &store{cfg: &config.Config{}}
	f, err := os.Create(filepath.Join(dir, "index"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString("no index"); err != nil {
		t.Fatal(err)
	}
	o := order{Raw: reader.Raw{Kind: reader.Index, Name: "the index", Size: 8, Layers: slices.Repeat([]image.Descriptor{{Digest: "sha256:"}}, 20_000)}, Pool: filepath.Join(dir, "pool"), Dir: filepath.Join(dir, "linked")}
	for range 2 {
		l, err := s.startLinker(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := l.run(o, f); !errors.Is(err, index.ErrCorrupt) || !strings.Contains(err.Error(), "the index") {
			t.Error("of what is no index it says:", err)
		}
		l.close() // it has had its order
	}
	for _, canceled := range []bool{false, true} {
		ctx, cancel := context.WithCancel(t.Context())
		l, err := s.startLinker(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if canceled {
			cancel()
		}
		if l.close(); len(l.ended) > 0 || l.to != nil {
			t.Error("it has not ended")
		}
		l.close()
		cancel()
	}
	var none *linkProcess
	none.close()
}
