// Package trace is what runs of an image have read of it: block by block, in the
// order of their first reads, with the names of the files.
//
//	trace.go    the model, and how traces merge
//	encode.go   JSON: docs/formats/trace.md
//	resolve.go  from what a mount has recorded to chunks and files
//
// A trace speaks of chunks and their digests, so it means the same on every node
// and in every form of an image. It knows no registry and no service.
package trace

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/shale-image/shale/chunk"
)

// Trace is what runs of one image have read.
type Trace struct {
	Manifest string // digest of the image's manifest
	Runs     []Run
	Blocks   []Block // in the order of their first reads; each once
}

// Run is one run that a trace is of.
type Run struct {
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
	Path   string        // of a file that has it, relative to the root; the first by name
	Offset int64         // of the block in that file
	Others int           // files that have it besides
	At     time.Duration // of the first read, since the image was mounted
	Wait   time.Duration // that the first reader waited
	Runs   int           // how many runs have read it
}

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
// somebody waited is taken from there too.
func Merge(all ...*Trace) (*Trace, error) {
	if len(all) == 0 {
		return nil, errors.New("no trace to merge")
	}
	out := &Trace{Manifest: all[0].Manifest}
	type place struct {
		rank, trace int
		Block
	}
	at := map[key]*place{}
	var places []*place
	for n, t := range all {
		if t.Manifest != out.Manifest {
			return nil, fmt.Errorf("%w: %s and %s", ErrMismatch, out.Manifest, t.Manifest)
		}
		out.Runs = append(out.Runs, t.Runs...)
		for rank, b := range t.Blocks {
			k := key{b.Chunk, b.Index}
			p := at[k]
			if p == nil {
				p = &place{rank, n, b}
				at[k], places = p, append(places, p)
				continue
			}
			runs := p.Runs + b.Runs
			if rank < p.rank {
				*p = place{rank, n, b}
			}
			p.Runs = runs
		}
	}
	slices.SortStableFunc(places, func(a, b *place) int {
		return cmp.Or(cmp.Compare(a.rank, b.rank), cmp.Compare(a.trace, b.trace))
	})
	for _, p := range places {
		out.Blocks = append(out.Blocks, p.Block)
	}
	return out, nil
}

// Bytes adds up the blocks.
func (t *Trace) Bytes() (n int64) {
	for i := range t.Blocks {
		n += t.Blocks[i].Bytes()
	}
	return n
}

// Files lists the files that were read, in the order of their first reads. Of
// files that have all of what was read in common, one is named.
func (t *Trace) Files() (paths []string) {
	seen := map[string]bool{}
	for i := range t.Blocks {
		if p := t.Blocks[i].Path; !seen[p] {
			seen[p] = true
			paths = append(paths, p)
		}
	}
	return paths
}
