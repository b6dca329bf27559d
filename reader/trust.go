package reader

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/trust"
)

// Trust is whose word on an image's files is taken before all of it is there.
type Trust string

// The kinds of trust, each with those before it.
const (
	Local      Trust = "local"      // an index made on this node
	Bound      Trust = "bound"      // one whose digest is in the image's manifest
	Signed     Trust = "signed"     // one that a key of Options.Keys has signed
	Repository Trust = "repository" // one that lies beside the image
)

// TrustKinds tells people what there is.
const TrustKinds = "local, bound, signed or repository"

var order = []Trust{Local, Bound, Signed, Repository}

// ParseTrust reads a kind of trust; "" is Repository.
func ParseTrust(s string) (Trust, error) {
	if s == "" {
		return Repository, nil
	}
	if t := Trust(s); slices.Contains(order, t) {
		return t, nil
	}
	return "", fmt.Errorf("index trust %q: want %s", s, TrustKinds)
}

// Allows tells whether an index that takes other to be believed is. What is no
// kind of trust allows nothing, and nothing allows it.
func (t Trust) Allows(other Trust) bool {
	i := slices.Index(order, other)
	return i >= 0 && i <= slices.Index(order, t)
}

// candidate is an index that lies beside an image and may be believed.
type candidate struct {
	*image.Artifact
	trust Trust  // what it takes
	key   string // id of the key that has signed it
}

// considerAll looks at the manifests of artifacts, several at once. It returns those
// that are indexes to be believed, that which takes the least trust first; of those
// that are not, why one is not believed, and what is wrong with the first that is
// wrong.
func considerAll(ctx context.Context, repo *image.Repository, img *image.Image, found []image.Referrer, o Options) (good []candidate, unbelieved, bad error) {
	ctx, cancel := context.WithTimeout(ctx, listTime)
	defer cancel()
	all, errs := make([]candidate, len(found)), make([]error, len(found))
	var g errgroup.Group
	g.SetLimit(considered)
	for i, d := range found {
		g.Go(func() error {
			all[i], errs[i] = consider(ctx, repo, img, d.Descriptor, o)
			return nil
		})
	}
	_ = g.Wait()
	for i, err := range errs {
		switch {
		case err == nil:
			good = append(good, all[i])
		case errors.Is(err, ErrNoIndex):
			unbelieved = err
		case bad == nil || useless(bad) && !useless(err):
			bad = err
		}
	}
	slices.SortStableFunc(good, func(a, b candidate) int {
		return cmp.Compare(slices.Index(order, a.trust), slices.Index(order, b.trust))
	})
	return good, unbelieved, bad
}

// consider looks at the manifest of an artifact. If it is an index that is not
// believed, the error is ErrNoIndex.
func consider(ctx context.Context, repo *image.Repository, img *image.Image, d image.Descriptor, o Options) (c candidate, err error) {
	if c.Artifact, err = repo.Artifact(ctx, d, img.ManifestDigest); err != nil {
		return c, err
	}
	l := c.Layers
	if len(l) < 1 || len(l) > 2 || l[0].MediaType != IndexMediaType || len(l) == 2 && l[1].MediaType != SideMediaType {
		return c, index.Errorf(index.ErrUnsupported, d.Digest, -1, "an index of other parts than %s and %s", IndexMediaType, SideMediaType)
	}
	if c.key, err = o.Keys.Verify(statement(img.ManifestDigest, l), c.Annotations); err != nil {
		return c, index.Errorf(index.ErrCorrupt, "artifact "+d.Digest, -1, "%w", err)
	}
	switch {
	case img.Annotations[BoundIndex] == l[0].Digest:
		c.trust = Bound
	case c.key != "":
		c.trust = Signed
	default:
		c.trust = Repository
	}
	if !o.Trust.Allows(c.trust) {
		return c, fmt.Errorf("%s: %w", img.ManifestDigest, needsTrust{c.trust, o.Trust})
	}
	return c, nil
}

// needsTrust is ErrNoIndex where there is one, which takes more trust than is given.
type needsTrust struct{ takes, given Trust }

func (n needsTrust) Error() string {
	return fmt.Sprintf("the index beside the image takes --index-trust %s, and %s is given", n.takes, n.given)
}
func (n needsTrust) Is(target error) bool { return target == ErrNoIndex }

// statement is what a signature of an artifact with these layers is of.
func statement(manifest string, layers []image.Descriptor) trust.Statement {
	s := trust.Statement{Manifest: manifest, Index: layers[0].Digest}
	if len(layers) > 1 {
		s.Side = layers[1].Digest
	}
	return s
}

func sign(s trust.Statement, signers []*trust.Signer) (map[string]string, error) {
	signatures := map[string]string{}
	for _, by := range signers {
		name, value, err := by.Sign(s)
		if err != nil {
			return nil, err
		}
		signatures[name] = value
	}
	return signatures, nil
}
