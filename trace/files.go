package trace

import (
	"fmt"
	"time"
)

// File is what was read of one file.
type File struct {
	Path   string
	Blocks []Block       // of the trace, in its order
	At     time.Duration // of the first
	Wait   time.Duration // of all
	Bytes  int64
	By     Set      // runs that have read some of it
	Others int      // of those files that have some of it too, the most a block has
	Also   []string // some of these
}

// ByFile sorts the blocks by files, which stand in the order of their first reads.
func (t *Trace) ByFile() []*File {
	var all []*File
	of := map[string]*File{}
	for _, b := range t.Blocks {
		f := of[b.Path]
		if f == nil {
			f = &File{Path: b.Path, At: b.At}
			of[b.Path], all = f, append(all, f)
		}
		f.Blocks = append(f.Blocks, b)
		f.At = min(f.At, b.At)
		f.Wait += b.Wait
		f.Bytes += b.Bytes()
		f.By |= b.By
		if b.Others > f.Others {
			f.Others, f.Also = b.Others, b.Also
		}
	}
	return all
}

// Shared tells whether other files have all of what was read of this one: perhaps
// it was they that were read.
func (f *File) Shared() bool {
	for _, b := range f.Blocks {
		if b.Others == 0 {
			return false
		}
	}
	return true
}

// Wait adds up what readers have waited; several may have at a time.
func (t *Trace) Wait() (sum time.Duration) {
	for i := range t.Blocks {
		sum += t.Blocks[i].Wait
	}
	return sum
}

// Summary says in a line how much there is.
func (t *Trace) Summary() string {
	files := map[string]bool{}
	for i := range t.Blocks {
		files[t.Blocks[i].Path] = true
	}
	runs, ahead := "1 run", 0
	if len(t.Runs) != 1 {
		runs = fmt.Sprintf("%d runs", len(t.Runs))
	}
	s := fmt.Sprintf("%s: %d files, %d blocks, %.1f MB read%s", runs, len(files), len(t.Blocks), float64(t.Bytes())/1e6, waited(t.Wait()))
	for _, r := range t.Runs {
		ahead = max(ahead, r.ReadAhead)
	}
	if ahead > 4 {
		s += fmt.Sprintf("; the kernel read ahead (%d KiB)", ahead)
	}
	return s
}
