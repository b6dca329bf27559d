package estargz

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// Stored says how the layer is stored that a table is about.
type Stored struct {
	Codec chunk.Codec // Gzip: its pieces are gzip members, Zstd: zstd frames
	End   int64       // offset in the blob behind the last of them
}

// entry is an entry of a table.
type entry struct {
	Type        string            `json:"type"`
	Name        string            `json:"name"`
	LinkName    string            `json:"linkName"`
	Mode        int64             `json:"mode"`
	Size        int64             `json:"size"`
	UID         int64             `json:"uid"`
	GID         int64             `json:"gid"`
	ModTime     string            `json:"modtime"`
	DevMajor    int64             `json:"devMajor"`
	DevMinor    int64             `json:"devMinor"`
	Xattrs      map[string]string `json:"xattrs"`
	Digest      string            `json:"digest"`
	Offset      int64             `json:"offset"`
	InnerOffset int64             `json:"innerOffset"`
	EndOffset   int64             `json:"endOffset"` // zstd:chunked
	ChunkOffset int64             `json:"chunkOffset"`
	ChunkSize   int64             `json:"chunkSize"`
	ChunkDigest string            `json:"chunkDigest"`
	ChunkType   string            `json:"chunkType"` // zstd:chunked
}

// Parse reads the JSON of a table, which must be all there is in r. What it is
// read from must be verified by the caller. See Read for the errors; those of r
// are passed on if they wrap index.ErrCorrupt or index.ErrLimit, and are
// index.ErrCorrupt otherwise.
func Parse(r io.Reader, name string, s Stored, lim index.Limits) (*Layer, error) {
	lim = lim.WithDefaults()
	limited := &limitedReader{r: r, left: lim.MetadataBytes, err: index.Errorf(index.ErrLimit, name, -1, "a table of contents of more than %d bytes (MetadataBytes)", lim.MetadataBytes)}
	b := &builder{name: name, lim: lim, stored: s, out: &Layer{}, known: map[chunk.Digest]uint32{}}
	d := json.NewDecoder(limited)
	if err := b.table(d); err != nil {
		if errors.Is(err, index.ErrCorrupt) || errors.Is(err, index.ErrLimit) || errors.Is(err, index.ErrUnsupported) {
			return nil, err
		}
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return nil, index.Errorf(index.ErrCorrupt, name, -1, "table of contents: at byte %d, entry %d: %v", d.InputOffset(), b.entries, err)
	}
	if err := b.place(); err != nil {
		return nil, err
	}
	return b.out, nil
}

// table reads the outermost object.
func (b *builder) table(d *json.Decoder) error {
	if err := expect(d, json.Delim('{')); err != nil {
		return err
	}
	version, entries := 0, false
	for d.More() {
		key, err := d.Token()
		if err != nil {
			return err
		}
		switch key {
		case "version":
			err = d.Decode(&version)
		case "entries":
			if entries {
				return errors.New("a second list of entries")
			}
			entries = true
			err = b.list(d)
		default: // such as tarSplitDigest
			var skip json.RawMessage
			err = d.Decode(&skip)
		}
		if err != nil {
			return err
		}
	}
	if err := expect(d, json.Delim('}')); err != nil {
		return err
	}
	if t, err := d.Token(); err != io.EOF {
		if err == nil {
			err = fmt.Errorf("%v behind the end", t)
		}
		return err
	}
	if version != 1 {
		return b.errorf(index.ErrUnsupported, "a table of contents of version %d, want 1", version)
	}
	if !entries {
		return errors.New("no list of entries")
	}
	return nil
}

func (b *builder) list(d *json.Decoder) error {
	if err := expect(d, json.Delim('[')); err != nil {
		return err
	}
	for d.More() {
		var e entry
		if err := d.Decode(&e); err != nil {
			return err
		}
		if b.entries++; b.entries > b.lim.Entries {
			return b.errorf(index.ErrLimit, "more than %d entries (Entries)", b.lim.Entries)
		}
		if err := b.add(&e); err != nil {
			return err
		}
	}
	if err := b.closeFile(); err != nil {
		return err
	}
	return expect(d, json.Delim(']'))
}

func expect(d *json.Decoder, want json.Delim) error {
	t, err := d.Token()
	if err == nil && t != want {
		err = fmt.Errorf("%v, want %v", t, want)
	}
	return err
}

// limitedReader fails with err when more is to be read than is left.
type limitedReader struct {
	r    io.Reader
	left int64
	err  error
}

func (l *limitedReader) Read(p []byte) (int, error) {
	n, err := l.r.Read(p[:min(int64(len(p)), l.left+1)])
	if l.left -= int64(n); l.left < 0 {
		return 0, l.err
	}
	return n, err
}
