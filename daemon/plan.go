package daemon

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/pool"
	"github.com/shale-image/shale/reader"
)

// Plan is what it will cost to start an image on this node, in bytes.
type Plan struct {
	Ref            string       `json:"ref"`
	ManifestDigest string       `json:"manifest_digest"`
	Known          bool         `json:"known"`                 // the node has its index
	Lazy           bool         `json:"lazy"`                  // it starts before its data is here
	Index          reader.Kind  `json:"index,omitempty"`       // kind of its index
	IndexTrust     reader.Trust `json:"index_trust,omitempty"` // what it takes to believe it
	LayerBytes     int64        `json:"layer_bytes"`           // all that the registry has of it
	MetadataBytes  int64        `json:"metadata_bytes"`        // stored, fetched before the start
	ContentBytes   int64        `json:"content_bytes"`         // of all chunks of its files
	HereBytes      int64        `json:"here_bytes"`            // of them, on this node already
	FetchBytes     int64        `json:"fetch_bytes"`           // stored bytes that are not here, all in all
	StartBytes     int64        `json:"start_bytes"`           // of them, fetched before it starts
}

// Plan tells what the first start of an image will cost. Only its manifest and
// its index are fetched, and nothing is kept.
func (c *Client) Plan(ctx context.Context, s Source) (*Plan, error) {
	var out Plan
	err := s.whenAsked(ctx, func() error {
		_, err := c.call(ctx, "plan", s, &out, nil)
		return err
	})
	if err != nil {
		return nil, err
	}
	return &out, nil
}

func (s *server) plan(ctx context.Context, src Source) (*Plan, error) {
	ref, err := image.ParseRef(src.Ref)
	if err != nil {
		return nil, err
	}
	var platform image.Platform
	if src.Platform != "" {
		if platform, err = image.ParsePlatform(src.Platform); err != nil {
			return nil, err
		}
	}
	st := s.store
	trust, err := reader.ParseTrust(cmp.Or(src.IndexTrust, st.indexTrust()))
	if err != nil {
		return nil, err
	}
	if src.Unasked {
		return nil, fmt.Errorf("%s: %w: %w", ref, ErrUnasked, blob.ErrNotFound)
	}
	repo, err := image.Open(ctx, ref, st.options(ref, src))
	if err != nil {
		return nil, err
	}
	defer repo.Close()
	img, err := repo.ResolveManifest(ctx, platform)
	if err != nil {
		return nil, err
	}
	p := &Plan{Ref: src.Ref, ManifestDigest: img.ManifestDigest}
	for _, l := range img.Layers {
		p.LayerBytes += l.Size
	}
	if rec, err := st.load(img.ManifestDigest); err == nil && st.believed(rec, trust) {
		return p, s.planKnown(rec, p)
	}
	tmp, err := os.MkdirTemp(st.dir, ".plan-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp)
	raw, err := reader.Fetch(ctx, repo, img, reader.Options{TempDir: tmp, Trust: trust, Keys: st.cfg.Keys(), Limits: st.limits()})
	if errors.Is(err, reader.ErrNoIndex) {
		p.FetchBytes, p.StartBytes = p.LayerBytes, p.LayerBytes
		return p, nil
	}
	if err != nil {
		return nil, err
	}
	defer raw.Close()
	js, err := ask(ctx, "shale-planner", order{Raw: *raw, Pool: st.poolDir}, raw.File)
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(js, p); err != nil {
		return nil, err
	}
	p.Lazy, p.Index, p.IndexTrust, p.MetadataBytes = true, raw.Kind, raw.Trust, raw.Stored
	p.StartBytes = p.MetadataBytes
	p.FetchBytes += p.MetadataBytes
	return p, nil
}

// planKnown is plan of an image that the node has linked.
func (s *server) planKnown(rec *record, p *Plan) error {
	l, err := s.store.link(rec)
	if err != nil {
		return err
	}
	im, err := s.engine.Open(l, nil)
	if err != nil {
		return err
	}
	defer im.Close()
	m := im.Missing()
	p.Known, p.Lazy, p.IndexTrust = true, true, rec.Index
	p.ContentBytes, p.FetchBytes = im.ContentBytes(), m.Stored
	p.HereBytes = p.ContentBytes - m.Content
	return nil
}

// planner is the process that reads an index to see what of it is here.
func planner() error {
	o, pl, err := readOrder()
	if err != nil {
		return err
	}
	defer pl.Close()
	t, err := o.Raw.Tree()
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(cost(t, pl, o.Raw.Fetched))
}

// cost adds up the chunks of a tree, each once. Blobs that had to be fetched for the
// index are not counted again.
func cost(t *index.Tree, pl *pool.Pool, fetched func(blob int) bool) (p struct {
	ContentBytes int64 `json:"content_bytes"`
	HereBytes    int64 `json:"here_bytes"`
	FetchBytes   int64 `json:"fetch_bytes"`
}) {
	seen := map[chunk.Digest]bool{}
	var wanted []pool.Entry
	var chunks []*index.Chunk
	t.Walk(func(_ string, ino *index.Inode) error {
		for _, e := range ino.Extents {
			if c := &t.Chunks[e.Chunk]; !seen[c.Digest] {
				seen[c.Digest] = true
				wanted, chunks = append(wanted, pool.Entry{Digest: c.Digest, Size: c.Size}), append(chunks, c)
			}
		}
		return nil
	})
	for i, s := range pl.Lookup(wanted) {
		c := chunks[i]
		p.ContentBytes += int64(c.Size)
		if s != nil && s.Present(wanted[i].Off, int64(c.Size)) {
			p.HereBytes += int64(c.Size)
			continue
		}
		if !fetched(int(c.Blob)) {
			p.FetchBytes += t.StoredShare(c)
		}
	}
	return p
}
