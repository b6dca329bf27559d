package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/shale-image/shale/link"
	"github.com/shale-image/shale/pool"
)

// Checked is the result of Fsck.
type Checked struct {
	pool.Verified
	Images   int            `json:"images"`
	Problems []pool.Problem `json:"problems"`       // of the pool
	Bad      []ImageProblem `json:"image_problems"` // of what is linked
	Repaired bool           `json:"repaired"`       // what is bad was dropped, and is made or fetched again
}

// ImageProblem is what is wrong with a linked image.
type ImageProblem struct {
	ManifestDigest string `json:"manifest_digest"`
	Error          string `json:"error"`
}

// Fsck checks what a node keeps while no service runs on root, else it is ErrBusy:
// the tables of the pool, every chunk that is here, and the linked images. With repair
// it drops what is bad; then nothing may be mounted. It asks no registry.
func Fsck(ctx context.Context, root string, repair bool) (_ *Checked, err error) {
	if _, err := os.Stat(root); err != nil {
		return nil, err
	}
	lock, err := lockRoot(root)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	out := &Checked{Problems: []pool.Problem{}, Bad: []ImageProblem{}, Repaired: repair}
	if _, err := os.Stat(poolDir(root)); errors.Is(err, fs.ErrNotExist) {
		return out, nil
	}
	s := &store{dir: filepath.Join(root, "images"), poolDir: poolDir(root), log: slog.New(slog.DiscardHandler)}
	digests, err := s.digests()
	if err != nil {
		return nil, err
	}
	if repair {
		for _, digest := range digests {
			if mountedElsewhere(s.meta(digest)) {
				return nil, fmt.Errorf("%s is mounted: %w", digest, ErrBusy)
			}
		}
	}
	tell := func(p pool.Problem) { out.Problems = append(out.Problems, p) }
	open := pool.OpenTables
	if repair {
		open = pool.Open
	} else if out.Verified, err = pool.Check(ctx, s.poolDir, tell); err != nil {
		return nil, err
	}
	p, err := open(s.poolDir)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, p.Close()) }()
	if repair {
		for _, damage := range p.Damage() { // set aside already
			tell(pool.Problem{Offset: -1, Error: damage.Error(), Dropped: true})
		}
		if out.Verified, err = p.Verify(ctx, pool.KeepNone, nil, tell); err != nil {
			return nil, err
		}
	}
	for _, digest := range digests {
		dir := s.path(digest)
		if _, err := os.Stat(filepath.Join(dir, "record")); err != nil {
			continue // it is nobody's, and removed when the service starts
		}
		out.Images++
		bad := checkLinked(s, p, digest)
		if bad == nil {
			continue
		}
		out.Bad = append(out.Bad, ImageProblem{digest, bad.Error()})
		if repair { // then it is indexed and linked again when it is used
			if err := os.Remove(filepath.Join(dir, "record")); err != nil {
				return nil, err
			}
		}
	}
	return out, nil
}

// checkLinked returns what is wrong with what is kept of an image.
func checkLinked(s *store, p *pool.Pool, digest string) error {
	if _, err := s.load(digest); err != nil {
		return err
	}
	l, err := link.Open(filepath.Join(s.path(digest), "linked"))
	if err != nil {
		return err
	}
	defer l.Close()
	for _, seg := range l.Segments {
		if have, ok := p.Segment(seg.ID); !ok || have.Size != seg.Size {
			return fmt.Errorf("it refers to segment %08x of %d bytes, which the pool does not have", seg.ID, seg.Size)
		}
	}
	return nil
}
