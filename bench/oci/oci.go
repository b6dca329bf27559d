// Package oci has the few OCI documents that building, pushing and pulling a
// test image takes, and the image layout on disk. It is deliberately small:
// one image a layout, sha256 only, no attestations. It must not know where an
// image comes from or goes to.
package oci

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// The media types that the packages of bench write.
const (
	TypeIndex    = "application/vnd.oci.image.index.v1+json"
	TypeManifest = "application/vnd.oci.image.manifest.v1+json"
	TypeConfig   = "application/vnd.oci.image.config.v1+json"
	TypeGzip     = "application/vnd.oci.image.layer.v1.tar+gzip"
	TypeZstd     = "application/vnd.oci.image.layer.v1.tar+zstd"
)

// maxDocument bounds what is read of an index, manifest or config, in bytes.
const maxDocument = 4 << 20

// Descriptor names a blob.
type Descriptor struct {
	MediaType string    `json:"mediaType"`
	Digest    string    `json:"digest"` // "sha256:<64 hex digits>"
	Size      int64     `json:"size"`   // bytes
	Platform  *Platform `json:"platform,omitempty"`
}

// Platform is what an image runs on.
type Platform struct {
	Architecture string `json:"architecture"`
	OS           string `json:"os"`
}

// Index is the index.json of a layout.
type Index struct {
	SchemaVersion int          `json:"schemaVersion"`
	MediaType     string       `json:"mediaType"`
	Manifests     []Descriptor `json:"manifests"`
}

// Manifest lists an image's config and its layers, lowest first.
type Manifest struct {
	SchemaVersion int          `json:"schemaVersion"`
	MediaType     string       `json:"mediaType"`
	Config        Descriptor   `json:"config"`
	Layers        []Descriptor `json:"layers"`
}

// Image is an image's config.
type Image struct {
	Created      string  `json:"created,omitempty"` // RFC 3339
	Architecture string  `json:"architecture"`
	OS           string  `json:"os"`
	Config       Process `json:"config"`
	RootFS       RootFS  `json:"rootfs"`
}

// Process is what an image runs when it is told nothing else.
type Process struct {
	Env        []string `json:"Env,omitempty"`
	Entrypoint []string `json:"Entrypoint,omitempty"`
	Cmd        []string `json:"Cmd,omitempty"`
	WorkingDir string   `json:"WorkingDir,omitempty"`
}

// RootFS lists the digests of the uncompressed layers, lowest first.
type RootFS struct {
	Type    string   `json:"type"` // "layers"
	DiffIDs []string `json:"diff_ids"`
}

// Digest returns the digest of p as a descriptor has it.
func Digest(p []byte) string {
	sum := sha256.Sum256(p)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// Layout is a directory in the OCI image layout that holds one image.
type Layout string

// Create makes dir, which may exist, an empty layout. It is not a valid one
// before Finish.
func Create(dir string) (Layout, error) {
	if err := os.MkdirAll(filepath.Join(dir, "blobs", "sha256"), 0o755); err != nil {
		return "", err
	}
	err := os.WriteFile(filepath.Join(dir, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644)
	return Layout(dir), err
}

// Blob returns the path of a blob, which need not exist. A malformed digest
// is an error, so that no digest names a file outside of the layout.
func (l Layout) Blob(digest string) (string, error) {
	name, ok := strings.CutPrefix(digest, "sha256:")
	if _, err := hex.DecodeString(name); !ok || err != nil || len(name) != 64 || strings.ToLower(name) != name {
		return "", fmt.Errorf("oci: %q is no sha256 digest", digest)
	}
	return filepath.Join(string(l), "blobs", "sha256", name), nil
}

// Finish writes config and manifest of an image whose layer blobs are in
// place, and the index that makes the layout valid. config.RootFS must match
// layers.
func (l Layout) Finish(config Image, layers []Descriptor) error {
	c, err := l.put(TypeConfig, config)
	if err != nil {
		return err
	}
	m, err := l.put(TypeManifest, Manifest{SchemaVersion: 2, MediaType: TypeManifest, Config: c, Layers: layers})
	if err != nil {
		return err
	}
	m.Platform = &Platform{Architecture: config.Architecture, OS: config.OS}
	p, err := json.Marshal(Index{SchemaVersion: 2, MediaType: TypeIndex, Manifests: []Descriptor{m}})
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(string(l), "index.json"), p, 0o644)
}

func (l Layout) put(mediaType string, doc any) (Descriptor, error) {
	p, err := json.Marshal(doc)
	if err != nil {
		return Descriptor{}, err
	}
	d := Descriptor{MediaType: mediaType, Digest: Digest(p), Size: int64(len(p))}
	name, err := l.Blob(d.Digest)
	if err != nil {
		return Descriptor{}, err
	}
	return d, os.WriteFile(name, p, 0o644)
}

// Manifest returns the manifest of the layout's only image, and its
// descriptor. The manifest's bytes are those of its Blob.
func (l Layout) Manifest() (Manifest, Descriptor, error) {
	var idx Index
	var m Manifest
	p, err := readDocument(filepath.Join(string(l), "index.json"))
	if err == nil {
		err = json.Unmarshal(p, &idx)
	}
	if err != nil {
		return m, Descriptor{}, fmt.Errorf("oci: index of %s: %w", l, err)
	}
	if len(idx.Manifests) != 1 {
		return m, Descriptor{}, fmt.Errorf("oci: %s holds %d images, want 1", l, len(idx.Manifests))
	}
	d := idx.Manifests[0]
	if err := l.Document(d, &m); err != nil {
		return m, d, err
	}
	return m, d, nil
}

// Config returns the config that m names.
func (l Layout) Config(m Manifest) (Image, error) {
	var c Image
	err := l.Document(m.Config, &c)
	return c, err
}

// Document reads a JSON blob into doc, after its digest is found right.
func (l Layout) Document(d Descriptor, doc any) error {
	name, err := l.Blob(d.Digest)
	if err != nil {
		return err
	}
	p, err := readDocument(name)
	if err != nil {
		return err
	}
	return Parse(p, d.Digest, doc)
}

// Parse reads a JSON document whose digest must be the one given.
func Parse(p []byte, digest string, doc any) error {
	if got := Digest(p); got != digest {
		return fmt.Errorf("oci: document has digest %s, want %s", got, digest)
	}
	if err := json.Unmarshal(p, doc); err != nil {
		return fmt.Errorf("oci: document %s: %w", digest, err)
	}
	return nil
}

func readDocument(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return ReadDocument(f)
}

// ReadDocument reads a document whole; more than 4 MiB is an error.
func ReadDocument(r io.Reader) ([]byte, error) {
	p, err := io.ReadAll(io.LimitReader(r, maxDocument+1))
	if err == nil && len(p) > maxDocument {
		err = fmt.Errorf("oci: document is larger than %d bytes", maxDocument)
	}
	return p, err
}
