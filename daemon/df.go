package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/link"
	"github.com/shale-image/shale/pool"
	"github.com/shale-image/shale/replace"
)

// Disk is the result of Df.
type Disk struct {
	Images []ImageDisk `json:"images"`
	Pool   pool.Usage  `json:"pool"`
}

// ImageDisk is what of an image is on the node; bytes are those of its chunks.
type ImageDisk struct {
	Refs           []string `json:"refs"`
	ManifestDigest string   `json:"manifest_digest"`
	Platform       string   `json:"platform"`
	ContentBytes   int64    `json:"content_bytes"` // of all chunks
	PresentBytes   int64    `json:"present_bytes"` // of those that are here
	SharedBytes    int64    `json:"shared_bytes"`  // of these, what another image refers to, too
	Complete       bool     `json:"complete"`      // it needs no registry
	Pinned         bool     `json:"pinned"`
	InUse          bool     `json:"in_use"` // mounted, or being pulled
}

// Df tells what the node's images take.
func (c *Client) Df(ctx context.Context) (*Disk, error) {
	var out Disk
	if _, err := c.call(ctx, "df", nil, &out, nil); err != nil {
		return nil, err
	}
	return &out, nil
}

// Pinned is the result of Pin.
type Pinned struct {
	Ref    string   `json:"ref"`
	Images []string `json:"images"` // manifest digests: one for each platform that the node has
	Pinned bool     `json:"pinned"`
}

// Pin says that what is here of an image must not be evicted or pruned, or that it
// may. An image that the node does not know is blob.ErrNotFound.
func (c *Client) Pin(ctx context.Context, ref string, pinned bool) (*Pinned, error) {
	var out Pinned
	if _, err := c.call(ctx, "pin", pinArgs{ref, pinned}, &out, nil); err != nil {
		return nil, err
	}
	return &out, nil
}

type pinArgs struct {
	Ref    string `json:"ref"`
	Pinned bool   `json:"pinned"`
}

// Pruned is the result of Prune.
type Pruned struct {
	Refs       []string `json:"refs"`   // names that are no more
	Images     []string `json:"images"` // manifest digests of images that are no more
	FreedBytes int64    `json:"freed_bytes"`
}

// Prune removes images without a name, and with all those too that are not in use or
// pinned, and frees what none refers to.
func (c *Client) Prune(ctx context.Context, all bool) (*Pruned, error) {
	var out Pruned
	if _, err := c.call(ctx, "prune", pruneArgs{all}, &out, nil); err != nil {
		return nil, err
	}
	return &out, nil
}

type pruneArgs struct {
	All bool `json:"all"`
}

// WaitComplete returns when all of an image is on the node, by its manifest digest.
// If nothing fetches the rest it is blob.ErrNotFound, and says why. Progress is of
// bytes of content.
func (c *Client) WaitComplete(ctx context.Context, digest string, progress func(Progress)) error {
	_, err := c.call(ctx, "complete", completeArgs{digest}, nil, progress)
	return err
}

type completeArgs struct {
	ManifestDigest string `json:"manifest_digest"`
}

// df adds up what images take.
func (s *store) df() (*Disk, error) {
	out := &Disk{Images: []ImageDisk{}, Pool: s.pool.Usage()}
	var (
		once, twice pool.References
		open        []*link.Image
	)
	defer func() {
		for _, l := range open {
			l.Close()
		}
	}()
	for _, im := range s.list() {
		l, err := s.link(&record{ManifestDigest: im.ManifestDigest})
		if err != nil {
			continue // it is damaged, and linked again when it is used
		}
		open = append(open, l)
		out.Images = append(out.Images, ImageDisk{
			Refs: im.Refs, ManifestDigest: im.ManifestDigest, Platform: im.Platform,
			Pinned: s.pinned(im.ManifestDigest),
		})
		err = l.EachChunk(func(segment uint32, off, n int64) error {
			if once.Has(segment, off) {
				return twice.Add(segment, off, n)
			}
			return once.Add(segment, off, n)
		})
		if err != nil {
			return nil, err
		}
	}
	for i, l := range open {
		d := &out.Images[i]
		err := l.EachChunk(func(segment uint32, off, n int64) error {
			d.ContentBytes += n
			if seg, ok := s.pool.Segment(segment); ok && seg.Present(off, n) {
				d.PresentBytes += n
				if twice.Has(segment, off) {
					d.SharedBytes += n
				}
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
		d.Complete = d.PresentBytes == d.ContentBytes
	}
	for _, l := range open { // we have their files open, too
		l.Close()
	}
	open = nil
	for i := range out.Images {
		d := &out.Images[i]
		d.InUse = s.unused(d.ManifestDigest) != nil
	}
	return out, nil
}

// pin pins the images of a reference.
func (s *store) pin(ctx context.Context, a pinArgs) (*Pinned, error) {
	ref, err := image.ParseRef(a.Ref)
	if err != nil {
		return nil, err
	}
	out := &Pinned{Ref: ref.String(), Pinned: a.Pinned}
	s.mu.Lock()
	for key, digest := range maps.All(s.names) {
		if name, _, _ := splitKey(key); name == out.Ref {
			out.Images = append(out.Images, digest)
		}
	}
	s.mu.Unlock()
	slices.Sort(out.Images)
	out.Images = slices.Compact(out.Images)
	if len(out.Images) == 0 {
		return nil, fmt.Errorf("%s: the node knows no such image: %w", ref, blob.ErrNotFound)
	}
	// Not while something is evicted: what is here when this returns stays.
	s.cache.guard.Lock()
	defer s.cache.guard.Unlock()
	for _, digest := range out.Images {
		if a.Pinned {
			err = replace.File(filepath.Join(s.path(digest), pinnedFile), nil, 0o600)
		} else {
			err = s.unpin(digest)
		}
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}

func (s *store) unpin(digest string) error {
	err := os.Remove(filepath.Join(s.path(digest), pinnedFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// completeLook is how often waitComplete looks.
const completeLook = 200 * time.Millisecond

// waitComplete returns when all of an image is here.
func (s *server) waitComplete(ctx context.Context, digest string, progress func(Progress)) error {
	if !reDigest.MatchString(digest) {
		return fmt.Errorf("digest %q: %w", digest, blob.ErrNotFound)
	}
	l, err := s.store.link(&record{ManifestDigest: digest})
	if err != nil {
		return err
	}
	defer l.Close()
	for {
		coming, why := s.coming(digest) // first: what comes until then is seen
		here, all, err := s.store.present(l)
		if err != nil {
			return err
		}
		if here == all {
			return nil
		}
		if !coming {
			return fmt.Errorf("%s: %d of %d bytes are here, and %s: %w", digest, here, all, why, blob.ErrNotFound)
		}
		progress(Progress{Done: here, Total: all})
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(completeLook):
		}
	}
}

// coming tells whether an image may become complete by itself, or why not.
func (s *server) coming(digest string) (bool, string) {
	s.store.mu.Lock()
	calls := s.store.uses[digest] // that use it, when mounts are subtracted
	s.store.mu.Unlock()
	why := "it is neither mounted nor being pulled"
	for _, m := range s.all() {
		if m.use.ManifestDigest != digest {
			continue
		}
		calls--
		coming, reason := m.rest.coming()
		if coming {
			return true, ""
		}
		why = reason
	}
	return calls > 0, why
}

// present tells how many bytes of an image are here, and of how many.
func (s *store) present(l *link.Image) (here, all int64, err error) {
	err = l.EachChunk(func(segment uint32, off, n int64) error {
		all += n
		if seg, ok := s.pool.Segment(segment); ok && seg.Present(off, n) {
			here += n
		}
		return nil
	})
	return here, all, err
}
