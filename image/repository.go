package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/retry"
)

// Options say how to reach a registry. The zero value is good for public ones.
// For a layout or an archive only the limits and Features matter.
type Options struct {
	Credentials Credentials
	Renewal     Renewal // nil if there are no other credentials
	// PlainHTTP lists registries ("host[:port]") to speak to without TLS, in
	// addition to those on this machine (localhost, 127.0.0.0/8, ::1). The
	// latter get TLS too if CAFile is set.
	PlainHTTP []string
	CAFile    string            // PEM certificates to trust in addition to the system's
	Mirrors   []string          // "host[:port]"; asked before the registry, never given credentials
	UserAgent string            // default "shale"
	Transport http.RoundTripper // instead of a shared, tuned one; the caller closes its connections

	// Features lists the os.features that the caller can make use of. An index
	// may offer a platform twice, plain and for those who know a feature; with
	// it in this list the latter is preferred, without it skipped.
	Features []string

	ManifestLimit int64 // bytes of a manifest or index; default 4 MiB
	ConfigLimit   int64 // bytes of a configuration; default 8 MiB
}

const (
	requestTime = 30 * time.Second // for a request with a small answer
	maxDepth    = 4                // of indexes in indexes
	maxNested   = 16               // manifests fetched to find one image
)

// Repository is where the blobs and manifests of an image are: a registry's
// repository or a layout directory. It is safe for concurrent use.
type Repository struct {
	ref   Ref
	opts  Options
	store store
}

// store is what differs between a registry and a directory.
type store interface {
	blob.Source
	// manifest finds a manifest by tag or digest; its content is verified.
	manifest(ctx context.Context, reference string) (Manifest, error)
	// pushBlob calls open only if the bytes are needed.
	pushBlob(ctx context.Context, d Descriptor, open func() (io.ReadCloser, error), mountFrom []string) error
	// pushManifest stores m under its digest and, unless it is empty, a tag.
	pushManifest(ctx context.Context, m Manifest, tag string) error
	// referrers lists what refers to a manifest, of a type unless it is empty.
	referrers(ctx context.Context, subject string, types []string) ([]Referrer, error)
	// attach stores an artifact's manifest and sees to it that it is listed.
	attach(ctx context.Context, f *referral) error
	close() error
}

// Open prepares access to the repository of a reference; it makes no request.
// The caller closes the repository.
func Open(ctx context.Context, ref Ref, opts Options) (*Repository, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if opts.ManifestLimit <= 0 {
		opts.ManifestLimit = 4 << 20
	}
	if opts.ConfigLimit <= 0 {
		opts.ConfigLimit = 8 << 20
	}
	if opts.UserAgent == "" {
		opts.UserAgent = "shale"
	}
	r := &Repository{ref: ref, opts: opts}
	switch {
	case !ref.Writable():
		r.store = newArchive(ref, opts)
	case ref.dir != "":
		r.store = newLayout(ref, opts)
	case ref.registry != "":
		reg, err := newRegistry(ref, opts)
		if err != nil {
			return nil, err
		}
		r.store = reg
	default:
		return nil, fmt.Errorf("open: empty reference")
	}
	return r, nil
}

// Close releases connections and directories. Readers of blobs become invalid.
func (r *Repository) Close() error { return r.store.close() }

// At returns the same repository for another of its manifests. It shares all
// with r, which is closed in its place.
func (r *Repository) At(digest string) *Repository {
	at := *r
	at.ref = r.ref.WithDigest(digest)
	return &at
}

// Ref returns the reference the repository was opened for.
func (r *Repository) Ref() Ref { return r.ref }

// Blobs returns the repository's blobs, as they come: not verified, and each
// request made once. Connections are kept and shared.
func (r *Repository) Blobs() blob.Source { return r.store }

// Blob opens a whole blob. What is read is verified: the reader fails with
// ErrCorrupt, in place of the last byte, if the content is not what the
// descriptor names. Passing faults are retried.
func (r *Repository) Blob(ctx context.Context, d Descriptor) (io.ReadCloser, error) {
	if !reDigest.MatchString(d.Digest) || d.Size < 0 {
		return nil, fmt.Errorf("blob %.100q: size %d, or not a sha256 digest", d.Digest, d.Size)
	}
	if d.Size == 0 { // a range is never empty
		return newVerifier(io.NopCloser(strings.NewReader("")), d), nil
	}
	body, err := retry.New(r.store, retry.Policy{}).Range(ctx, d.Ref(), 0, d.Size)
	if err != nil {
		return nil, err
	}
	return newVerifier(body, d), nil
}

// Spool writes a whole blob, verified, to w at an offset, and returns how much was
// written. If one place gives wrong bytes another one is asked; each of them may be asked
// twice, since what is wrong may have come of two.
func (r *Repository) Spool(ctx context.Context, d Descriptor, w io.WriterAt, at int64) (n int64, err error) {
	for range 2 * (1 + len(r.opts.Mirrors)) {
		var rc io.ReadCloser
		if rc, err = r.Blob(ctx, d); err != nil {
			return n, err
		}
		var m int64
		m, err = io.Copy(io.NewOffsetWriter(w, at), rc)
		rc.Close()
		if n += m; !errors.Is(err, ErrElsewhere) {
			return n, err
		}
	}
	return n, err
}

// Mirrored tells whether blobs can be had in several places, so that wrong ones may
// be right elsewhere (ErrElsewhere).
func (r *Repository) Mirrored() bool { return len(r.opts.Mirrors) > 0 }

// Manifest fetches a manifest or an index of any kind. reference is a tag or
// a digest; "" means that of the Ref.
func (r *Repository) Manifest(ctx context.Context, reference string) (Manifest, error) {
	name := r.ref.String()
	switch {
	case reference == "" && r.ref.digest != "":
		reference = r.ref.digest
	case reference == "" && r.ref.dir != "":
		reference = r.ref.tag // a layout need not have tags
	case reference == "":
		reference = r.ref.Tag()
	default:
		name = reference
		if !reDigest.MatchString(reference) && !reTag.MatchString(reference) {
			return Manifest{}, fmt.Errorf("%.200q is neither a tag nor a sha256 digest", reference)
		}
	}
	var m Manifest
	err := retry.Do(ctx, retry.Policy{Attempts: 4, Total: requestTime}, func(ctx context.Context) (err error) {
		m, err = r.store.manifest(ctx, reference)
		return err
	})
	if err != nil {
		return Manifest{}, fmt.Errorf("%s: %w", name, err)
	}
	return m, nil
}

// PushBlob stores a blob. open is called only if the repository does not have
// it and cannot mount it from one of the repositories of the same registry in
// mountFrom; it may be called again after a passing fault. What it reads is
// verified.
func (r *Repository) PushBlob(ctx context.Context, d Descriptor, open func() (io.ReadCloser, error), mountFrom ...string) error {
	if !reDigest.MatchString(d.Digest) || d.Size < 0 {
		return fmt.Errorf("push blob %.100q: size %d, or not a sha256 digest", d.Digest, d.Size)
	}
	for _, from := range mountFrom {
		if !rePath.MatchString(from) {
			return fmt.Errorf("push blob %s: mount from %.200q: not a repository name", d.Digest, from)
		}
	}
	err := retry.Do(ctx, retry.Policy{Attempts: 4}, func(ctx context.Context) error {
		return r.store.pushBlob(ctx, d, open, mountFrom)
	})
	if err != nil {
		return fmt.Errorf("push blob %s: %w", d.Digest, err)
	}
	return nil
}

// PushManifest stores a manifest or an index whose blobs are already there, and
// returns its descriptor. With an empty tag it is found by its digest only.
func (r *Repository) PushManifest(ctx context.Context, mediaType string, p []byte, tag string) (Descriptor, error) {
	d := Descriptor{MediaType: mediaType, Digest: digestOf(p), Size: int64(len(p))}
	if d.Size > r.opts.ManifestLimit {
		return Descriptor{}, overManifestLimit("push manifest "+d.Digest, "manifest", r.opts.ManifestLimit)
	}
	if tag != "" && !reTag.MatchString(tag) {
		return Descriptor{}, fmt.Errorf("push manifest %s: %.200q is not a tag", d.Digest, tag)
	}
	m := Manifest{MediaType: mediaType, Digest: d.Digest, Bytes: p}
	err := retry.Do(ctx, retry.Policy{Attempts: 4}, func(ctx context.Context) error {
		return r.store.pushManifest(ctx, m, tag)
	})
	if err != nil {
		return Descriptor{}, fmt.Errorf("push manifest %s: %w", d.Digest, err)
	}
	return d, nil
}
