package rafs

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"strconv"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// Names of a blob's parts.
const (
	tocBlob       = "image.blob"
	tocMeta       = "blob.meta"
	tocMetaHeader = "blob.meta.header"
	tocDigests    = "blob.digest"
	tocBoot       = "image.boot"
	tocName       = "rafs.blob.toc"
)

const (
	tarSize    = 512
	entrySize  = 128
	maxEntries = (4096 - tarSize) / entrySize // Nydus reads 4 KiB from the end
)

// Entry is a part of a blob.
type Entry struct {
	Name   string
	Codec  chunk.Codec
	Digest [32]byte // sha256 of the part, decoded; of image.blob see Extract
	Offset uint64   // of the stored bytes in the blob
	Length uint64   // bytes stored
	Size   uint64   // bytes decoded
}

// TOC is the table of contents at the end of a blob.
type TOC struct {
	Entries []Entry
	Size    uint32   // bytes, the tar header included
	Digest  [32]byte // sha256 of those bytes: what a blob table entry says

	r    io.ReaderAt
	name string
}

// appendEntry appends e as a blob has it.
//
//	0 u32 flags: 1 stored, 2 zstd, 4 lz4     8 name[16]       56 u64 offset   72 u64 size
//	4 u32 zero                              24 sha256[32]     64 u64 length   80 zeros
func appendEntry(dst []byte, e Entry) []byte {
	flags := map[chunk.Codec]uint32{chunk.None: 1, chunk.Zstd: 2, chunk.LZ4: 4}[e.Codec]
	p := make([]byte, entrySize)
	le := binary.LittleEndian
	le.PutUint32(p, flags)
	copy(p[8:24], e.Name)
	copy(p[24:], e.Digest[:])
	le.PutUint64(p[56:], e.Offset)
	le.PutUint64(p[64:], e.Length)
	le.PutUint64(p[72:], e.Size)
	return append(dst, p...)
}

// ReadTOC reads the table of contents of a blob of size bytes; name is for
// errors. A blob whose last part is a bootstrap without such a table gets a
// table of that one part, without digests; any other blob is ErrUnsupported.
func ReadTOC(r io.ReaderAt, size int64, name string) (*TOC, error) {
	if size < tarSize {
		return nil, index.Errorf(index.ErrCorrupt, name, size, "blob of %d bytes has no room for a tar header", size)
	}
	h := make([]byte, tarSize)
	if err := readAt(r, h, size-tarSize, name); err != nil {
		return nil, err
	}
	part, length, ok := parseTar(h)
	if !ok {
		return nil, index.Errorf(index.ErrUnsupported, name, size-tarSize, "blob without a table of contents")
	}
	if length > uint64(size-tarSize) {
		return nil, index.Errorf(index.ErrCorrupt, name, size-tarSize, "%s of %d bytes before offset %d", part, length, size-tarSize)
	}
	off := size - tarSize - int64(length)
	t := &TOC{r: r, name: name}
	switch {
	case part == tocBoot:
		t.Entries = []Entry{{Name: tocBoot, Offset: uint64(off), Length: length, Size: length}}
		return t, nil
	case part != tocName:
		return nil, index.Errorf(index.ErrUnsupported, name, size-tarSize, "blob ends in %q, want %s", part, tocName)
	case length == 0 || length%entrySize != 0 || length/entrySize > maxEntries:
		return nil, index.Errorf(index.ErrCorrupt, name, size-tarSize, "table of contents of %d bytes, want 1 to %d times %d", length, maxEntries, entrySize)
	}
	p := make([]byte, length, length+tarSize)
	if err := readAt(r, p, off, name); err != nil {
		return nil, err
	}
	t.Size, t.Digest = uint32(length+tarSize), sha256.Sum256(append(p, h...))
	for at := off; len(p) > 0; at, p = at+entrySize, p[entrySize:] {
		e, err := decodeEntry(p, name, at, uint64(off))
		if err != nil {
			return nil, err
		}
		if _, ok := t.Entry(e.Name); ok {
			return nil, index.Errorf(index.ErrCorrupt, name, at, "second entry %q", e.Name)
		}
		t.Entries = append(t.Entries, e)
	}
	return t, nil
}

func decodeEntry(p []byte, name string, at int64, end uint64) (Entry, error) {
	le := binary.LittleEndian
	e := Entry{
		Name:   string(bytes.TrimRight(p[8:24], "\x00")),
		Digest: [32]byte(p[24:]),
		Offset: le.Uint64(p[56:]),
		Length: le.Uint64(p[64:]),
		Size:   le.Uint64(p[72:]),
	}
	switch flags := le.Uint32(p); flags {
	case 1:
		e.Codec = chunk.None
	case 2:
		e.Codec = chunk.Zstd
	case 4:
		e.Codec = chunk.LZ4
	default:
		return e, index.Errorf(index.ErrUnsupported, name, at, "flags %#x of entry %q", flags, e.Name)
	}
	if e.Name == tocBlob && e.Offset == e.Length {
		e.Offset = 0 // as nydus-image before 2.3 writes it
	}
	if e.Offset > end || e.Length > end-e.Offset || e.Name != tocBlob && e.Codec == chunk.None && e.Length != e.Size {
		return e, index.Errorf(index.ErrCorrupt, name, at, "entry %q: %d bytes, %d stored at %d, parts end at %d", e.Name, e.Size, e.Length, e.Offset, end)
	}
	return e, nil
}

// Entry returns the part called name.
func (t *TOC) Entry(name string) (Entry, bool) {
	for _, e := range t.Entries {
		if e.Name == name {
			return e, true
		}
	}
	return Entry{}, false
}

// Extract reads the part called name, "image.boot" for example, into memory
// and verifies its digest. It wraps ErrNotExist if there is none, and ErrLimit
// if it is too large. The chunks, image.blob, are not extracted: they are read
// one by one.
func (t *TOC) Extract(name string) ([]byte, error) {
	e, ok := t.Entry(name)
	if !ok || name == tocBlob {
		return nil, fmt.Errorf("%s: part %q: %w", t.name, name, index.ErrNotExist)
	}
	p, err := readStored(t.r, t.name, int64(e.Offset), e.Length, e.Size, e.Codec)
	if err != nil {
		return nil, err
	}
	// Without a table of contents there is no digest (ReadTOC).
	if got := sha256.Sum256(p); got != e.Digest && t.Size != 0 {
		return nil, index.Errorf(index.ErrCorrupt, t.name, int64(e.Offset), "%s has sha256 %x, want %x", name, got, e.Digest)
	}
	return p, nil
}

// tarHeader makes the GNU tar header that follows a part: name, size and
// checksum, no owner and no mode.
func tarHeader(name string, size uint64) []byte {
	h := make([]byte, tarSize)
	copy(h, name)
	if size < 1<<33 {
		copy(h[124:], fmt.Sprintf("%011o", size))
	} else { // does not fit 11 octal digits
		h[124] = 0x80
		binary.BigEndian.PutUint64(h[128:], size)
	}
	copy(h[136:], "00000000000")
	h[156] = '0'
	copy(h[257:], "ustar  ")
	copy(h[148:], fmt.Sprintf("%07o", tarChecksum(h)))
	return h
}

// tarChecksum sums the header with its checksum taken as spaces.
func tarChecksum(h []byte) (n uint64) {
	for i, c := range h {
		if i >= 148 && i < 156 {
			c = ' '
		}
		n += uint64(c)
	}
	return n
}

// parseTar reads a header; ok is false if it is none of a regular file.
func parseTar(h []byte) (name string, size uint64, ok bool) {
	if string(h[257:265]) != "ustar  \x00" || h[156] != '0' && h[156] != 0 {
		return "", 0, false
	}
	sum, err := parseOctal(h[148:156])
	if err != nil || sum != tarChecksum(h) {
		return "", 0, false
	}
	if h[124] == 0x80 {
		size = binary.BigEndian.Uint64(h[128:])
	} else if size, err = parseOctal(h[124:136]); err != nil {
		return "", 0, false
	}
	name, _, _ = cutZero(h[:100])
	return name, size, true
}

func parseOctal(p []byte) (uint64, error) {
	s, _, _ := cutZero(bytes.Trim(p, " "))
	return strconv.ParseUint(string(bytes.TrimSpace([]byte(s))), 8, 63)
}

func cutZero(p []byte) (string, []byte, bool) {
	before, after, ok := bytes.Cut(p, []byte{0})
	return string(before), after, ok
}
