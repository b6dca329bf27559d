// Package zframe reads zstd streams (RFC 8878) frame by frame, so that who reads one knows
// where each begins and what it asks for before anything is allocated for it, and makes
// them random access at the blocks of their frames: it tells, while a stream is read from
// its start, from where a span of it can be decoded later without what is before, and
// decodes such spans.
//
// A frame is a row of blocks of up to 128 KiB of content. Between two of them a decoder
// has a state: what it decoded last, up to 8 MiB of it as most tools have it, which matches
// copy; three offsets, and up to four tables that a block may use again. A span
// copies little of the many bytes before it, a tenth of its own size, so the state that
// is kept for a span has those alone:
//
//	stored     |head| block | block | block | block | block |sum|head| block |
//	spans       0            1               2                   3 (no state)
//	decoded    |--- span ---|---- span -----|---- span -----|----------|
//
// Each span is decoded by itself, with its state.
//
//	reader.go   frame by frame, by a library's decoder
//	cutter.go   where spans begin, and their states
//	state.go    a state as bytes
//	decode.go   a span by its state
//	block.go    what is in a block; fse.go, huffman.go, bits.go: by what codes
//
// The package knows nothing of what is in the stream or where the states are kept.
package zframe

// MaxBlock is the most that a block has, stored or decoded.
const MaxBlock = 128 << 10

// MaxSpan is the most that a span decodes to.
const MaxSpan = 1 << 20

// MaxState is the size of the largest state: it has no content twice, and some tables.
const MaxState = MaxSpan + 1<<10

// name is what errors call the stream.
const name = "zstd"
