package reader

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"

	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
)

// TestCheckLayers: a layer is what its DiffID says to its last byte.
func TestCheckLayers(t *testing.T) {
	right, table := gzipped(archive0), goldenLayer(t, "plain.gz").blob
	of := func(p []byte) string { return IndexDigest(p) }
	for name, c := range map[string]struct {
		layer []byte
		diff  []string
		lim   index.Limits
		want  error
	}{
		"right":        {right, []string{of(archive0)}, index.Limits{}, nil},
		"uncompressed": {archive0, []string{of(archive0)}, index.Limits{}, nil},
		"another":      {right, []string{of([]byte("x"))}, index.Limits{}, index.ErrCorrupt},
		"more behind":  {gzipped(append(bytes.Clone(archive0), 0)), []string{of(archive0)}, index.Limits{}, index.ErrCorrupt},
		"of a table":   {table, []string{of(archive0)}, index.Limits{}, index.ErrCorrupt},
		"cut off":      {right[:len(right)-9], []string{of(archive0)}, index.Limits{}, index.ErrCorrupt},
		"too many":     {right, []string{of(archive0), of(archive0)}, index.Limits{}, index.ErrCorrupt},
		"too large":    {right, []string{of(archive0)}, index.Limits{StreamBytes: int64(len(archive0)) - 1}, index.ErrLimit},
	} {
		j := Job{Manifest: "m", Layers: []image.Descriptor{{Digest: of(c.layer), Size: int64(len(c.layer))}}, DiffIDs: c.diff, Limits: c.lim,
			Open: func(context.Context, int) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(c.layer)), nil }}
		if err := CheckLayers(t.Context(), j); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}
