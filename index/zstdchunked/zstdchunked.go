// Package zstdchunked reads the table of contents of a zstd:chunked layer, as
// Podman's tools and, in a flavour of its own, the stargz snapshotter's make it.
// The table is that of eStargz with some fields more, and package estargz reads
// it; what is different is how the table is found, stored and verified. It must
// not know registries, the pool or what becomes of the data.
//
// Podman's tools cut files by content, at any offset. A file of which EROFS cannot
// address the chunks becomes one chunk, up to 1 MiB; a larger one is cut again.
//
// docs/formats/zstd-chunked.md describes the format.
package zstdchunked

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/klauspost/compress/zstd"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/estargz"
)

// The annotations of a layer's descriptor begin with one of these, of which the
// second is the older one and the one of the stargz snapshotter's tools.
var prefixes = []string{"io.github.containers.zstd-chunked.", "io.containers.zstd-chunked."}

const (
	checksum = "manifest-checksum" // digest of the table, compressed
	position = "manifest-position" // offset:length:length uncompressed:type
)

// headerSize is the size of the header of the skippable frame that the table is
// in.
const headerSize = 8

// Table is where in a layer its table of contents is.
type Table struct {
	Offset int64        // of the first stored byte, behind the header of its frame
	Length int64        // stored bytes
	Size   int64        // bytes uncompressed
	Digest chunk.Digest // SHA-256 of the stored bytes
}

// Locate tells from the annotations of a layer of size bytes where its table of
// contents is. A layer without them is index.ErrUnsupported; name is for errors.
func Locate(annotations map[string]string, size int64, name string) (Table, error) {
	for _, prefix := range prefixes {
		sum, pos := annotations[prefix+checksum], annotations[prefix+position]
		switch {
		case sum == "" && pos == "":
			continue
		case sum == "" || pos == "":
			// Without a digest nothing says that the table is the image's.
			return Table{}, index.Errorf(index.ErrUnsupported, name, -1, "only one of the annotations %s and %s", prefix+checksum, prefix+position)
		}
		t, err := parse(sum, pos, size)
		if err != nil {
			kind := index.ErrCorrupt
			if errors.Is(err, index.ErrUnsupported) {
				kind = index.ErrUnsupported
			}
			return Table{}, index.Errorf(kind, name, -1, "annotations %s*: %v", prefix, err)
		}
		return t, nil
	}
	return Table{}, index.Errorf(index.ErrUnsupported, name, -1, "no annotation %s", prefixes[0]+position)
}

func parse(sum, pos string, size int64) (t Table, err error) {
	if t.Digest, err = chunk.Parse(sum); err != nil || t.Digest.Algorithm != chunk.SHA256 {
		return t, fmt.Errorf("%s is %q, want a SHA-256 digest", checksum, sum)
	}
	fields := strings.Split(pos, ":")
	var n [4]int64
	good := len(fields) == len(n)
	for i := 0; good && i < len(n); i++ {
		u, err := strconv.ParseUint(fields[i], 10, 63)
		n[i], good = int64(u), err == nil
	}
	if !good {
		return t, fmt.Errorf("%s is %q, want four numbers like 1000:200:900:1", position, pos)
	}
	t.Offset, t.Length, t.Size = n[0], n[1], n[2]
	switch {
	case n[3] != 1:
		return t, fmt.Errorf("%w: a table of type %d, want 1", index.ErrUnsupported, n[3])
	case t.Offset < headerSize || t.Length == 0 || t.Offset > size || t.Length > size-t.Offset:
		return t, fmt.Errorf("a table of %d bytes at offset %d of %d", t.Length, t.Offset, size)
	}
	return t, nil
}

// Read reads a table from its stored bytes, those at Offset. name is for errors,
// which wrap index.ErrCorrupt, index.ErrLimit or, where only reading the whole
// layer would help, index.ErrUnsupported.
//
// The frames of a layer made by Podman's tools decode to the Size of their Span.
// Those by the stargz snapshotter's go on behind it; see estargz.Layer.
func Read(stored []byte, t Table, name string, lim index.Limits) (*estargz.Layer, error) {
	lim = lim.WithDefaults()
	if int64(len(stored)) != t.Length {
		return nil, index.Errorf(index.ErrCorrupt, name, t.Offset, "%d bytes of a table of contents of %d", len(stored), t.Length)
	}
	if err := t.Digest.Verify(stored); err != nil {
		return nil, index.Errorf(index.ErrCorrupt, name, t.Offset, "table of contents: %v", err)
	}
	if t.Size > lim.MetadataBytes {
		return nil, index.Errorf(index.ErrLimit, name, t.Offset, "a table of contents of %d bytes, want at most %d (MetadataBytes)", t.Size, lim.MetadataBytes)
	}
	z, err := zstd.NewReader(bytes.NewReader(stored), zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
	if err != nil {
		return nil, index.Errorf(index.ErrCorrupt, name, t.Offset, "table of contents: %v", err)
	}
	defer z.Close()
	n := &counter{r: z}
	l, err := estargz.Parse(io.LimitReader(n, t.Size+1), name, estargz.Stored{Codec: chunk.Zstd, End: t.Offset - headerSize}, lim)
	if err == nil && n.n != t.Size {
		return nil, index.Errorf(index.ErrCorrupt, name, t.Offset, "a table of contents of %d bytes, want %d", n.n, t.Size)
	}
	return l, err
}

// maxWindow bounds the memory for a table's window.
const maxWindow = 128 << 20

type counter struct {
	r io.Reader
	n int64
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}
