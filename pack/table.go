package pack

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"slices"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// The table, before it is compressed:
//
//	chunks uvarint, runs uvarint
//	algorithms  1 B x chunks       1 BLAKE3, 2 SHA-256
//	sizes       uvarint x chunks
//	sums        32 B x chunks
//	runs        (chunk, first, count) uvarint x runs
//
// Chunks stand in the order in which their first runs do. The chunk of a run is
// what has to be added to that of the run before, in zigzag, so that a new chunk
// is mostly 2.

func (t *Table) encode() []byte {
	b := binary.AppendUvarint(nil, uint64(len(t.Chunks)))
	b = binary.AppendUvarint(b, uint64(len(t.Runs)))
	for _, c := range t.Chunks {
		b = append(b, byte(c.Digest.Algorithm))
	}
	for _, c := range t.Chunks {
		b = binary.AppendUvarint(b, uint64(c.Size))
	}
	for _, c := range t.Chunks {
		b = append(b, c.Digest.Sum[:]...)
	}
	at := 0
	for _, r := range t.Runs {
		b = binary.AppendVarint(b, int64(r.Chunk-at))
		b = binary.AppendUvarint(b, uint64(r.First))
		b = binary.AppendUvarint(b, uint64(r.Count))
		at = r.Chunk
	}
	return b
}

// decodeTable reads a table and checks that its runs make sense: no chunk and no block
// comes twice, chunks are in order, and one that has no proof of its parts comes whole.
func decodeTable(b []byte, name string) (*Table, error) {
	d := decoder{b: b, name: name}
	chunks, runs := d.uvarint(maxChunks), d.uvarint(maxRuns)
	if d.err == nil && (chunks*34 > len(b) || runs*3 > len(b)) {
		d.fail("%d chunks and %d runs in %d bytes", chunks, runs, len(b))
	}
	if d.err != nil {
		return nil, d.err
	}
	t := &Table{Chunks: make([]Chunk, chunks), Runs: make([]Run, runs)}
	for i := range t.Chunks {
		a := chunk.Algorithm(d.bytes(1)[0])
		if a != chunk.BLAKE3 && a != chunk.SHA256 {
			d.fail("digest algorithm %d", a)
		}
		t.Chunks[i].Digest.Algorithm = a
	}
	for i := range t.Chunks {
		n := d.uvarint(chunk.MaxSize)
		if n == 0 {
			d.fail("an empty chunk")
		}
		t.Chunks[i].Size = uint32(n)
	}
	for i := range t.Chunks {
		copy(t.Chunks[i].Digest.Sum[:], d.bytes(32))
	}
	at, known := 0, 0
	for i := range t.Runs {
		r := &t.Runs[i]
		at += d.varint()
		r.Chunk, r.First, r.Count = at, d.uvarint(maxBlocks), d.uvarint(maxBlocks)
		if d.err != nil {
			break
		}
		if r.Chunk < 0 || r.Chunk > known || r.Chunk == chunks {
			d.fail("run %d is of chunk %d of %d, where %d is next", i, r.Chunk, chunks, known)
			break
		}
		c := t.Chunks[r.Chunk]
		n := chunk.Blocks(c.Size)
		known = max(known, r.Chunk+1)
		if r.Count == 0 || r.First+r.Count > n || r.Count < n && c.Digest.Algorithm != chunk.BLAKE3 {
			d.fail("run %d has %d blocks from %d on of the %d of chunk %s", i, r.Count, r.First, n, c.Digest)
			break
		}
	}
	if d.err == nil && known != chunks {
		d.fail("%d chunks, %d of them in runs", chunks, known)
	}
	if d.err == nil && d.at != len(b) {
		d.fail("%d bytes behind the last run", len(b)-d.at)
	}
	if d.err != nil {
		return nil, d.err
	}
	if n := t.sumsSize(); n > maxSums {
		return nil, index.Errorf(index.ErrLimit, name, -1, "%d bytes of sums, at most %d are read", n, maxSums)
	}
	if err := t.once(name); err != nil {
		return nil, err
	}
	return t, nil
}

// once looks for what comes twice.
func (t *Table) once(name string) error {
	chunks := make([]int32, len(t.Chunks))
	for i := range chunks {
		chunks[i] = int32(i)
	}
	slices.SortFunc(chunks, func(a, b int32) int { return bytes.Compare(t.Chunks[a].Digest.Sum[:], t.Chunks[b].Digest.Sum[:]) })
	for i := 1; i < len(chunks); i++ {
		if a, b := t.Chunks[chunks[i-1]].Digest, t.Chunks[chunks[i]].Digest; a.Sum == b.Sum {
			return index.Errorf(index.ErrCorrupt, name+": table", -1, "chunk %s is there again, as %s", a, b)
		}
	}
	runs := slices.Clone(t.Runs)
	slices.SortFunc(runs, func(a, b Run) int { return cmp.Or(a.Chunk-b.Chunk, a.First-b.First) })
	for i := 1; i < len(runs); i++ {
		if a, b := runs[i-1], runs[i]; a.Chunk == b.Chunk && a.First+a.Count > b.First {
			return index.Errorf(index.ErrCorrupt, name+": table", -1, "block %d of chunk %s is there again", b.First, t.Chunks[b.Chunk].Digest)
		}
	}
	return nil
}

const maxBlocks = chunk.MaxSize / chunk.Block

// decoder reads values until the first that is wrong.
type decoder struct {
	b    []byte
	at   int
	name string
	err  error
}

func (d *decoder) fail(format string, args ...any) {
	if d.err == nil {
		d.err = index.Errorf(index.ErrCorrupt, d.name+": table", int64(d.at), format, args...)
	}
}

func (d *decoder) uvarint(limit int) int {
	v, n := binary.Uvarint(d.b[d.at:])
	if n <= 0 || v > uint64(limit) {
		d.fail("no number, or %d, which is more than %d", v, limit)
		return 0
	}
	d.at += n
	return int(v)
}

func (d *decoder) varint() int {
	v, n := binary.Varint(d.b[d.at:])
	if n <= 0 || v > maxChunks || v < -maxChunks {
		d.fail("no number, or %d, which is beyond %d", v, maxChunks)
		return 0
	}
	d.at += n
	return int(v)
}

// bytes returns the next n bytes, zeros if there are none.
func (d *decoder) bytes(n int) []byte {
	if len(d.b)-d.at < n {
		d.fail("%d bytes left, want %d", len(d.b)-d.at, n)
		return make([]byte, n)
	}
	d.at += n
	return d.b[d.at-n : d.at]
}

// proofs returns, for each run, how many sums of blocks stand in front of its
// content: those of all blocks of a chunk, in front of its first run, unless all
// of the chunk is in it.
func (t *Table) proofs() []int {
	out := make([]int, len(t.Runs))
	known := 0
	for i, r := range t.Runs {
		if r.Chunk < known {
			continue
		}
		known++
		if n := chunk.Blocks(t.Chunks[r.Chunk].Size); r.Count < n {
			out[i] = n
		}
	}
	return out
}

// sumsSize is the bytes of all sums in the content.
func (t *Table) sumsSize() (n int64) {
	for _, sums := range t.proofs() {
		n += int64(sums) * int64(len(chunk.BlockSum{}))
	}
	return n
}

// contentSize is what the content decodes to.
func (t *Table) contentSize() int64 {
	n := t.sumsSize()
	for _, r := range t.Runs {
		n += t.Bytes(r)
	}
	return n
}
