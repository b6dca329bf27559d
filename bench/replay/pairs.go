package main

import (
	"fmt"
	"slices"
	"time"
)

// pairs starts with and without a recorder of what is read, by turns and each
// first in every other turn, so that what else the machine does meets both alike.
// It prints the medians of both, and of the differences of the pairs, with their
// quartiles.
func (x *experiment) pairs(layout string, n int) error {
	defer x.close()
	if err := x.open(layout); err != nil {
		return err
	}
	var took [2][]float64
	var more []float64
	for i := range n {
		var pair [2]time.Duration
		for k := range pair {
			on := (i + k) % 2
			x.fill.Unrecorded = on == 0
			r, err := x.run()
			if err != nil {
				return err
			}
			pair[on] = r.end
		}
		for on := range pair {
			took[on] = append(took[on], pair[on].Seconds())
		}
		more = append(more, (pair[1] - pair[0]).Seconds())
	}
	at := func(v []float64, part float64) float64 {
		slices.Sort(v)
		return v[int(part*float64(len(v)-1)+0.5)]
	}
	off, on := at(took[0], 0.5), at(took[1], 0.5)
	fmt.Printf("%d pairs: without %.3f s, with %.3f s; difference %+.1f %% (quartiles %+.1f, %+.1f)\n",
		n, off, on, 100*at(more, 0.5)/off, 100*at(more, 0.25)/off, 100*at(more, 0.75)/off)
	return nil
}
