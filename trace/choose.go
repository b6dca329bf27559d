package trace

import (
	"cmp"
	"slices"
	"time"
)

// ByCommand sorts the runs by what they have run, and returns the trace of each: the
// commands that ran most often first. What only runs have read that are forgotten is in
// none of them.
func (t *Trace) ByCommand() []*Trace {
	var sets []Set
	for i, r := range t.Runs {
		k := slices.IndexFunc(sets, func(s Set) bool { return slices.Equal(t.Runs[s.first()].Command, r.Command) })
		if k < 0 {
			k, sets = len(sets), append(sets, 0)
		}
		sets[k] |= 1 << i
	}
	var all []*Trace
	for _, s := range sets {
		all = append(all, t.of(s))
	}
	slices.SortStableFunc(all, func(a, b *Trace) int {
		return cmp.Or(cmp.Compare(len(b.Runs), len(a.Runs)), slices.Compare(a.Runs[0].Command, b.Runs[0].Command))
	})
	return all
}

// of is what some of the runs have read.
func (t *Trace) of(runs Set) *Trace {
	out := &Trace{Manifest: t.Manifest}
	for i, r := range t.Runs {
		if runs.Has(i) {
			out.Runs = append(out.Runs, r)
		}
	}
	for _, b := range t.Blocks {
		var by Set
		for i, n := 0, 0; i < len(t.Runs); i++ {
			if runs.Has(i) {
				if b.By.Has(i) {
					by |= 1 << n
				}
				n++
			}
		}
		if by != 0 {
			b.By, b.Runs = by, by.Len()
			out.Blocks = append(out.Blocks, b)
		}
	}
	return out
}

// Start is what starts need: blocks that so large a share of the runs has read, and
// that were first read before that time, 0 being any.
func (t *Trace) Start(share float64, before time.Duration) *Trace {
	out := &Trace{Manifest: t.Manifest, Runs: t.Runs}
	for _, b := range t.Blocks {
		if float64(b.Runs) >= share*float64(len(t.Runs)) && (before == 0 || b.At < before) {
			out.Blocks = append(out.Blocks, b)
		}
	}
	return out
}
