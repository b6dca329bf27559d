package image

import (
	"cmp"
	"context"
	"errors"
	"io"
	"slices"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/retry"
)

// Image is one image for one platform, as its manifest and configuration
// describe it.
type Image struct {
	Ref            Ref    // as asked for
	ManifestDigest string // of ManifestBytes
	MediaType      string // of ManifestBytes
	ManifestBytes  []byte
	Annotations    map[string]string // of the manifest
	Layers         []Descriptor      // lowest first
	ConfigBlob     Descriptor
	Within         []string // digests of the indexes that lead to it, the outermost first

	// Set by Resolve and LoadConfig, not by ResolveManifest.
	ConfigBytes []byte
	Config      Config
	Platform    Platform // from the configuration, else from the index

	want   Platform
	inline []byte // the configuration, if the manifest brings it along
}

// Resolve fetches and verifies the manifest and the configuration of the
// repository's reference. From an index it picks the platform. Errors wrap
// blob.ErrNotFound, blob.ErrUnauthorized, ErrNotImage, ErrPlatform, ErrCorrupt,
// ErrUnsupported or ErrLimit.
func (r *Repository) Resolve(ctx context.Context, platform Platform) (*Image, error) {
	img, err := r.ResolveManifest(ctx, platform)
	if err != nil {
		return nil, err
	}
	return img, r.LoadConfig(ctx, img)
}

// ResolveManifest is Resolve without the configuration, for callers that have
// something to fetch while LoadConfig is under way.
func (r *Repository) ResolveManifest(ctx context.Context, platform Platform) (*Image, error) {
	m, err := r.Manifest(ctx, "")
	if err != nil {
		return nil, err
	}
	s := search{repo: r, want: platform.normal(), left: maxNested}
	return s.visit(ctx, r.ref.String(), m, nil, maxDepth)
}

// LoadConfig fetches and verifies the configuration of an image that
// ResolveManifest returned.
func (r *Repository) LoadConfig(ctx context.Context, img *Image) error {
	d := img.ConfigBlob
	name := "config " + d.Digest
	if d.Size > r.opts.ConfigLimit {
		return overLimit(name, "configuration", r.opts.ConfigLimit)
	}
	p := img.inline
	if checkBytes(d, p) != nil {
		var err error
		if p, err = r.small(ctx, d); err != nil {
			return err
		}
	}
	c, err := parseConfig(name, p)
	if err != nil {
		return err
	}
	has := c.Platform
	if has.OS == "" || has.Architecture == "" {
		has = img.Platform
	}
	if has.OS != "" && has.Architecture != "" && has.rank(img.want) == 0 {
		// An index may know the variant better than the configuration does.
		if img.Platform.rank(img.want) == 0 || has.OS != img.Platform.OS || has.Architecture != img.Platform.Architecture {
			return &PlatformError{Name: img.Ref.String(), Want: img.want, Available: []Platform{has}}
		}
	}
	img.ConfigBytes, img.Config, img.Platform = p, c, has
	return nil
}

// small fetches a whole blob whose size the caller has bounded, from whoever has
// it right.
func (r *Repository) small(ctx context.Context, d Descriptor) ([]byte, error) {
	if d.Size == 0 {
		return nil, checkBytes(d, nil)
	}
	var wrong error
	for sources := []blob.Source{retry.New(r.store, retry.Policy{})}; len(sources) > 0; sources = sources[1:] {
		body, err := sources[0].Range(ctx, d.Ref(), 0, d.Size)
		if err != nil {
			return nil, cmp.Or(wrong, err)
		}
		p := make([]byte, d.Size)
		_, err = io.ReadFull(body, p)
		body.Close()
		if err == nil {
			err = checkBytes(d, p)
		}
		switch {
		case err == nil:
			return p, nil
		case !errors.Is(err, ErrCorrupt):
			return nil, cmp.Or(wrong, err)
		case wrong == nil:
			wrong = err
			sources = append(sources, blob.Reject(body)...)
		default:
			blob.Reject(body)
		}
	}
	return nil, wrong
}

// search looks for the image of a platform in an index of indexes.
type search struct {
	repo *Repository
	want Platform
	left int        // manifests that may still be fetched
	seen []Platform // what there was instead
}

// visit returns the image that m is or leads to. from is its entry in an
// index, nil for the first.
func (s *search) visit(ctx context.Context, name string, m Manifest, from *entry, depth int) (*Image, error) {
	doc, err := parseDocument(name, m.MediaType, m.Bytes)
	if err != nil {
		return nil, err
	}
	if isManifest(doc.MediaType) {
		if err := doc.checkImage(name); err != nil {
			return nil, err
		}
		return s.image(m, doc, from), nil
	}
	if depth == 0 {
		return nil, overLimitN(name, "indexes in indexes", maxDepth)
	}
	for _, e := range s.order(doc) {
		if s.left--; s.left < 0 {
			return nil, overLimitN(name, "manifests looked at", maxNested)
		}
		if e.Size > s.repo.opts.ManifestLimit {
			return nil, overManifestLimit("manifest "+e.Digest, "manifest", s.repo.opts.ManifestLimit)
		}
		child, err := s.repo.Manifest(ctx, e.Digest)
		if err != nil {
			return nil, err
		}
		if int64(len(child.Bytes)) != e.Size {
			return nil, corrupt("manifest "+e.Digest, "it has %d bytes, expected %d", len(child.Bytes), e.Size)
		}
		child.MediaType = e.MediaType // which is bound by the index's digest, as the Content-Type is not
		img, err := s.visit(ctx, e.Digest, child, &e, depth-1)
		if _, wrong := err.(*PlatformError); wrong && len(doc.Manifests) > 1 {
			continue
		}
		if img != nil {
			img.Within = append([]string{m.Digest}, img.Within...)
		}
		return img, err
	}
	if len(doc.Manifests) > 0 && len(s.seen) == 0 {
		return nil, &NotImageError{name, "index of " + printable(firstNonEmpty(doc.ArtifactType, doc.Manifests[0].ArtifactType, doc.Manifests[0].MediaType))}
	}
	return nil, &PlatformError{Name: s.repo.ref.String(), Want: s.want, Available: s.seen}
}

// order returns the entries worth a look, best first: images for the platform
// by how well they fit, then nested indexes that do not tell their platform,
// then a single image that does not.
func (s *search) order(doc *document) []entry {
	type ranked struct {
		entry
		rank, features int
	}
	var fit []ranked
	var open []entry
	for _, e := range doc.Manifests {
		if !isIndex(e.MediaType) && !isManifest(e.MediaType) {
			continue
		}
		p := e.Platform
		if p == nil {
			if isIndex(e.MediaType) || len(doc.Manifests) == 1 {
				open = append(open, e)
			}
			continue
		}
		if p.OS == "unknown" { // attestations
			continue
		}
		usable := !slices.ContainsFunc(p.OSFeatures, func(f string) bool { return !slices.Contains(s.repo.opts.Features, f) })
		if rank := p.rank(s.want); rank > 0 && usable {
			fit = append(fit, ranked{e, rank, len(p.OSFeatures)})
		} else if !slices.Contains(s.seen, p.Platform) && len(s.seen) < 100 {
			s.seen = append(s.seen, Platform{printable(p.OS), printable(p.Architecture), printable(p.Variant)})
		}
	}
	slices.SortStableFunc(fit, func(a, b ranked) int {
		if a.rank != b.rank {
			return b.rank - a.rank
		}
		if a.artifact() != b.artifact() { // what lies beside an image is for its platform, too
			if a.artifact() {
				return 1
			}
			return -1
		}
		return b.features - a.features
	})
	best := make([]entry, 0, len(fit)+len(open))
	for _, f := range fit {
		best = append(best, f.entry)
	}
	return append(best, open...)
}

func (s *search) image(m Manifest, doc *document, from *entry) *Image {
	img := &Image{
		Ref: s.repo.ref, ManifestDigest: m.Digest, MediaType: doc.MediaType, ManifestBytes: m.Bytes,
		Annotations: doc.Annotations, ConfigBlob: doc.Config.Descriptor,
		want: s.want, inline: doc.Config.Data,
	}
	for _, l := range doc.Layers {
		img.Layers = append(img.Layers, l.Descriptor)
	}
	if from != nil && from.Platform != nil {
		img.Platform = from.Platform.Platform
	}
	return img
}

func firstNonEmpty(all ...string) string {
	for _, s := range all {
		if s != "" {
			return s
		}
	}
	return ""
}
