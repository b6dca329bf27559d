package link

import (
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"sort"

	"golang.org/x/sys/unix"
	"lukechampine.com/blake3"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/erofs"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/pool"
)

const (
	infoVersion = 3
	maxInfo     = 32 << 20 // bytes of the file info
)

// Info is the small part of a linked image.
type Info struct {
	Version  int       `json:"version"` // of the format of all three files
	Blobs    []Blob    `json:"blobs"`
	MetaSize int64     `json:"meta_size"`       // bytes of the file meta, a multiple of 4 KiB
	MetaSum  string    `json:"meta_blake3"`     // of the file meta, in hex
	FlatSize int64     `json:"flat_size"`       // bytes of the flat address space
	Segments []Segment `json:"segments"`        // in order of their device slots, and of Flat
	Meets    bool      `json:"meets,omitempty"` // segments that are block devices would be read wrong: see placement.meets
	First    []int64   `json:"first,omitempty"` // index.Blob.First of each blob, unless all are 0
}

// Blob is an object that chunks of the image come from.
type Blob struct {
	Digest string `json:"digest"`
	Size   int64  `json:"size"`
}

// Segment is a pool segment and where it stands in the flat address space.
type Segment struct {
	ID   uint32 `json:"id"`
	Flat int64  `json:"flat"` // byte address, a multiple of chunk.Block
	Size int64  `json:"size"`
}

// parseInfo checks everything that later use relies on.
func parseInfo(js []byte) (info Info, err error) {
	if err := json.Unmarshal(js, &info); err != nil {
		return Info{}, fmt.Errorf("%w: %v", index.ErrCorrupt, err)
	}
	if info.Version != infoVersion {
		return Info{}, fmt.Errorf("%w: version %d, this program knows %d; remove the image and pull it again", index.ErrUnsupported, info.Version, infoVersion)
	}
	bad := func(format string, args ...any) (Info, error) {
		return Info{}, fmt.Errorf("%w: %s", index.ErrCorrupt, fmt.Sprintf(format, args...))
	}
	if sum, err := hex.DecodeString(info.MetaSum); err != nil || len(sum) != 32 {
		return bad("meta_blake3 %q", info.MetaSum)
	}
	if info.MetaSize <= 0 || info.MetaSize%erofs.BlockSize != 0 || info.MetaSize > maxFlat {
		return bad("%d bytes of metadata", info.MetaSize)
	}
	if len(info.Blobs) > maxBlobs {
		return bad("%d blobs, more than %d", len(info.Blobs), maxBlobs)
	}
	if n := len(info.First); n > 0 && n != len(info.Blobs) {
		return bad("what %d blobs have first, of %d", n, len(info.Blobs))
	}
	for i, b := range info.Blobs {
		if b.Size < 0 {
			return bad("blob %d has %d bytes", i, b.Size)
		}
	}
	end, seen := info.MetaSize, map[uint32]bool{}
	for _, s := range info.Segments {
		if s.Flat < end || s.Flat%chunk.Block != 0 || s.Flat > maxFlat || s.Size <= 0 || s.Size%chunk.Block != 0 || s.Size > pool.MaxSegment || seen[s.ID] {
			return bad("segment %08x of %d bytes at flat address %d, after %d", s.ID, s.Size, s.Flat, end)
		}
		end, seen[s.ID] = s.Flat+s.Size, true
	}
	for _, s := range info.Segments {
		if s.Size >= info.Segments[0].Flat {
			return bad("segment %08x of %d bytes, and the first one at flat address %d", s.ID, s.Size, info.Segments[0].Flat)
		}
	}
	if end != info.FlatSize || end > maxFlat {
		return bad("%d bytes of flat addresses, want %d", info.FlatSize, end)
	}
	return info, nil
}

// maxFlat is what EROFS can address, in bytes.
const maxFlat = int64(erofs.BlockSize) << 32

// Image is a linked image, opened. It is safe for concurrent use.
type Image struct {
	Info
	Dir     string
	meta    *os.File
	records []byte // in a mapping that ends with the Image
	spans   []byte // likewise
	proofs  []byte // likewise
}

// Open opens a linked image and checks info and map as a whole; meta only for
// its size, see Verify. A damaged image is an error that wraps
// index.ErrCorrupt, one of another version of the program one that wraps
// index.ErrUnsupported: linking it again mends both.
func Open(dir string) (_ *Image, err error) {
	fail := func(name string, err error) (*Image, error) {
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, name), err)
	}
	js, err := readInfo(filepath.Join(dir, "info"))
	if err != nil {
		return fail("info", err)
	}
	im := &Image{Dir: dir}
	if im.Info, err = parseInfo(js); err != nil {
		return fail("info", err)
	}
	if im.meta, err = os.Open(filepath.Join(dir, "meta")); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, im.meta.Close())
		}
	}()
	st, err := im.meta.Stat()
	if err != nil {
		return nil, err
	}
	if st.Size() != im.MetaSize {
		return fail("meta", fmt.Errorf("%w: %d bytes, want %d", index.ErrCorrupt, st.Size(), im.MetaSize))
	}
	b, err := mapFile(filepath.Join(dir, "map"))
	if err != nil {
		return nil, err
	}
	// It goes when nothing refers to the Image any more: however late
	// somebody asks a closed Image, there is no unmapped memory to meet.
	runtime.AddCleanup(im, func(b []byte) { _ = unix.Munmap(b) }, b)
	if im.records, im.spans, im.proofs, err = parseMap(b, &im.Info, blake3.Sum256(js)); err != nil {
		return fail("", err)
	}
	return im, nil
}

func readInfo(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	js, err := io.ReadAll(io.LimitReader(f, maxInfo+1))
	if err == nil && len(js) > maxInfo {
		err = fmt.Errorf("%w: more than %d bytes", index.ErrCorrupt, maxInfo)
	}
	return js, err
}

func mapFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if st.Size() < mapHeader+mapSum || st.Size() > mapHeader+(mapRecord+mapSpan+mapProof)<<32+mapSum {
		return nil, index.Errorf(index.ErrCorrupt, path, 0, "a map cannot have %d bytes", st.Size())
	}
	b, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map %s: %w", path, err)
	}
	return b, nil
}

// Close releases the image: Meta can no longer be read.
func (im *Image) Close() error { return im.meta.Close() }

// Meta is the EROFS metadata, Info.MetaSize bytes.
func (im *Image) Meta() io.ReaderAt { return im.meta }

// Verify reads the metadata and compares it with its digest. A difference is
// an error that wraps index.ErrCorrupt.
func (im *Image) Verify() error {
	sum := blake3.New(32, nil)
	if _, err := io.CopyBuffer(sum, io.NewSectionReader(im.meta, 0, im.MetaSize), make([]byte, 1<<20)); err != nil {
		return err
	}
	if got := hex.EncodeToString(sum.Sum(nil)); got != im.MetaSum {
		return fmt.Errorf("%s: %w: digest is blake3:%s, want blake3:%s", im.meta.Name(), index.ErrCorrupt, got, im.MetaSum)
	}
	return nil
}

// Chunks is the number of records in the map.
func (im *Image) Chunks() int { return len(im.records) / mapRecord }

// Chunk returns record i of the map.
func (im *Image) Chunk(i int) Chunk {
	c := decodeChunk(im.records[i*mapRecord : (i+1)*mapRecord])
	runtime.KeepAlive(im)
	return c
}

// Spans is the number of spans in the map.
func (im *Image) Spans() int { return len(im.spans) / mapSpan }

// Span returns span i of the map and the blob it is in.
func (im *Image) Span(i int) (s index.Span, blob int) {
	r := im.spans[i*mapSpan : (i+1)*mapSpan]
	blob = decodeSpan(r, &s)
	if n := int(binary.LittleEndian.Uint32(r[52:])); n > 0 {
		p := im.proofs[(n-1)*mapProof:]
		s.Proof = &index.Proof{Stored: [32]byte(p), Window: [32]byte(p[32:])}
	}
	runtime.KeepAlive(im)
	return s, blob
}

// Layout returns what the map has as a tree without files: Chunks by number of their
// records, Blobs with their spans.
func (im *Image) Layout() *index.Tree {
	t := &index.Tree{Chunks: make([]index.Chunk, im.Chunks()), Blobs: make([]index.Blob, len(im.Blobs))}
	for i, b := range im.Blobs {
		t.Blobs[i] = index.Blob{Digest: b.Digest, Size: b.Size}
	}
	for i := range im.Spans() {
		s, blob := im.Span(i)
		t.Blobs[blob].Spans = append(t.Blobs[blob].Spans, s)
	}
	for i := range t.Chunks {
		c := im.Chunk(i)
		t.Chunks[i] = index.Chunk{Digest: c.Digest, Size: c.Size, Blob: uint32(c.Blob), Offset: c.Offset}
	}
	return t
}

// Segment returns the segment that a flat address is in, and the offset in it. Each
// chunk of the map is in one.
func (im *Image) Segment(flat int64) (s Segment, off int64) {
	i := sort.Search(len(im.Segments), func(i int) bool { return im.Segments[i].Flat+im.Segments[i].Size > flat })
	if i < len(im.Segments) && im.Segments[i].Flat <= flat {
		s, off = im.Segments[i], flat-im.Segments[i].Flat
	}
	return s, off
}

// Stored are the stored bytes of a blob that some chunks are decoded from.
type Stored struct {
	Blob           int
	Offset, Length int64
	First, Last    int   // spans
	from, to       int64 // what they decode to, in the blob's stream
}

// Stored returns the stored bytes that a chunk is decoded from.
func (im *Image) Stored(c Chunk) Stored {
	first, _ := im.Span(c.Span)
	last, n := first, c.Span
	if last.End() < c.End() {
		n += 1 + sort.Search(min(index.MaxSpans, im.Spans()-n)-1, func(i int) bool {
			s, blob := im.Span(c.Span + 1 + i)
			return blob != c.Blob || s.End() >= c.End()
		})
		last, _ = im.Span(n)
	}
	s := Stored{Blob: c.Blob, First: c.Span, Last: n, from: first.Start, to: last.End()}
	if first.Divisible() {
		s.from = c.Offset
	}
	if last.Divisible() {
		s.to = c.End()
	}
	s.Offset, s.Length = index.Stored([]index.Span{first, last}, c.Offset, c.End())
	return s
}

// StoredShare is how many stored bytes a chunk costs, about: its share of those
// it is decoded from.
func (im *Image) StoredShare(c Chunk) int64 {
	first, _ := im.Span(c.Span)
	return int64(float64(first.Length) * (float64(c.Size) / float64(first.Size)))
}

// Has tells whether a chunk of the same blob is decoded from these bytes.
func (s *Stored) Has(c Chunk) bool { return c.Offset >= s.from && c.End() <= s.to }

// Extend adds bytes that end further behind, and all before them.
func (s *Stored) Extend(t Stored) {
	s.Length = t.Offset + t.Length - s.Offset
	s.Last, s.to = t.Last, t.to
}

// Find returns the first record whose chunk ends behind the flat address;
// Chunks() if there is none.
func (im *Image) Find(flat int64) int {
	n := im.Chunks()
	i := sort.Search(n, func(i int) bool {
		return int64(binary.LittleEndian.Uint64(im.records[i*mapRecord:])) > flat
	})
	if i > 0 {
		if c := im.Chunk(i - 1); c.Flat+int64(c.Size) > flat {
			i--
		}
	}
	runtime.KeepAlive(im)
	return i
}
