// Package soci reads the ztocs of SOCI indexes: tables of contents that lie beside
// layers of tar, or of tar and gzip, that are as they always were. It must not
// know registries, manifests or the pool.
//
//	soci.go   Read: from the stored ztoc to a Layer
//	zinfo.go  checkpoints and digests become spans
//	files.go  the files, and where in the archive they lie
//	flat.go   flatbuffers
//
// docs/formats/soci.md describes the format. A ztoc has digests of the stored bytes
// of its spans and none of content: spans have a Proof, and the digests of chunks
// are origins.
package soci

import (
	"fmt"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// version is that of all ztocs there are.
const version = "0.9"

// Layer is what a ztoc says of its layer.
type Layer struct {
	Changes []index.Change // extents number Chunks
	Chunks  []index.Chunk  // Blob is 0, the layer
	Spans   []index.Span   // of the layer; Windows are of the ztoc, Window.Blob is 0
}

// Subject is what a ztoc is of, and its own name.
type Subject struct {
	Layer string // digest of the layer
	Size  int64  // of the layer, as it is stored
	Ztoc  string // digest of the ztoc
	Cut   uint32 // the size of chunks, which it does not say; default chunk.Size
}

// Read reads a ztoc, which must be verified. Errors wrap index.ErrCorrupt,
// index.ErrLimit or, where only reading the whole layer would help,
// index.ErrUnsupported.
func Read(ztoc []byte, of Subject, lim index.Limits) (*Layer, error) {
	r := &reader{flat: flat{b: ztoc}, of: of, name: "ztoc of layer " + of.Layer, lim: lim, out: &Layer{}}
	if err := r.read(); err != nil {
		return nil, err
	}
	return r.out, nil
}

// reader makes a Layer.
type reader struct {
	flat
	of     Subject
	name   string
	lim    index.Limits
	out    *Layer
	stream int64 // bytes of the archive
}

func (r *reader) errorf(kind error, format string, args ...any) error {
	return index.Errorf(kind, r.name, -1, format, args...)
}

// The fields of a ztoc.
const (
	ztocVersion = iota
	_           // what has built it
	ztocStored  // bytes of the layer
	ztocStream  // of the archive
	ztocTOC
	ztocCompression
)

// ... and of its compression information.
const (
	infoAlgorithm = iota
	infoLast      // number of the last span, from 0
	infoDigests
	infoCheckpoints
)

const (
	algorithmGzip = 1
	algorithmNone = 2
)

func (r *reader) read() error {
	root := r.root()
	if v := r.bytes(root, ztocVersion); r.err == nil && string(v) != version {
		return r.errorf(index.ErrUnsupported, "version %q, want %s", cut(v), version)
	}
	stored, stream := r.i64(root, ztocStored), r.i64(root, ztocStream)
	info, toc := r.table(root, ztocCompression), r.table(root, ztocTOC)
	algorithm := r.i8(info, infoAlgorithm, algorithmGzip)
	digests, n := r.vector(info, infoDigests, 4)
	last := r.i32(info, infoLast)
	at, length := r.vector(info, infoCheckpoints, 1)
	switch {
	case r.err != nil:
	case stored != r.of.Size:
		return r.errorf(index.ErrCorrupt, "it is of a layer of %d bytes, want %d", stored, r.of.Size)
	case stream < 0:
		return r.errorf(index.ErrCorrupt, "an archive of %d bytes", stream)
	case int64(last) != int64(n)-1:
		return r.errorf(index.ErrCorrupt, "%d digests of spans up to number %d", n, last)
	}
	if r.err != nil {
		return r.errorf(index.ErrCorrupt, "%v", r.err)
	}
	proofs := make([]index.Proof, n) // each took four bytes at least
	for i := range proofs {
		s := r.text(digests + 4*i)
		d, err := chunk.Parse(string(s))
		if r.err == nil && (err != nil || d.Algorithm != chunk.SHA256) {
			return r.errorf(index.ErrCorrupt, "span %d has digest %q, want sha256:<64 hex>", i, cut(s))
		}
		proofs[i].Stored = d.Sum
	}
	if r.err != nil {
		return r.errorf(index.ErrCorrupt, "%v", r.err)
	}
	var err error
	switch algorithm {
	case algorithmGzip:
		err = r.gzipSpans(at, r.at(at, length), proofs, stream)
	case algorithmNone:
		err = r.plainSpans(r.at(at, length), proofs)
	default:
		err = r.errorf(index.ErrUnsupported, "compression algorithm %d", algorithm)
	}
	if err != nil {
		return err
	}
	blob := index.Blob{Spans: r.out.Spans}
	r.stream = blob.StreamSize()
	return r.files(toc)
}

// cut makes bytes short enough for an error.
func cut(p []byte) string {
	if len(p) > 128 {
		return fmt.Sprintf("%s...", p[:128])
	}
	return string(p)
}
