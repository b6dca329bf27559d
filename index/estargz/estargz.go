// Package estargz reads the table of contents of an eStargz layer, so that the
// layer's files can be shown before its data has come. It needs the table, some
// hundred bytes a file, and nothing else of the layer. It must not know
// registries, the pool or what becomes of the data.
//
//	estargz.go   Read: from the stored table to a Layer
//	footer.go    where in a layer its table is
//	table.go     the JSON of a table, entry by entry
//	entry.go     an entry becomes a change
//	inode.go     ... and the metadata of a file
//	place.go     chunks, and the members of gzip they are in
//
// docs/formats/estargz.md describes the format. What a table says of names,
// whiteouts and attributes is taken as package index/layer takes it from the
// archive: the tree is what extracting the layer gives, with the exceptions the
// format makes (landmarks are no files, times are whole seconds). What cannot be
// kept is refused by name.
package estargz

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"io"

	"github.com/klauspost/compress/gzip"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// DigestAnnotation is the annotation of a layer's descriptor that has the
// SHA-256 digest of the table, uncompressed.
const DigestAnnotation = "containerd.io/snapshot/stargz/toc.digest"

// tableName is the name of the table in its tar archive, and of no file of an
// image.
const tableName = "stargz.index.json"

// Layer is what a table says of its layer.
type Layer struct {
	// Changes is what index/layer would read from the layer's archive. The
	// Extents of regular files are filled in; their Chunk is a position in Chunks.
	Changes []index.Change

	// Chunks are the contents, each once. Blob is 0, and Offset is in the stream
	// that Spans make up.
	Chunks []index.Chunk

	// Spans are in order of their place in the layer. What one decodes to goes
	// on behind its Size, with tar headers of which nobody knows how long they are:
	// decoding ends at Size. Each begins with the header of a gzip member or a
	// zstd frame.
	Spans []index.Span

	// Prefetch has the paths of the regular files that the builder of the layer
	// has put first, in order: those a container is known to read.
	Prefetch []string
}

// Read reads a table from its stored bytes, those of the Section at that Locate
// tells. digest is the layer's DigestAnnotation: without one nothing says that
// the table is the image's, and it is refused as index.ErrUnsupported. name is
// for errors.
//
// Errors wrap index.ErrCorrupt, index.ErrLimit or, where only reading the whole
// layer would help, index.ErrUnsupported.
func Read(stored []byte, at Section, digest, name string, lim index.Limits) (*Layer, error) {
	lim = lim.WithDefaults()
	if digest == "" {
		return nil, index.Errorf(index.ErrUnsupported, name, -1, "no annotation %s to verify the table of contents with", DigestAnnotation)
	}
	want, err := chunk.Parse(digest)
	if err != nil || want.Algorithm != chunk.SHA256 {
		return nil, index.Errorf(index.ErrCorrupt, name, -1, "annotation %s is %q, want a SHA-256 digest", DigestAnnotation, cut(digest))
	}
	if int64(len(stored)) != at.Length {
		return nil, index.Errorf(index.ErrCorrupt, name, at.Offset, "%d bytes of a table of contents of %d", len(stored), at.Length)
	}
	corrupt := func(err error) error {
		return index.Errorf(index.ErrCorrupt, name, at.Offset, "table of contents: %v", err)
	}
	z, err := gzip.NewReader(bytes.NewReader(stored))
	if err != nil {
		return nil, corrupt(err)
	}
	defer z.Close()
	archive := tar.NewReader(z)
	h, err := archive.Next()
	if err != nil {
		return nil, corrupt(err)
	}
	if h.Name != tableName || h.Typeflag != tar.TypeReg {
		return nil, index.Errorf(index.ErrCorrupt, name, at.Offset, "table of contents: file %q, want %s", cut(h.Name), tableName)
	}
	if h.Size > lim.MetadataBytes {
		return nil, index.Errorf(index.ErrLimit, name, at.Offset, "a table of contents of %d bytes, want at most %d (MetadataBytes)", h.Size, lim.MetadataBytes)
	}
	sum := sha256.New()
	l, err := Parse(io.TeeReader(archive, sum), name, Stored{Codec: chunk.Gzip, End: at.Offset}, lim)
	// A table that is not the image's is not worth a word about what is in it.
	if _, rest := io.Copy(sum, archive); rest != nil {
		return nil, corrupt(rest)
	}
	if got := (chunk.Digest{Algorithm: chunk.SHA256, Sum: [32]byte(sum.Sum(nil))}); got != want {
		return nil, index.Errorf(index.ErrCorrupt, name, at.Offset, "the digest of the table of contents is %s, want %s", got, want)
	}
	return l, err
}
