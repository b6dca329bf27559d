// Package artifact is the index of an image that is not converted: a portable
// encoding of an index.Tree whose chunks lie in the image's own layers, so that
// who mounts the image need not read them. It is small: 0.4% of the layers.
//
// An index is fetched whole, before anything else. It has no content of files,
// and neither the windows that decoding a gzip layer from its middle needs:
// those are in a blob beside it and fetched when they are.
//
//	+--------+--------------+------------------------+--------+
//	| header | sums         | zstd frames            | BLAKE3 |
//	|        | of the       | sections: the tree as  | of all |
//	|        | chunks       | columns of numbers     | before |
//	+--------+--------------+------------------------+--------+
//	0        24             24 + 32 x chunks
//
// docs/formats/index.md describes each field. The package knows no registry and
// no layer: what it encodes others have read, and what is in the layers it
// believes.
package artifact

import "github.com/shale-image/shale/index"

// Info is what an index tells besides the tree.
type Info struct {
	// Manifest is the digest of the image's manifest, "sha256:<64 hex digits>".
	// An index is good for no other image.
	Manifest string

	// DiffIDs are the digests of the layers' uncompressed archives, of the
	// first blobs in order: Blobs[i] is a layer, and its stream has the digest
	// DiffIDs[i]. Blobs behind them are what lies beside the layers: windows.
	DiffIDs []string
}

// Encode makes the index of an image. It depends on the tree alone, not on the
// numbers of its chunks: those no file refers to are left out, equal ones (the
// same content in the same place) are one, and the rest are in the order of
// their blobs and streams. The tree is not changed.
//
// What Decode would refuse by the same limits, Encode does, with the same
// errors: it reads back what it wrote.
func Encode(t *index.Tree, info Info, lim index.Limits) ([]byte, error) {
	e := &encoder{t: t}
	if err := e.encode(info); err != nil {
		return nil, err
	}
	p := seal(e.version(), e.sums(), e.content()...)
	if err := e.verify(p, info, lim); err != nil {
		return nil, err
	}
	return p, nil
}

// Decode reads what Encode wrote. The name is that of the index in errors, which
// wrap index.ErrCorrupt, index.ErrLimit (and name the limit), or
// index.ErrUnsupported, and tell the offset in p or in the content of the frames.
// It is safe for any bytes: all that they make it allocate is counted before it is,
// by Limits.Memory, and frames decode to no more than 1 MiB and 64 times the index. What it returns keeps none of p: a tree whose
// chunks and spans are sound (index.Tree.CheckChunk, CheckSpans), whose files'
// extents follow each other at multiples of 4 KiB and end within the file, and
// whose names a file system takes.
//
// Inodes with equal extended attributes share them: replace them, do not change
// them in place.
func Decode(p []byte, name string, lim index.Limits) (*index.Tree, Info, error) {
	d := &decoder{name: name, lim: lim.WithDefaults(), tree: new(index.Tree)}
	if err := d.decode(p); err != nil {
		return nil, Info{}, err
	}
	return d.tree, d.info, nil
}
