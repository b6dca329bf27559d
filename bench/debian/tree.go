package debian

import (
	"archive/tar"
	"os"
	"path"
	"strings"

	"github.com/shale-image/shale/bench/oci"
)

// tree is what a new layer is put on: the layers below it, and what they are
// together. The zero value is the empty tree.
type tree struct {
	layers  []oci.Descriptor // lowest first, as are the others
	diffIDs []string
	blobs   []string // paths
	names   snapshot
}

// readTree returns the tree of the image from, whose layers it gives to out as
// well.
func readTree(from, out oci.Layout) (tree, error) {
	if from == "" {
		return tree{}, nil
	}
	m, _, err := from.Manifest()
	if err != nil {
		return tree{}, err
	}
	c, err := from.Config(m)
	if err != nil {
		return tree{}, err
	}
	t := tree{layers: m.Layers, diffIDs: c.RootFS.DiffIDs, names: snapshot{}}
	for _, d := range m.Layers {
		blob, err := linkBlob(from, out, d.Digest)
		if err != nil {
			return tree{}, err
		}
		layer, err := snapshotLayer(blob)
		if err != nil {
			return tree{}, err
		}
		t.names.apply(layer)
		t.blobs = append(t.blobs, blob)
	}
	return t, nil
}

const whiteout = ".wh."

// apply changes the snapshot as the layer does, which has whiteouts of single
// names only, as writeLayer makes them.
func (s snapshot) apply(layer snapshot) {
	for name, e := range layer {
		dir, base := path.Split(name)
		if gone, ok := strings.CutPrefix(base, whiteout); ok {
			s.remove(dir + gone)
		} else if old, ok := s[name]; ok && old.header.Typeflag == tar.TypeDir && e.header.Typeflag != tar.TypeDir {
			s.remove(name)
		}
	}
	for name, e := range layer {
		if !strings.HasPrefix(path.Base(name), whiteout) {
			s[name] = e
		}
	}
}

// remove takes a name away, and all below it.
func (s snapshot) remove(name string) {
	for other := range s {
		if other == name || strings.HasPrefix(other, name+"/") {
			delete(s, other)
		}
	}
}

// linkBlob gives one image a blob of another, at no cost in space.
func linkBlob(from, to oci.Layout, digest string) (string, error) {
	src, err := from.Blob(digest)
	if err != nil {
		return "", err
	}
	dst, err := to.Blob(digest)
	if err != nil {
		return "", err
	}
	return dst, os.Link(src, dst)
}
