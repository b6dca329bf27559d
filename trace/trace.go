// Package trace is what runs of an image have read of it: block by block, in the
// order of their first reads, with the names of the files.
//
//	trace.go    the model, and how traces merge
//	encode.go   JSON: docs/formats/trace.md
//	decode.go   and back, from anybody
//	files.go    what was read of each file
//	choose.go   what of it is of use at a start
//	resolve.go  from what a mount has recorded to chunks and files
//	svg.go      a picture of it
//
// A trace speaks of chunks and their digests, so it means the same on every node
// and in every form of an image. It knows no registry and no service.
package trace

import (
	"cmp"
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"time"

	"github.com/shale-image/shale/chunk"
)

// Bounds of a trace. What is beyond them Merge leaves out.
const (
	MaxRuns   = 64      // that are told apart: the last ones
	MaxBlocks = 1 << 18 // 4 GiB of content
	maxAlso   = 8       // files that are named besides
)

// Trace is what runs of one image have read.
type Trace struct {
	Manifest string  // digest of the image's manifest
	Runs     []Run   // at most MaxRuns, by when they started
	Blocks   []Block // in the order of their first reads; each once
}

// Run is one run that a trace is of.
type Run struct {
	ID        string    `json:"id"` // no other run has it: traces with runs in common merge without counting them twice
	Command   []string  `json:"command,omitempty"`
	Started   time.Time `json:"started"`
	Arch      string    `json:"arch,omitempty"`
	CPU       string    `json:"cpu,omitempty"`  // model: libraries choose code by it
	ReadAhead int       `json:"readahead_kib"`  // of the kernel: blocks that nobody asked for are among those read
	Lost      bool      `json:"lost,omitempty"` // more was read than is recorded
}

// Block is 16 KiB of a file, at most (chunk.Block).
type Block struct {
	Chunk  chunk.Digest
	Size   uint32        // of the chunk
	Index  int           // of the block in the chunk
	Path   string        // of the file that was read, relative to the root; of several that have the block the likeliest
	Offset int64         // of the block in that file
	Others int           // files that have it besides
	Also   []string      // some of these, by name
	At     time.Duration // of the first read, since the image was mounted
	Wait   time.Duration // that the first reader waited
	Runs   int           // how many of Trace.Runs have read it; 0 if only earlier ones have
	By     Set           // which
}

// Set is some of the runs of a trace: bit i is run i.
type Set uint64

// Has tells whether run i is among them.
func (s Set) Has(i int) bool { return s>>i&1 != 0 }

// Len is how many they are.
func (s Set) Len() int { return bits.OnesCount64(uint64(s)) }

func (s Set) first() int { return bits.TrailingZeros64(uint64(s)) }

// Bytes is the size of the block.
func (b *Block) Bytes() int64 { return min(chunk.Block, int64(b.Size)-int64(b.Index)*chunk.Block) }

// ErrMismatch says that traces are of different images.
var ErrMismatch = errors.New("traces of different images")

type key struct {
	chunk chunk.Digest
	index int
}

// Merge makes one trace of several of the same image. Blocks stand in the order
// of the earliest place that any of the traces has them at; when and how long
// somebody waited is taken from there too. To merge a trace again changes
// nothing but, at most, the order, and with it from which trace the times are.
func Merge(all ...*Trace) (*Trace, error) {
	if len(all) == 0 {
		return nil, errors.New("no trace to merge")
	}
	out := &Trace{Manifest: all[0].Manifest}
	for _, t := range all {
		if t.Manifest != out.Manifest {
			return nil, fmt.Errorf("%w: %s and %s", ErrMismatch, out.Manifest, t.Manifest)
		}
		out.Runs = append(out.Runs, t.Runs...)
	}
	number := out.order()
	type place struct {
		rank, trace int
		Block
	}
	at := map[key]*place{}
	var places []*place
	for n, t := range all {
		for rank, b := range t.Blocks {
			b.By = t.renumber(b.By, number)
			k := key{b.Chunk, b.Index}
			p := at[k]
			if p == nil {
				p = &place{rank, n, b}
				at[k], places = p, append(places, p)
				continue
			}
			by := p.By | b.By
			if rank < p.rank {
				*p = place{rank, n, b}
			}
			p.By = by
		}
	}
	slices.SortStableFunc(places, func(a, b *place) int {
		return cmp.Or(cmp.Compare(a.rank, b.rank), cmp.Compare(a.trace, b.trace))
	})
	for _, p := range places {
		p.Runs = p.By.Len()
		out.Blocks = append(out.Blocks, p.Block)
	}
	return out.First(MaxBlocks), nil
}

// First is the trace without what is behind its first n blocks, which the runs that
// have read it have then lost.
func (t *Trace) First(n int) *Trace {
	out := &Trace{Manifest: t.Manifest, Runs: slices.Clone(t.Runs), Blocks: t.Blocks[:min(n, len(t.Blocks))]}
	for _, b := range t.Blocks[len(out.Blocks):] {
		for r := range out.Runs {
			out.Runs[r].Lost = out.Runs[r].Lost || b.By.Has(r)
		}
	}
	return out
}

// order puts the runs in order, each once, and forgets the earliest if there are
// too many. It returns their new numbers.
func (t *Trace) order() map[string]int {
	slices.SortStableFunc(t.Runs, func(a, b Run) int { return cmp.Or(a.Started.Compare(b.Started), cmp.Compare(a.ID, b.ID)) })
	seen := map[string]bool{}
	t.Runs = slices.DeleteFunc(t.Runs, func(r Run) bool {
		again := seen[r.ID]
		seen[r.ID] = true
		return again
	})
	t.Runs = t.Runs[max(0, len(t.Runs)-MaxRuns):]
	number := map[string]int{}
	for i, r := range t.Runs {
		number[r.ID] = i
	}
	return number
}

// renumber says which runs of another trace a set is.
func (t *Trace) renumber(s Set, number map[string]int) (out Set) {
	for i, r := range t.Runs {
		if n, ok := number[r.ID]; ok && s.Has(i) {
			out |= 1 << n
		}
	}
	return out
}

// Bytes adds up the blocks.
func (t *Trace) Bytes() (n int64) {
	for i := range t.Blocks {
		n += t.Blocks[i].Bytes()
	}
	return n
}
