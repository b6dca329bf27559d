package image

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"regexp"
	"strings"
	"time"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/retry"
)

// Artifact is something that belongs to an image and lies beside it in its
// repository: a signature, a list of contents, an index. Its manifest names the
// image as its subject; the image knows nothing of it.
type Artifact struct {
	Type          string            // artifactType, else the type of the configuration
	Layers        []Descriptor      // at least a type, a digest and a size each; not fetched
	Annotations   map[string]string // of the manifest
	Digest        string            // of ManifestBytes
	ManifestBytes []byte
}

const (
	mediaTypeEmpty = "application/vnd.oci.empty.v1+json"
	emptyJSON      = "{}" // the one object of that type

	referrersTime = 2 * time.Minute // for a list, with all its pages and retries
)

// reMediaType is RFC 6838, section 4.2.
var reMediaType = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}$`)

// Referrer is what refers to a manifest, as a list has it.
type Referrer struct {
	Descriptor
	Type string // artifactType, else the type of the configuration; "" if the list does not tell and nobody asked
}

// Referrers lists the manifests whose subject is the manifest with a digest, in
// no particular order, each once: those of some artifact types, or all if none is
// given. Annotations are those of the manifests. There being none is no error.
//
// Where a registry has no API for that, or a layout is read, the list is the
// index tagged sha256-<hex>; in a layout also any other manifest that is in
// index.json or in an index there. So it is where the API fails, if that index
// lists something. A mirror counts only if it lists something.
//
// A list is the registry's word and not bound by any digest: Artifact checks
// what it leads to. One that is too long is ErrLimit.
func (r *Repository) Referrers(ctx context.Context, subject string, types ...string) ([]Referrer, error) {
	if !reDigest.MatchString(subject) {
		return nil, fmt.Errorf("referrers of %.100q: not a sha256 digest", subject)
	}
	parent := ctx
	ctx, cancel := context.WithTimeout(ctx, referrersTime)
	defer cancel()
	var list []Referrer
	err := retry.Do(ctx, retry.Policy{Attempts: 4, Total: requestTime}, func(ctx context.Context) (err error) {
		list, err = r.store.referrers(ctx, subject, types)
		return err
	})
	if err != nil && ctx.Err() != nil && parent.Err() == nil {
		err = fmt.Errorf("%w: no complete answer within %v", blob.ErrUnavailable, referrersTime)
	}
	if err != nil {
		return nil, fmt.Errorf("referrers of %s: %w", subject, err)
	}
	return list, nil
}

// Artifact fetches the manifest of one of the Referrers of subject, a digest,
// and verifies it. One that refers to something else is ErrCorrupt; a referrer
// that is no manifest with layers is ErrUnsupported or ErrNotImage.
func (r *Repository) Artifact(ctx context.Context, d Descriptor, subject string) (*Artifact, error) {
	name := "artifact " + printable(d.Digest)
	if !reDigest.MatchString(d.Digest) || !reDigest.MatchString(subject) {
		return nil, fmt.Errorf("%s of %.100q: not a sha256 digest", name, subject)
	}
	if d.Size > r.opts.ManifestLimit {
		return nil, overManifestLimit(name, "manifest", r.opts.ManifestLimit)
	}
	m, err := r.Manifest(ctx, d.Digest)
	if err != nil {
		return nil, err
	}
	if int64(len(m.Bytes)) != d.Size {
		return nil, corrupt(name, "it has %d bytes, expected %d", len(m.Bytes), d.Size)
	}
	return parseArtifact(name, d.MediaType, m, subject)
}

// BoundArtifact fetches an artifact that a manifest names by its digest; it names
// no subject itself. Errors are those of Artifact.
func (r *Repository) BoundArtifact(ctx context.Context, digest string) (*Artifact, error) {
	name := "artifact " + printable(digest)
	if !reDigest.MatchString(digest) {
		return nil, corrupt(name, "not a sha256 digest")
	}
	m, err := r.Manifest(ctx, digest)
	if err != nil {
		return nil, err
	}
	return parseArtifact(name, m.MediaType, m, "")
}

func parseArtifact(name, mediaType string, m Manifest, subject string) (*Artifact, error) {
	doc, err := parseDocument(name, mediaType, m.Bytes)
	if err != nil {
		return nil, err
	}
	if doc.MediaType != MediaTypeManifest {
		return nil, unsupported(name, "an artifact in the form of %q", printable(doc.MediaType))
	}
	ref, err := parseReferrer(name, m.Bytes)
	if err != nil {
		return nil, err
	}
	if ref.subject != subject {
		return nil, corrupt(name, "its subject is %.100q, expected %s", ref.subject, subject)
	}
	if ref.artifactType == "" {
		return nil, corrupt(name, "neither it nor its configuration has a type")
	}
	a := &Artifact{Type: ref.artifactType, Annotations: doc.Annotations, Digest: m.Digest, ManifestBytes: m.Bytes}
	for i, l := range doc.Layers {
		if l.MediaType == "" {
			return nil, corrupt(name, "layer %d has no media type", i)
		}
		a.Layers = append(a.Layers, l.Descriptor)
	}
	return a, nil
}

// PushArtifact stores an artifact that refers to subject, a manifest or an
// index, and returns its digest. Its layers are there already (PushBlob). The
// same arguments make the same bytes, and pushing them again changes nothing.
//
// Those of the same type for which replaces is true leave the list; nil keeps
// them all. Their manifests stay where the list is an index (see Referrers). A
// registry that lists artifacts by itself is asked to delete them; if it does not
// let us, it keeps all. Pushers at the same time, here and elsewhere, do not lose each other's
// artifacts, nor replace them: only what was there before leaves.
func (r *Repository) PushArtifact(ctx context.Context, subject Descriptor, artifactType string, layers []Descriptor, annotations map[string]string, replaces func(Descriptor) bool) (digest string, err error) {
	f, err := newReferral(subject, artifactType, layers, annotations)
	if err != nil {
		return "", fmt.Errorf("push artifact: %w", err)
	}
	f.replaces, f.limit = replaces, r.opts.ManifestLimit
	if f.d.Size > f.limit {
		return "", overManifestLimit("push artifact "+f.d.Digest, "manifest", f.limit)
	}
	open := func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader(emptyJSON)), nil }
	if err := r.PushBlob(ctx, emptyDescriptor(), open); err != nil {
		return "", err
	}
	err = retry.Do(ctx, retry.Policy{Attempts: 4}, func(ctx context.Context) error { return r.store.attach(ctx, f) })
	if err != nil {
		return "", fmt.Errorf("push artifact %s: %w", f.d.Digest, err)
	}
	return f.d.Digest, nil
}

func emptyDescriptor() Descriptor {
	return Descriptor{MediaType: mediaTypeEmpty, Digest: digestOf([]byte(emptyJSON)), Size: int64(len(emptyJSON))}
}

// newReferral makes the manifest of an artifact.
func newReferral(subject Descriptor, artifactType string, layers []Descriptor, annotations map[string]string) (*referral, error) {
	if !isManifest(subject.MediaType) && !isIndex(subject.MediaType) {
		return nil, fmt.Errorf("its subject is a %.100q, expected a manifest or an index", subject.MediaType)
	}
	if !reMediaType.MatchString(artifactType) {
		return nil, fmt.Errorf("%.100q is not a media type", artifactType)
	}
	if len(layers) == 0 { // as the specification wants it
		layers = []Descriptor{emptyDescriptor()}
	}
	for i, d := range append([]Descriptor{subject}, layers...) {
		if !reDigest.MatchString(d.Digest) || d.Size < 0 || !reMediaType.MatchString(d.MediaType) {
			return nil, fmt.Errorf("descriptor %d (0 is the subject): digest %.100q, size %d, type %.100q", i, d.Digest, d.Size, d.MediaType)
		}
	}
	subject.Annotations = nil // about its place elsewhere, such as a tag
	p, err := json.Marshal(struct {
		SchemaVersion int               `json:"schemaVersion"`
		MediaType     string            `json:"mediaType"`
		ArtifactType  string            `json:"artifactType"`
		Config        Descriptor        `json:"config"`
		Layers        []Descriptor      `json:"layers"`
		Subject       Descriptor        `json:"subject"`
		Annotations   map[string]string `json:"annotations,omitempty"`
	}{2, MediaTypeManifest, artifactType, emptyDescriptor(), layers, subject, annotations})
	if err != nil {
		return nil, err
	}
	f := &referral{m: Manifest{MediaType: MediaTypeManifest, Digest: digestOf(p), Bytes: p}, subject: subject.Digest, artifactType: artifactType}
	f.d = Descriptor{MediaType: MediaTypeManifest, Digest: f.m.Digest, Size: int64(len(p)), Annotations: annotations}
	return f, nil
}
