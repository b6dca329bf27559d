package image

import (
	"encoding/json"
	"strings"
)

// Media types of manifests and configurations.
const (
	MediaTypeIndex          = "application/vnd.oci.image.index.v1+json"
	MediaTypeManifest       = "application/vnd.oci.image.manifest.v1+json"
	MediaTypeConfig         = "application/vnd.oci.image.config.v1+json"
	MediaTypeDockerList     = "application/vnd.docker.distribution.manifest.list.v2+json"
	MediaTypeDockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	MediaTypeDockerConfig   = "application/vnd.docker.container.image.v1+json"

	dockerSchema1 = "application/vnd.docker.distribution.manifest.v1"
)

func isIndex(mediaType string) bool {
	return mediaType == MediaTypeIndex || mediaType == MediaTypeDockerList
}

func isManifest(mediaType string) bool {
	return mediaType == MediaTypeManifest || mediaType == MediaTypeDockerManifest
}

// Manifest is a manifest or an index as it is stored, not interpreted.
type Manifest struct {
	MediaType string
	Digest    string // of Bytes; verified
	Bytes     []byte
}

// entry is a descriptor inside a manifest or an index.
type entry struct {
	Descriptor
	ArtifactType string         `json:"artifactType"`
	Data         []byte         `json:"data"` // the object itself, sometimes
	Platform     *entryPlatform `json:"platform"`
}

// artifact tells whether the entry says that it is something other than an image.
func (e *entry) artifact() bool {
	return e.ArtifactType != "" && e.ArtifactType != MediaTypeConfig && e.ArtifactType != MediaTypeDockerConfig
}

type entryPlatform struct {
	Platform
	OSFeatures []string `json:"os.features"`
}

// document is a manifest (Config, Layers) or an index (Manifests).
type document struct {
	SchemaVersion int               `json:"schemaVersion"`
	MediaType     string            `json:"mediaType"`
	ArtifactType  string            `json:"artifactType"`
	Config        *entry            `json:"config"`
	Layers        []entry           `json:"layers"`
	Manifests     []entry           `json:"manifests"`
	Annotations   map[string]string `json:"annotations"`
}

// parseDocument parses a manifest or an index. mediaType is what its
// descriptor or the Content-Type said, "" if nothing did. In the result
// MediaType is never empty, and every descriptor is well formed.
//
// What a document is must not depend on who reads it: types that contradict
// each other, and documents that are both manifest and index, are refused.
func parseDocument(name, mediaType string, p []byte) (*document, error) {
	mediaType, _, _ = strings.Cut(mediaType, ";")
	mediaType = strings.TrimSpace(mediaType)
	var d document
	if err := json.Unmarshal(p, &d); err != nil {
		return nil, corrupt(name, "manifest: %v", err)
	}
	if d.SchemaVersion == 1 || strings.HasPrefix(d.MediaType, dockerSchema1) || strings.HasPrefix(mediaType, dockerSchema1) {
		return nil, unsupported(name, "a Docker schema 1 manifest; push the image again with a present-day tool")
	}
	if d.SchemaVersion != 2 {
		return nil, corrupt(name, "manifest: schemaVersion is %d, expected 2", d.SchemaVersion)
	}
	known := isIndex(mediaType) || isManifest(mediaType)
	switch {
	case d.MediaType == "" && known:
		d.MediaType = mediaType
	case d.MediaType == "" && d.Manifests != nil:
		d.MediaType = MediaTypeIndex
	case d.MediaType == "":
		d.MediaType = MediaTypeManifest
	case known && d.MediaType != mediaType:
		return nil, corrupt(name, "manifest: says it is %q, expected %q", d.MediaType, mediaType)
	}
	var entries []entry
	switch {
	case isIndex(d.MediaType):
		if d.Config != nil || d.Layers != nil {
			return nil, corrupt(name, "an index with the config or layers of a manifest")
		}
		entries = d.Manifests
	case isManifest(d.MediaType):
		if d.Manifests != nil {
			return nil, corrupt(name, "a manifest with the manifests of an index")
		}
		if d.Config == nil {
			return nil, corrupt(name, "a manifest without a config")
		}
		entries = append([]entry{*d.Config}, d.Layers...)
	default:
		return nil, &NotImageError{name, printable(d.MediaType)}
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Digest, "sha512:") {
			return nil, unsupported(name, "digest %.100q; only sha256 is", e.Digest)
		}
		if !reDigest.MatchString(e.Digest) || e.Size < 0 {
			return nil, corrupt(name, "descriptor with digest %.100q and size %d", e.Digest, e.Size)
		}
	}
	return &d, nil
}

// checkImage tells a manifest of an image from those of other things.
func (d *document) checkImage(name string) error {
	other := func(what string) error { return &NotImageError{name, printable(what)} }
	if t := d.Config.MediaType; t != MediaTypeConfig && t != MediaTypeDockerConfig {
		if d.ArtifactType != "" {
			t = d.ArtifactType
		}
		return other(t)
	}
	// Signatures and attestations have an image's config; their layers are none.
	for _, l := range d.Layers {
		if !isLayer(l.MediaType) {
			return other(l.MediaType)
		}
	}
	return nil
}

// isLayer is wide on purpose: the readers of layers know which kinds they can
// read, this only keeps out what is no layer at all.
func isLayer(mediaType string) bool {
	return strings.HasPrefix(mediaType, "application/vnd.oci.image.layer.") ||
		strings.HasPrefix(mediaType, "application/vnd.docker.image.rootfs.") ||
		strings.HasPrefix(mediaType, "application/vnd.") && strings.Contains(mediaType, ".layer.v1") && !strings.Contains(mediaType, "+json")
}

// printable bounds a string from a manifest for use in an error.
func printable(s string) string {
	if len(s) > 200 {
		s = s[:200] + "..."
	}
	return strings.ToValidUTF8(s, "\ufffd")
}
