package artifact

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"

	"github.com/shale-image/shale/index"
)

// collect numbers the chunks that files refer to.
func (e *encoder) collect() error {
	e.numbers = make([]uint32, len(e.t.Chunks))
	seen := map[*index.Inode]bool{}
	var used func(ino *index.Inode) error
	used = func(ino *index.Inode) error {
		if seen[ino] {
			return nil
		}
		seen[ino] = true
		for _, x := range ino.Extents {
			if int64(x.Chunk) >= int64(len(e.t.Chunks)) {
				return fmt.Errorf("%w: chunk %d of %d", index.ErrCorrupt, x.Chunk, len(e.t.Chunks))
			}
			e.numbers[x.Chunk] = 1
		}
		for _, child := range ino.Children {
			if err := used(child); err != nil {
				return err
			}
		}
		return nil
	}
	if err := used(e.t.Root); err != nil {
		return err
	}
	var order []uint32
	for i, n := range e.numbers {
		if n > 0 {
			if err := e.t.CheckChunk(&e.t.Chunks[i]); err != nil {
				return err
			}
			order = append(order, uint32(i))
		}
	}
	slices.SortFunc(order, func(i, j uint32) int {
		a, b := &e.t.Chunks[i], &e.t.Chunks[j]
		return cmp.Or(cmp.Compare(a.Blob, b.Blob), cmp.Compare(a.Offset, b.Offset), cmp.Compare(a.Size, b.Size),
			cmp.Compare(a.Digest.Algorithm, b.Digest.Algorithm), bytes.Compare(a.Digest.Sum[:], b.Digest.Sum[:]))
	})
	for _, i := range order {
		if n := len(e.chunks); n == 0 || e.chunks[n-1] != e.t.Chunks[i] {
			e.chunks = append(e.chunks, e.t.Chunks[i])
		}
		e.numbers[i] = uint32(len(e.chunks))
	}
	return nil
}

// sums returns the chunks' sums.
func (e *encoder) sums() []byte {
	p := make([]byte, 0, len(e.chunks)*sumSize)
	for i := range e.chunks {
		p = append(p, e.chunks[i].Digest.Sum[:]...)
	}
	return p
}

// blobs adds the blobs. The chunks of an archive, which consists of blocks of
// 512 bytes, have small gaps when they are counted in these.
func (e *encoder) blobs() error {
	rest := e.chunks
	first := uint32(0)
	for i := range e.t.Blobs {
		b := &e.t.Blobs[i]
		if err := e.digest(secBlobs, b.Digest); err != nil {
			return err
		}
		if b.Size < 0 {
			return fmt.Errorf("%w: blob %s of %d bytes", index.ErrCorrupt, b.Digest, b.Size)
		}
		n, unit := 0, int64(512)
		for n < len(rest) && rest[n].Blob == uint32(i) {
			if rest[n].Offset%unit != 0 {
				unit = 1
			}
			n++
		}
		e.uint(secBlobs, uint64(b.Size), uint64(len(b.Spans)), uint64(n), uint64(unit-1))
		e.cursors = append(e.cursors, first)
		end := int64(0)
		for _, c := range rest[:n] {
			e.uint(secSizes, uint64(c.Size))
			e.int(secGaps, (c.Offset-up(end, unit))/unit)
			end = c.End()
		}
		rest = rest[n:]
		first += uint32(n)
	}
	return nil
}

// places adds the algorithms of the chunks' digests, in runs.
func (e *encoder) places() {
	for i := 0; i < len(e.chunks); {
		n, a := i, e.chunks[i].Digest.Algorithm
		for n < len(e.chunks) && e.chunks[n].Digest.Algorithm == a {
			n++
		}
		e.uint(secAlgorithms, uint64(a), uint64(n-i))
		i = n
	}
}

// spans adds the spans of all blobs, column by column.
func (e *encoder) spans() {
	var all []index.Span
	var gaps []int64
	for i := range e.t.Blobs {
		end := int64(0)
		for _, s := range e.t.Blobs[i].Spans {
			all, gaps = append(all, s), append(gaps, s.Offset-end)
			end = s.Offset + s.Length
		}
	}
	for i := range all {
		e.uint(secSpans, uint64(all[i].Codec)|uint64(all[i].Bits)<<4)
	}
	for i := range all {
		e.uint(secSpans, uint64(all[i].Size))
	}
	for i := range all {
		e.uint(secSpans, uint64(all[i].Length))
	}
	for i := range all {
		e.int(secSpans, gaps[i])
	}
	for i := range all {
		if all[i].Windowed() {
			e.uint(secSpans, uint64(all[i].Window.Length))
		}
	}
	end := int64(0)
	for i := range all {
		if w := &all[i].Window; w.Length > 0 {
			e.uint(secSpans, uint64(w.Blob))
			e.int(secSpans, w.Offset-end)
			end = w.Offset + int64(w.Length)
		}
	}
}

// data adds the data of a regular file.
func (e *encoder) data(path string, ino *index.Inode) error {
	type run struct {
		hole  int64
		first uint32
		n     uint32
	}
	var runs []run
	end := int64(0)
	for _, x := range ino.Extents {
		n := e.numbers[x.Chunk] - 1
		if x.Off < end {
			return index.Errorf(index.ErrCorrupt, path, x.Off, "content overlaps that before it, up to %d", end)
		}
		last := len(runs) - 1
		if last >= 0 && x.Off == end && n == runs[last].first+runs[last].n {
			runs[last].n++
		} else {
			runs = append(runs, run{x.Off - end, n, 1})
		}
		end = x.Off + int64(e.chunks[n].Size)
	}
	if ino.Size < end {
		return index.Errorf(index.ErrCorrupt, path, end, "content behind the end of a file of %d bytes", ino.Size)
	}
	whole := ino.Size == end && len(runs) == 1 && runs[0].hole == 0
	switch {
	case ino.Size == 0:
		e.uint(secFiles, 0)
	case whole:
		e.uint(secFiles, uint64(runs[0].n)+1)
	default:
		e.uint(secFiles, 1)
		e.uint(secRuns, uint64(ino.Size), uint64(len(runs)))
	}
	for _, r := range runs {
		if !whole {
			e.uint(secRuns, uint64(r.hole), uint64(r.n))
		}
		blob := e.chunks[r.first].Blob
		e.uint(secStarts, uint64(blob))
		e.int(secStarts, int64(r.first)-int64(e.cursors[blob]))
		e.cursors[blob] = r.first + r.n
	}
	return nil
}

// verify compares what was written with what it is to say.
func (e *encoder) verify(p []byte, info Info, lim index.Limits) error {
	t, i, err := Decode(p, "index", lim)
	if err != nil {
		return err
	}
	if err := index.Equal(e.t, t); err != nil {
		return err
	}
	same := slices.Equal(e.chunks, t.Chunks) && i.Manifest == info.Manifest && slices.Equal(i.DiffIDs, info.DiffIDs) &&
		slices.EqualFunc(e.t.Blobs, t.Blobs, func(a, b index.Blob) bool {
			return a.Digest == b.Digest && a.Size == b.Size && slices.EqualFunc(a.Spans, b.Spans, func(x, y index.Span) bool {
				if x.Window.Length == 0 {
					x.Window = index.Window{}
				}
				return x == y
			})
		})
	if !same {
		return fmt.Errorf("%w: the index written does not say what it should", index.ErrCorrupt)
	}
	return nil
}
