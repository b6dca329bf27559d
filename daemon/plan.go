package daemon

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/link"
	"github.com/shale-image/shale/pool"
	"github.com/shale-image/shale/reader"
)

// Plan is what it will cost to start an image on this node, in bytes. Its manifest
// and config are not counted, nor is what faults cost: requests that are made again.
type Plan struct {
	Ref            string       `json:"ref"`
	ManifestDigest string       `json:"manifest_digest"`
	Known          bool         `json:"known"`                 // the node has its index
	Lazy           bool         `json:"lazy"`                  // it starts before its data is here
	Reason         string       `json:"reason,omitempty"`      // why it does not
	Index          reader.Kind  `json:"index,omitempty"`       // kind of its index
	IndexTrust     reader.Trust `json:"index_trust,omitempty"` // what it takes to believe it
	LayerBytes     int64        `json:"layer_bytes"`           // all that the registry has of it
	MetadataBytes  int64        `json:"metadata_bytes"`        // the index, stored
	ContentBytes   int64        `json:"content_bytes"`         // of all chunks of its files; 0 where no index tells
	HereBytes      int64        `json:"here_bytes"`            // of them, on this node already
	StartBytes     int64        `json:"start_bytes"`           // stored, fetched before it starts: the index, unless it is here, or all layers
	FetchBytes     int64        `json:"fetch_bytes"`           // these, and what is not here, each stored byte once, with its windows
	MostBytes      int64        `json:"most_bytes"`            // bound of that in whatever order it is read: index.Cost
	Layers         []PlanLayer  `json:"layers"`
}

// PlanLayer is what reads of one layer take.
type PlanLayer struct {
	Digest    string `json:"digest"`
	Size      int64  `json:"size"`
	ReadBytes int64  `json:"read_bytes"` // stored, that one read of it waits for at most; 0 if files have nothing of it, or it is here
	Pieces    int    `json:"pieces"`     // that can be decoded alone; 0 if any part can, or no index tells
	OneFrame  bool   `json:"one_frame"`  // it is one zstd frame: whatever is read of it, all comes
}

// planned is what the planner says.
type planned struct {
	ContentBytes int64                 `json:"content_bytes"`
	HereBytes    int64                 `json:"here_bytes"`
	FetchBytes   int64                 `json:"fetch_bytes"`
	MostBytes    int64                 `json:"most_bytes"`
	Blobs        map[string]index.Cost `json:"blobs"` // by digest
}

// Plan tells what the first start of an image will cost. Nothing is asked about what the
// node knows. Of others only manifest and index are fetched, and a byte of a layer, to see
// whether parts can be had; nothing is kept.
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
	platform, err := image.WantedPlatform(src.Platform)
	if err != nil {
		return nil, err
	}
	st := s.store
	trust, err := reader.ParseTrust(cmp.Or(src.IndexTrust, st.indexTrust()))
	if err != nil {
		return nil, err
	}
	if img := st.manifest(ref, src.Platform, platform); img != nil {
		p := newPlan(src, img)
		if known, err := s.planKnown(ctx, img, trust, p); known || err != nil {
			return p, err
		}
	}
	if src.Unasked {
		return nil, fmt.Errorf("%s: %w: %w", ref, ErrUnasked, blob.ErrNotFound)
	}
	repo, err := st.opens(ref, src)(ctx)
	if err != nil {
		return nil, err
	}
	defer repo.Close()
	img, err := repo.ResolveManifest(ctx, platform)
	if err != nil {
		return nil, err
	}
	p := newPlan(src, img)
	if known, err := s.planKnown(ctx, img, trust, p); known || err != nil {
		return p, err
	}
	return p, s.planUnknown(ctx, repo, img, trust, p)
}

func newPlan(src Source, img *image.Image) *Plan {
	p := &Plan{Ref: src.Ref, ManifestDigest: img.ManifestDigest}
	for _, l := range img.Layers {
		p.LayerBytes += l.Size
		p.Layers = append(p.Layers, PlanLayer{Digest: l.Digest, Size: l.Size})
	}
	return p
}

// planKnown is plan of an image that the node has an index of; it returns false if it has
// none that is of use.
func (s *server) planKnown(ctx context.Context, img *image.Image, trust reader.Trust, p *Plan) (known bool, _ error) {
	st := s.store
	// As store.add does.
	rec, err := st.load(img.ManifestDigest)
	if err == nil && rec.Wrong != "" {
		if err := st.usable(rec); err != nil {
			return false, err
		}
	}
	if err == nil && st.believed(rec, trust) && (rec.Doubted == "" || st.unused(rec.ManifestDigest) != nil) {
		dir := filepath.Join(st.path(rec.ManifestDigest), "linked")
		if err = st.planBy(ctx, p, order{Pool: st.poolDir, Dir: dir}, nil); err == nil {
			p.Known, p.Lazy, p.Index, p.IndexTrust, p.MetadataBytes = true, true, rec.Kind, rec.Index, rec.IndexBytes
			if rec.Whole && p.FetchBytes > 0 {
				p.Lazy, p.Reason, p.StartBytes = false, reader.ErrNoRanges.Error(), p.FetchBytes
			}
			return true, nil
		}
		if !stale(err) {
			return false, err
		}
	}
	if raw, err := st.localIndex(img.ManifestDigest, img.Layers); err == nil {
		defer raw.Close()
		if err = st.planBy(ctx, p, order{Raw: *raw, Pool: st.poolDir, Dir: filepath.Join(st.path(img.ManifestDigest), "linked")}, raw.File); !errors.Is(err, index.ErrCorrupt) {
			p.Known, p.Lazy, p.Index, p.IndexTrust, p.MetadataBytes = true, true, raw.Kind, raw.Trust, raw.Size
			return true, err
		}
	}
	return false, nil
}

// manifest is what the node knows of the manifest of an image; nil if it does not.
func (s *store) manifest(ref image.Ref, platform string, want image.Platform) *image.Image {
	s.mu.Lock()
	digest, ok := s.names[nameKey(ref.String(), platform)]
	s.mu.Unlock()
	if !ok {
		digest = s.byDigest(ref, want, s.isComplete)
	}
	if digest == "" {
		return nil
	}
	rec, err := s.loadRecord(digest)
	if err != nil || len(rec.Layers) == 0 {
		return nil
	}
	return &image.Image{Ref: ref, ManifestDigest: digest, Layers: rec.Layers}
}

// planUnknown is plan of an image that the node has no index of.
func (s *server) planUnknown(ctx context.Context, repo *image.Repository, img *image.Image, trust reader.Trust, p *Plan) error {
	st := s.store
	tmp, err := os.MkdirTemp(st.dir, ".plan-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	o := reader.Options{TempDir: tmp, Trust: trust, Keys: st.cfg.Keys(), Limits: st.limits()}
	raw, err := reader.Use(ctx, repo, img, o, func(raw *reader.Raw) error {
		if !reader.HasRanges(ctx, repo, img) {
			return reader.ErrNoRanges
		}
		return st.planBy(ctx, p, order{Raw: *raw, Pool: st.poolDir, Dir: filepath.Join(tmp, "linked")}, raw.File)
	})
	switch {
	case err == nil:
		p.Lazy, p.Index, p.IndexTrust, p.MetadataBytes, p.StartBytes = true, raw.Kind, raw.Trust, raw.Stored, raw.Stored
		p.FetchBytes += raw.Stored
		p.MostBytes += raw.Stored
		return raw.Close()
	case !errors.Is(err, reader.ErrNoRanges) && !errors.Is(err, reader.ErrNoIndex), ctx.Err() != nil:
		return err
	}
	p.Reason = err.Error()
	if trust == reader.Local && errors.Is(err, reader.ErrNoIndex) {
		p.Reason = "only an index of this node's own is believed"
	}
	p.StartBytes, p.FetchBytes, p.MostBytes = p.LayerBytes, p.LayerBytes, p.LayerBytes
	for i := range p.Layers {
		p.Layers[i].ReadBytes = p.Layers[i].Size
	}
	return nil
}

// planBy has the planner read an index, which is file, or a linked image.
func (s *store) planBy(ctx context.Context, p *Plan, o order, file *os.File) error {
	var files []*os.File
	if file != nil {
		files = append(files, file)
	}
	js, err := s.ask(ctx, "shale-planner", o, files...)
	if err != nil {
		return err
	}
	var out planned
	if err := json.Unmarshal(js, &out); err != nil {
		return err
	}
	p.ContentBytes, p.HereBytes, p.FetchBytes, p.MostBytes = out.ContentBytes, out.HereBytes, out.FetchBytes, out.MostBytes
	for i := range p.Layers {
		l := &p.Layers[i]
		c := out.Blobs[l.Digest]
		l.ReadBytes, l.Pieces, l.OneFrame = c.Read, c.Pieces, c.OneFrame
	}
	return nil
}

// planner is the process that reads an index to see what of it is here.
func planner() error {
	o, pl, err := readOrder(firstFile)
	if err != nil {
		return err
	}
	defer pl.Close()
	var t *index.Tree
	var r index.Reads
	if o.Raw.Kind == "" {
		l, err := link.Open(o.Dir)
		if err != nil {
			return err
		}
		defer l.Close()
		t = l.Layout()
		r = index.Reads{Chunks: make([]uint32, len(t.Chunks)), Here: func(n int) bool {
			c := l.Chunk(n)
			at, off := l.Segment(c.Flat)
			s, ok := pl.Segment(at.ID)
			return ok && s.Present(off, int64(c.Size))
		}}
		for i := range r.Chunks {
			r.Chunks[i] = uint32(i)
		}
	} else {
		if t, err = o.Raw.Tree(); err != nil {
			return err
		}
		r = reads(t, pl)
	}
	local := make([]bool, len(t.Blobs))
	for i, b := range t.Blobs {
		_, hex, _ := strings.Cut(b.Digest, ":")
		local[i] = o.Raw.Fetched(i) || o.Raw.Kind == reader.SOCI && i >= len(o.Raw.Layers) // ztocs
		for _, name := range []string{sideDir, ztocDir} {                                  // as newOrigin has it
			_, err := os.Stat(filepath.Join(filepath.Dir(o.Dir), name, hex))
			local[i] = local[i] || err == nil
		}
	}
	r.Local = func(blob uint32) bool { return local[blob] }
	return json.NewEncoder(os.Stdout).Encode(total(t, r))
}

// reads are those of all files of a tree.
func reads(t *index.Tree, pl *pool.Pool) (r index.Reads) {
	seen := map[chunk.Digest]bool{}
	var wanted []pool.Entry
	t.Walk(func(_ string, ino *index.Inode) error {
		for _, e := range ino.Extents {
			if c := &t.Chunks[e.Chunk]; !seen[c.Digest] {
				seen[c.Digest] = true
				wanted, r.Chunks = append(wanted, pool.Entry{Digest: c.Digest, Size: c.Size}), append(r.Chunks, e.Chunk)
			}
		}
		return nil
	})
	found := pl.Lookup(wanted)
	r.Here = func(n int) bool {
		return found[n] != nil && found[n].Present(wanted[n].Off, int64(wanted[n].Size))
	}
	return r
}

// total adds up what reads take.
func total(t *index.Tree, r index.Reads) *planned {
	p := &planned{Blobs: map[string]index.Cost{}}
	for n, x := range r.Chunks {
		p.ContentBytes += int64(t.Chunks[x].Size)
		if r.Here(n) {
			p.HereBytes += int64(t.Chunks[x].Size)
		}
	}
	for i, c := range t.Costs(r) {
		p.FetchBytes += c.Once
		p.MostBytes += c.Most
		p.Blobs[t.Blobs[i].Digest] = c
	}
	return p
}
