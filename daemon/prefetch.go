package daemon

import (
	"context"
	"encoding/json"
	"os"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/fleet"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/pool"
	"github.com/shale-image/shale/reader"
)

// Traces that other nodes have shared are fetched by the service, and looked into by a
// process of its own: what it says is a list of chunks.

const (
	maxShared = 8 << 20 // bytes of traces, as they are stored
	maxListed = 1 << 14 // chunks that are fetched for them: 2 GiB of those we cut
)

// listOrder is what to make a list of.
type listOrder struct {
	Manifest string       `json:"manifest"` // digest of the image's
	Start    reader.Start `json:"start"`
	Traces   [][]byte     `json:"traces"` // fleet.Stored
}

// listed is one of the chunks.
type listed struct {
	Chunk string `json:"chunk"`
	Size  uint32 `json:"size"`
}

// shared lists what other nodes have read of an image at such a start, in their order.
func (s *server) shared(ctx context.Context, u *use, start *reader.Start) ([]pool.Entry, error) {
	all, err := fleet.Stored(ctx, u.repo, &image.Image{ManifestDigest: u.ManifestDigest}, maxShared)
	if err != nil {
		return nil, err
	}
	js, err := s.store.ask(ctx, "shale-lister", listOrder{u.ManifestDigest, *start, all})
	if err != nil {
		return nil, err
	}
	var list []listed
	if err := json.Unmarshal(js, &list); err != nil {
		return nil, err
	}
	out := make([]pool.Entry, len(list))
	for i, l := range list {
		if out[i].Digest, err = chunk.ParseName(l.Chunk); err != nil {
			return nil, index.Errorf(index.ErrCorrupt, "list of chunks", int64(i), "%v", err)
		}
		out[i].Size = l.Size
	}
	return out, nil
}

// lister is the process that looks into traces: of the runs that fit the start best
// it prints the chunks, each once.
func lister() error {
	var o listOrder
	if err := json.NewDecoder(os.Stdin).Decode(&o); err != nil {
		return err
	}
	t, err := fleet.Merge(o.Manifest, o.Traces)
	if err != nil {
		return err
	}
	best := 1
	for _, r := range t.Runs {
		best = max(best, o.Start.Fit(r.Command))
	}
	seen := map[chunk.Digest]bool{}
	list := []listed{}
	for _, b := range t.Blocks {
		fits := false
		for i, r := range t.Runs {
			fits = fits || b.By.Has(i) && o.Start.Fit(r.Command) == best
		}
		if !fits || seen[b.Chunk] || len(list) == maxListed {
			continue
		}
		seen[b.Chunk] = true
		list = append(list, listed{b.Chunk.String(), b.Size})
	}
	return json.NewEncoder(os.Stdout).Encode(list)
}
