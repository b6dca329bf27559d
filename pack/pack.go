// Package pack is the format of start packs: what a container will read of an
// image, in the order in which it reads it, in one object that is of use while it
// arrives (docs/formats/pack.md):
//
//	header | metadata | table | content
//
// The metadata are the image's index, byte by byte as it is stored elsewhere, so
// that an image can be mounted when they are here. The table says which blocks
// of which chunks follow, the content is these blocks, solid, each with what
// proves it against the digest of its chunk.
//
//	pack.go    layout and bounds
//	build.go   making one
//	table.go   the table
//	read.go    reading one as it arrives
//
// A pack names chunks by digest. Whether an image has such chunks its user must
// ask of an index that is trusted: a pack is not. The package knows no images, no
// registry and no disk.
package pack

import (
	"encoding/binary"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

const (
	magic      = "SHALEPK1"
	headerSize = 64

	// Window is that of the zstd frame of the content: a decoder needs so much
	// memory.
	Window = 8 << 20

	// MaxMetadata bounds the metadata in bytes, MaxSize the whole of a pack, in
	// what it stores and in what that decodes to.
	MaxMetadata = 256 << 20
	MaxSize     = 4 << 30

	maxTable  = 32 << 20 // bytes, decoded
	maxChunks = 1 << 18
	maxRuns   = 1 << 20

	// maxSums bounds all sums of blocks of a pack, in bytes: a reader keeps those of
	// the chunks that it wants. Those of 2^18 chunks that were cut here are half of it.
	maxSums = 64 << 20
)

// Chunk is a chunk that a pack has blocks of.
type Chunk struct {
	Digest chunk.Digest
	Size   uint32 // bytes of all of it
}

// Run is some blocks (chunk.Block) of one chunk, one behind the other.
type Run struct {
	Chunk int // position in Table.Chunks
	First int // block
	Count int
}

// Bytes is the size of a run.
func (t *Table) Bytes(r Run) int64 {
	return min(int64(r.First+r.Count)*chunk.Block, int64(t.Chunks[r.Chunk].Size)) - int64(r.First)*chunk.Block
}

// Table says what a pack has.
type Table struct {
	Chunks []Chunk
	Runs   []Run // as they follow
}

// header is the fixed part in front, little-endian:
//
//	magic 8 | metadata u64 | table stored u32 | table decoded u32 |
//	content decoded u64 | zeros 32
type header struct {
	metadata           int64
	table, tableStored int64
	content            int64
}

func (h *header) encode() []byte {
	b := append(make([]byte, 0, headerSize), magic...)
	le := binary.LittleEndian
	b = le.AppendUint64(b, uint64(h.metadata))
	b = le.AppendUint32(b, uint32(h.tableStored))
	b = le.AppendUint32(b, uint32(h.table))
	b = le.AppendUint64(b, uint64(h.content))
	return b[:headerSize]
}

func decodeHeader(b []byte, name string) (h header, _ error) {
	if string(b[:len(magic)]) != magic {
		return h, index.Errorf(index.ErrCorrupt, name, 0, "not a start pack: it begins with %q, want %q", b[:len(magic)], magic)
	}
	le := binary.LittleEndian
	m, c := le.Uint64(b[8:]), le.Uint64(b[24:])
	h.tableStored, h.table = int64(le.Uint32(b[16:])), int64(le.Uint32(b[20:]))
	switch {
	case m > MaxMetadata:
		return h, index.Errorf(index.ErrLimit, name, 8, "%d bytes of metadata, at most %d are read", m, MaxMetadata)
	case h.tableStored > maxTable || h.table > maxTable:
		return h, index.Errorf(index.ErrLimit, name, 16, "a table of %d bytes, %d decoded, at most %d are read", h.tableStored, h.table, maxTable)
	case c > MaxSize:
		return h, index.Errorf(index.ErrLimit, name, 24, "%d bytes of content, at most %d are read", c, int64(MaxSize))
	}
	for i, x := range b[32:headerSize] {
		if x != 0 {
			return h, index.Errorf(index.ErrUnsupported, name, int64(32+i), "byte %#x, want 0", x)
		}
	}
	h.metadata, h.content = int64(m), int64(c)
	return h, nil
}
