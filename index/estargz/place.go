package estargz

import (
	"cmp"
	"crypto/sha256"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// file is a regular file.
type file struct {
	path, name string // name: as in the table
	ino        *index.Inode
	size       int64
	digest     chunk.Digest // zero if the table does not tell
	first, end int          // its pieces
	next       int64        // where the next piece must begin in the file
	until      int64        // where the last piece ends in the blob, 0 if the table does not tell
}

// piece is a chunk of a file, as the table has it.
type piece struct {
	digest chunk.Digest
	zeros  bool
	at     int64 // in the file
	size   int64
	off    int64 // of the member or frame in the blob
	inner  int64 // in what that decodes to
	until  int64 // where the frame ends in the blob, 0 if the table does not tell
	pos    int64 // in the stream
	span   int   // it lies in
	alone  bool  // nothing else does
}

// regular takes in an entry of a file. What has no inode is not read, but takes
// its place in the blob.
func (b *builder) regular(path string, ino *index.Inode, e *entry) error {
	if e.Size < 0 {
		return b.errorf(index.ErrCorrupt, "%q has %d bytes", cut(path), e.Size)
	}
	if e.Size > b.lim.FileSize {
		return b.errorf(index.ErrLimit, "%q has %d bytes, want at most %d (FileSize)", cut(path), e.Size, b.lim.FileSize)
	}
	f := &file{path: path, name: e.Name, ino: ino, size: e.Size, first: len(b.pieces), end: len(b.pieces), until: e.EndOffset}
	if b.file = f; e.Size == 0 {
		return nil
	}
	var err error
	if f.digest, err = b.digest(f, e.Digest); err != nil {
		return err
	}
	return b.piece(f, e)
}

// chunk takes in an entry of a further chunk.
func (b *builder) chunk(e *entry) error {
	f := b.file
	if f == nil || e.Name != "" && e.Name != f.name {
		return b.errorf(index.ErrCorrupt, "a chunk of %q, which is not the file before it", cut(e.Name))
	}
	return b.piece(f, e)
}

// piece adds the chunk that an entry tells of.
func (b *builder) piece(f *file, e *entry) error {
	p := piece{at: e.ChunkOffset, size: e.ChunkSize, off: e.Offset, inner: e.InnerOffset, zeros: e.ChunkType == "zeros"}
	if p.size == 0 { // the last one
		p.size = f.size - p.at
	}
	switch {
	case p.at != f.next || p.size <= 0 || p.size > f.size-p.at:
		return b.errorf(index.ErrCorrupt, "%q of %d bytes has a chunk of %d at %d, want one at %d", cut(f.path), f.size, p.size, p.at, f.next)
	case p.off <= 0 || p.off >= b.stored.End || p.inner < 0 || p.inner > math.MaxInt64-p.size:
		return b.errorf(index.ErrCorrupt, "%q: the chunk at %d is stored at offset %d (%d in it), want 1 to %d", cut(f.path), p.at, p.off, p.inner, b.stored.End-1)
	case !p.zeros && e.ChunkType != "":
		return b.errorf(index.ErrUnsupported, "%q: the chunk at %d is of type %q, which is unknown", cut(f.path), p.at, cut(e.ChunkType))
	}
	var err error
	if p.digest, err = b.digest(f, e.ChunkDigest); err != nil {
		return err
	}
	if p.size == f.size {
		if p.digest == (chunk.Digest{}) {
			p.digest = f.digest
		} else if f.digest != (chunk.Digest{}) && p.digest != f.digest {
			return b.errorf(index.ErrCorrupt, "%q has one chunk with digest %s, want that of the file, %s", cut(f.path), p.digest, f.digest)
		}
	}
	f.next += p.size
	b.pieces = append(b.pieces, p)
	f.end = len(b.pieces)
	return nil
}

func (b *builder) digest(f *file, s string) (chunk.Digest, error) {
	if s == "" {
		return chunk.Digest{}, nil
	}
	d, err := chunk.Parse(s)
	if err != nil || d.Algorithm != chunk.SHA256 {
		kind := index.ErrCorrupt
		if !strings.HasPrefix(s, "sha256:") {
			kind = index.ErrUnsupported
		}
		return d, b.errorf(kind, "%q has digest %q, want sha256:<64 hex>", cut(f.path), cut(s))
	}
	return d, nil
}

// closeFile ends the file that chunks were added to.
func (b *builder) closeFile() error {
	f := b.file
	if f == nil {
		return nil
	}
	b.file = nil
	if f.next != f.size {
		return b.errorf(index.ErrCorrupt, "%q has %d bytes, but chunks for %d", cut(f.path), f.size, f.next)
	}
	if f.size > 0 {
		b.pieces[f.end-1].until = f.until
		if f.ino != nil {
			b.files = append(b.files, *f)
		}
	}
	return nil
}

// place makes spans of the pieces, and gives files their extents.
func (b *builder) place() error {
	order := make([]*piece, len(b.pieces))
	for i := range b.pieces {
		order[i] = &b.pieces[i]
	}
	slices.SortFunc(order, func(x, y *piece) int {
		return cmp.Or(cmp.Compare(x.off, y.off), cmp.Compare(x.inner, y.inner))
	})
	var blob index.Blob
	for len(order) > 0 {
		n := 1
		for n < len(order) && order[n].off == order[0].off {
			n++
		}
		next := b.stored.End
		if n < len(order) {
			next = order[n].off
		}
		if err := b.span(&blob, order[:n], next); err != nil {
			return err
		}
		order = order[n:]
	}
	b.out.Spans = blob.Spans
	for i := range b.files {
		if err := b.extents(&b.files[i]); err != nil {
			return err
		}
	}
	return nil
}

// A byte of deflate makes at most 1032 bytes, and 4 of zstd, a block of one
// repeated byte, 128 KiB.
var expansion = map[chunk.Codec]int64{chunk.Gzip: 1032, chunk.Zstd: 128 << 10 / 4}

// span adds the span that has the pieces of one member or frame, before another
// one at next.
func (b *builder) span(blob *index.Blob, pieces []*piece, next int64) error {
	s := index.Span{Offset: pieces[0].off, Length: next - pieces[0].off, Codec: b.stored.Codec}
	for _, p := range pieces {
		if p.inner < s.Size {
			return b.errorf(index.ErrCorrupt, "two chunks at offset %d, %d and %d in it, share bytes", p.off, s.Size, p.inner)
		}
		s.Size = p.inner + p.size
		if p.until != 0 && len(pieces) == 1 {
			if p.until <= s.Offset || p.until > next {
				return b.errorf(index.ErrCorrupt, "the chunk at offset %d ends at %d, want at most %d", s.Offset, p.until, next)
			}
			s.Length = p.until - s.Offset
		}
	}
	if s.Size/expansion[s.Codec] > s.Length || s.Size > math.MaxInt64/2-blob.StreamSize() {
		return b.errorf(index.ErrCorrupt, "chunks of %d bytes at offset %d, which %d stored bytes cannot hold", s.Size, s.Offset, s.Length)
	}
	// Headers of many empty files may follow, of which nothing is needed: what
	// does not get smaller gets larger by less than a 64th, and no decoder reads
	// more than 128 KiB ahead.
	s.Length = min(s.Length, s.Size+s.Size/64+256<<10)
	if s.Whole() {
		s.Length = min(s.Length, chunk.MaxSize+chunk.MaxSize/64)
	}
	start := blob.Append(s)
	for _, p := range pieces {
		p.pos, p.span, p.alone = start+p.inner, len(blob.Spans)-1, len(pieces) == 1
	}
	return nil
}

// extents gives a file its content: chunk by chunk as the table has them, or, if
// they lie where no block begins, as one.
func (b *builder) extents(f *file) error {
	pieces := b.pieces[f.first:f.end]
	problem := unfit(pieces)
	if problem == "" {
		f.ino.Extents = make([]index.Extent, 0, len(pieces))
		for i := range pieces {
			p := &pieces[i]
			if p.zeros && len(pieces) > 1 {
				continue // a hole
			}
			if err := b.extent(f, p.at, p.digest, p.size, p.pos); err != nil {
				return err
			}
		}
		return nil
	}
	if f.size > maxOne && b.proved(pieces) {
		return b.recut(f, pieces)
	}
	whole := f.size <= chunk.MaxSize && f.digest != (chunk.Digest{}) && pieces[len(pieces)-1].span-pieces[0].span < index.MaxSpans
	for i := 1; i < len(pieces); i++ {
		whole = whole && pieces[i].pos == pieces[i-1].pos+pieces[i-1].size
	}
	if !whole {
		return b.errorf(index.ErrUnsupported, "%q, %d bytes, %s", cut(f.path), f.size, problem)
	}
	return b.extent(f, 0, f.digest, f.size, pieces[0].pos)
}

// maxOne is the size up to which a file whose chunks do not fit is one chunk with the
// file's digest, to be fetched as a whole. Larger ones are cut again.
const maxOne = 1 << 20

// proved tells whether the pieces of a file are frames of which the table has the
// digest of what they decode to, one behind the other.
func (b *builder) proved(pieces []piece) bool {
	for i := range pieces {
		p := &pieces[i]
		if b.stored.Codec != chunk.Zstd || !p.alone || p.inner != 0 || p.digest == (chunk.Digest{}) || p.size > chunk.MaxSize ||
			i > 0 && p.pos != pieces[i-1].pos+pieces[i-1].size {
			return false
		}
	}
	return true
}

// recut cuts a file as we cut all files, whatever it has been cut into. The bytes need
// no digest that are cut from what has one.
func (b *builder) recut(f *file, pieces []piece) error {
	for i := range pieces {
		b.out.Spans[pieces[i].span].Proof = &index.Proof{Stored: pieces[i].digest.Sum}
	}
	first := pieces[0].pos
	// A few hundred bytes of a table can stand for a lot of them.
	if b.entries += int(f.size / chunk.Size); b.entries > b.lim.Entries {
		return b.errorf(index.ErrLimit, "%q: more than %d entries, and pieces of large files (Entries)", cut(f.path), b.lim.Entries)
	}
	for at := int64(0); at < f.size; at += chunk.Size {
		end := min(at+chunk.Size, f.size)
		for pieces[0].at+pieces[0].size <= at {
			pieces = pieces[1:]
		}
		// The name says all that decides the content: it is another one where a
		// table says something else.
		h := sha256.New()
		fmt.Fprintf(h, "zstd:chunked\n%d %d\n", at-pieces[0].at, end-at)
		zeros := true
		for i := 0; i < len(pieces) && pieces[i].at < end; i++ {
			fmt.Fprintf(h, "%s %d\n", pieces[i].digest, pieces[i].size)
			zeros = zeros && pieces[i].zeros
		}
		if zeros {
			continue // a hole
		}
		d := chunk.Digest{Algorithm: chunk.Origin, Sum: [32]byte(h.Sum(nil))}
		if err := b.extent(f, at, d, end-at, first+at); err != nil {
			return err
		}
	}
	return nil
}

// unfit tells why chunks of a file cannot be addressed each for itself.
func unfit(pieces []piece) string {
	for i := range pieces {
		p := &pieces[i]
		switch hole := p.zeros && len(pieces) > 1; {
		case p.at%blockSize != 0:
			return "is cut at offsets that are no multiples of 4096"
		case p.size > chunk.MaxSize && !hole:
			return "has chunks of more than 16 MiB"
		case p.digest == (chunk.Digest{}) && !hole:
			return "has chunks without a digest"
		}
	}
	return ""
}

// blockSize is what content is addressed by.
const blockSize = 4096

func (b *builder) extent(f *file, at int64, d chunk.Digest, size, pos int64) error {
	n, ok := b.known[d]
	if !ok {
		n = uint32(len(b.out.Chunks))
		b.known[d] = n
		b.out.Chunks = append(b.out.Chunks, index.Chunk{Digest: d, Size: uint32(size), Offset: pos})
	} else if c := &b.out.Chunks[n]; int64(c.Size) != size {
		return b.errorf(index.ErrCorrupt, "%q: content %s has %d bytes, elsewhere %d", cut(f.path), d, size, c.Size)
	}
	f.ino.Extents = append(f.ino.Extents, index.Extent{Off: at, Chunk: n})
	return nil
}
