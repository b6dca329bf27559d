package index

import "github.com/shale-image/shale/chunk"

// Reads are what files of a tree consist of, and what of it need not be fetched.
type Reads struct {
	Chunks []uint32               // positions in Tree.Chunks, of equal ones one
	Here   func(n int) bool       // whether the content of Chunks[n] is here; nil: none is
	Local  func(blob uint32) bool // whether a blob is here, as those are that have Data; nil: none is
}

// Cost is what reads take of a blob, in stored bytes, the windows that they need
// included.
type Cost struct {
	Once int64 // for what is not here, if each stored byte comes once

	// Most bounds that for reads of single pieces in whatever order. Who reads a chunk
	// gets all that its spans decode to, but chunks that they share with the spans
	// around: for these they come again.
	Most int64

	Read     int64 // what the read of one chunk, here or not, waits for at most
	Pieces   int   // that have chunks, and cannot be had in part
	OneFrame bool  // all chunks are in one zstd frame: whatever is read, all of it comes
}

// Costs returns what reads take, by blob.
func (t *Tree) Costs(r Reads) []Cost {
	local := func(blob uint32) bool { return t.Blobs[blob].Data != nil || r.Local != nil && r.Local(blob) }
	window := func(s *Span) int64 {
		if s.Window.Length == 0 || local(s.Window.Blob) {
			return 0
		}
		return int64(s.Window.Length)
	}
	const (
		used   = 1 << iota // by any chunk
		wanted             // by one that is not here
		inside             // by one that is not here, and in no other span
	)
	out, marks, parts := make([]Cost, len(t.Blobs)), make([][]uint8, len(t.Blobs)), make([]bool, len(t.Blobs))
	for n, x := range r.Chunks {
		c := &t.Chunks[x]
		if local(c.Blob) {
			continue
		}
		b, o, here := &t.Blobs[c.Blob], &out[c.Blob], r.Here != nil && r.Here(n)
		if marks[c.Blob] == nil {
			marks[c.Blob] = make([]uint8, len(b.Spans))
		}
		cover := b.Cover(c.Offset, c.End())
		mark := marks[c.Blob][b.Find(c.Offset):]
		_, length := Stored(cover, c.Offset, c.End())
		if w, _, n := Beside(cover); n > 0 && !local(w) {
			length += n
		}
		o.Read = max(o.Read, length)
		for i := range cover {
			s := &cover[i]
			if s.Divisible() {
				parts[c.Blob] = true
				if !here {
					o.Once += min(s.End(), c.End()) - max(s.Start, c.Offset)
				}
				continue
			}
			if mark[i]&used == 0 {
				o.Pieces++
				o.OneFrame = o.Pieces == 1 && s.Codec == chunk.Zstd
			}
			if !here && mark[i]&wanted == 0 {
				mark[i] |= wanted
				o.Once += s.Length + window(s)
			}
			mark[i] |= used
		}
		switch {
		case here:
		case len(cover) > 1 || cover[0].Divisible():
			o.Most += length
		case mark[0]&inside == 0:
			mark[0] |= inside
			o.Most += length
		}
	}
	for i := range out {
		out[i].OneFrame = out[i].OneFrame && !parts[i]
	}
	return out
}
