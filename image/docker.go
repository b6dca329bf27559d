package image

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"strings"
)

// A docker archive has a file manifest.json that lists its images:
//
//	[{"Config":"<hex>.json","RepoTags":["app:1"],"Layers":["<id>/layer.tar"]}]
//
// The paths may be anything; a layer that is there twice may be a symbolic
// link. It has no manifests and no digests but those of the uncompressed
// layers, which are the layers' own as long as these are not compressed. So a
// manifest is made up for each image, and the rest is as in a registry:
// whatever is read is verified.
type saved struct {
	tags []string
	m    Manifest
}

func (a *archive) loadDocker() error {
	p, err := a.readManifest("manifest.json")
	if err != nil {
		return err
	}
	var list []struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	if err := json.Unmarshal(p, &list); err != nil {
		return corrupt("manifest.json", "%v", err)
	}
	a.byHash = map[string]span{}
	for _, e := range list {
		m, err := a.makeUp(e.Config, e.Layers)
		if err != nil {
			return err
		}
		a.saved = append(a.saved, saved{e.RepoTags, m})
	}
	return nil
}

// makeUp makes the manifest of an image.
func (a *archive) makeUp(configName string, layers []string) (Manifest, error) {
	js, err := a.read(configName, a.opts.ConfigLimit, overLimit)
	if err != nil {
		return Manifest{}, err
	}
	config, err := parseConfig(printable(configName), js)
	if err != nil {
		return Manifest{}, err
	}
	if len(config.DiffIDs) != len(layers) {
		return Manifest{}, corrupt(printable(configName), "%d diff_ids for %d layers", len(config.DiffIDs), len(layers))
	}
	var doc struct {
		SchemaVersion int          `json:"schemaVersion"`
		MediaType     string       `json:"mediaType"`
		Config        Descriptor   `json:"config"`
		Layers        []Descriptor `json:"layers"`
	}
	doc.SchemaVersion, doc.MediaType = 2, MediaTypeManifest
	doc.Config = Descriptor{MediaType: MediaTypeConfig, Digest: digestOf(js), Size: int64(len(js))}
	if a.byHash[doc.Config.Digest], err = a.find(configName); err != nil {
		return Manifest{}, err
	}
	doc.Layers = []Descriptor{}
	for i, name := range layers {
		at, err := a.find(name)
		if err != nil {
			return Manifest{}, err
		}
		d := Descriptor{MediaType: "application/vnd.oci.image.layer.v1.tar", Digest: config.DiffIDs[i], Size: at.size}
		magic := make([]byte, 2)
		if n, _ := a.file.ReadAt(magic, at.off); n == 2 && at.size > 2 && (magic[0] == 0x1f && magic[1] == 0x8b || magic[0] == 0x28 && magic[1] == 0xb5) {
			// Compressed: its digest is that of a blob's name, or taken.
			if hex, ok := strings.CutPrefix(name, blobDir+"/"); ok && reDigest.MatchString("sha256:"+hex) {
				d.Digest = "sha256:" + hex
			} else {
				h := sha256.New()
				if _, err := io.Copy(h, io.NewSectionReader(a.file, at.off, at.size)); err != nil {
					return Manifest{}, err
				}
				d.Digest = fmt.Sprintf("sha256:%x", h.Sum(nil))
			}
			d.MediaType = "application/vnd.oci.image.layer.v1.tar+gzip"
			if magic[0] == 0x28 {
				d.MediaType = "application/vnd.oci.image.layer.v1.tar+zstd"
			}
		}
		a.byHash[d.Digest] = at
		doc.Layers = append(doc.Layers, d)
	}
	p, err := json.Marshal(doc)
	return Manifest{MediaType: doc.MediaType, Digest: digestOf(p), Bytes: p}, err
}

// dockerManifest finds an image by tag or digest. Without either it is the only
// one.
func (a *archive) dockerManifest(reference string) (Manifest, error) {
	var tags []string
	for _, s := range a.saved {
		if reference == s.m.Digest || reference == "" && len(a.saved) == 1 {
			return s.m, nil
		}
		for _, tag := range s.tags {
			if reference != "" && strings.HasSuffix(tag, ":"+reference) {
				return s.m, nil
			}
			if len(tags) < 100 {
				tags = append(tags, printable(tag))
			}
		}
	}
	return Manifest{}, notFound(a.path, "no image %q; it has %d: %s", reference, len(a.saved), strings.Join(tags, ", "))
}
