// Package image finds images and stores them: references, manifests, platforms
// and blobs, in registries and in OCI layout directories. It is the only
// package that speaks the registry's protocol. It verifies every manifest and
// configuration by digest, and knows nothing of what is in a layer.
//
// A start from a cold client costs one request for the manifest and one for
// the configuration; only a registry that demands it is asked for a token.
package image

import (
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
	"strings"

	"github.com/shale-image/shale/blob"
)

const (
	dockerHub     = "docker.io"
	dockerHubHost = "registry-1.docker.io"
	layoutPrefix  = "oci:"
	archivePrefix = "oci-archive:"
	dockerPrefix  = "docker-archive:"
	maxRef        = 4096 + 256 // a path, a tag and a digest
)

// Ref names an image: in a registry ("debian:12", "localhost:5000/app@sha256:..."),
// in an OCI layout directory ("oci:DIR[:TAG][@sha256:...]"), or in a tar archive
// of one ("oci-archive:FILE[:TAG][@sha256:...]") or of docker save
// ("docker-archive:FILE[:TAG]"). Refs are comparable; the zero Ref names nothing.
type Ref struct {
	registry, repository string // of a registry
	prefix               string // what is not in a registry: how dir is written and read
	dir                  string // of a layout, or the file that is an archive
	tag, digest          string
}

var (
	reHost   = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*$`)
	rePath   = regexp.MustCompile(`^[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*$`)
	reTag    = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$`)
	reDigest = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)
)

// ParseRef parses a reference as users write it. As with Docker, a name without
// a registry is on docker.io, and one without a slash there is in library/.
// What it accepts has no element that is special in a URL or a path ("..", "%").
func ParseRef(s string) (Ref, error) {
	if len(s) > maxRef {
		return Ref{}, fmt.Errorf("reference of %d bytes: longer than %d", len(s), maxRef)
	}
	bad := func(format string, args ...any) (Ref, error) {
		return Ref{}, fmt.Errorf("reference %q: "+format, append([]any{s}, args...)...)
	}
	var r Ref
	rest, isLayout := s, false
	for _, prefix := range []string{layoutPrefix, archivePrefix, dockerPrefix} {
		if path, ok := strings.CutPrefix(s, prefix); ok {
			rest, isLayout, r.prefix = path, true, prefix
		}
	}
	if i := strings.LastIndexByte(rest, '@'); i >= 0 && (!isLayout || strings.HasPrefix(rest[i+1:], "sha256:")) {
		rest, r.digest = rest[:i], rest[i+1:]
		if !reDigest.MatchString(r.digest) {
			return bad("digest %q is not sha256: and 64 lower case hex digits", r.digest)
		}
	}
	if !isLayout && strings.Contains(rest, "://") {
		return bad("has a URL scheme; references have none")
	}
	// A colon after the last slash starts a tag; one before it is a port.
	if i := strings.LastIndexByte(rest, ':'); i > strings.LastIndexByte(rest, '/') {
		rest, r.tag = rest[:i], rest[i+1:]
		if !reTag.MatchString(r.tag) {
			return bad("%q is not a tag", r.tag)
		}
	}
	if isLayout {
		if rest == "" || strings.ContainsRune(rest, 0) {
			return bad("names no file or directory")
		}
		r.dir = rest
		return r, nil
	}
	r.registry, r.repository = dockerHub, rest
	if host, path, ok := strings.Cut(rest, "/"); ok && (host == "localhost" || strings.ContainsAny(host, ".:")) {
		r.registry, r.repository = strings.ToLower(host), path
	}
	if !validHost(r.registry) {
		return bad("%q is not a registry's host or host:port", r.registry)
	}
	if r.registry == "index.docker.io" || r.registry == dockerHubHost {
		r.registry = dockerHub
	}
	if r.registry == dockerHub && !strings.Contains(r.repository, "/") {
		r.repository = "library/" + r.repository
	}
	if len(r.repository) > 255 || !rePath.MatchString(r.repository) {
		return bad("%q is not a repository name", r.repository)
	}
	return r, nil
}

// validHost takes "host", "host:port", "[::1]:port" and IPv4 addresses.
func validHost(s string) bool {
	host, port := s, ""
	if i := strings.LastIndexByte(s, ':'); i >= 0 && !strings.HasSuffix(s, "]") {
		host, port = s[:i], s[i+1:]
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return false
		}
	}
	if v6, ok := strings.CutPrefix(host, "["); ok {
		addr, err := netip.ParseAddr(strings.TrimSuffix(v6, "]"))
		return err == nil && strings.HasSuffix(v6, "]") && addr.Is6() && addr.Zone() == ""
	}
	return len(host) <= 253 && reHost.MatchString(host)
}

// Registry returns the registry's "host[:port]", or "" for a layout.
func (r Ref) Registry() string { return r.registry }

// Repository returns the name in the registry ("library/debian"), or "" for a
// layout.
func (r Ref) Repository() string { return r.repository }

// Dir returns the layout directory or the archive's file as it was written, or
// "" for a registry.
func (r Ref) Dir() string { return r.dir }

// Writable tells whether images can be stored there: archives are only read.
func (r Ref) Writable() bool { return r.prefix != archivePrefix && r.prefix != dockerPrefix }

// Digest returns "sha256:..." or "".
func (r Ref) Digest() string { return r.digest }

// Tag returns the tag: as written, else "latest" if there is no digest either,
// else "".
func (r Ref) Tag() string {
	if r.tag == "" && r.digest == "" {
		return "latest"
	}
	return r.tag
}

// WithDigest returns the reference pinned to a digest, which must be valid.
func (r Ref) WithDigest(digest string) Ref {
	r.digest = digest
	return r
}

// WithDir returns the reference with another Dir: a client makes it absolute before a daemon with another working directory sees it.
func (r Ref) WithDir(dir string) Ref {
	r.dir = dir
	return r
}

// String returns the full form, which ParseRef reads back as the same Ref.
func (r Ref) String() string {
	s := r.prefix + r.dir
	if r.registry != "" {
		s = r.registry + "/" + r.repository
	}
	if tag := r.Tag(); tag != "" && (r.registry != "" || r.tag != "") {
		s += ":" + tag
	}
	if r.digest != "" {
		s += "@" + r.digest
	}
	return s
}

// MarshalText returns String.
func (r Ref) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText is ParseRef.
func (r *Ref) UnmarshalText(p []byte) (err error) {
	*r, err = ParseRef(string(p))
	return err
}

// Descriptor says what an object is and names it by its content.
type Descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"` // "sha256:<64 hex digits>"
	Size        int64             `json:"size"`   // bytes
	Annotations map[string]string `json:"annotations,omitempty"`
}

// Ref names the object for a blob.Source.
func (d Descriptor) Ref() blob.Ref { return blob.Ref{Digest: d.Digest, Size: d.Size} }
