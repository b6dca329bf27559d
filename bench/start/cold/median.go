package cold

import (
	"slices"
	"time"
)

// Median takes each figure's median by itself. costs must not be empty.
func Median(costs []Cost) Cost {
	mid := func(get func(Cost) int64) int64 {
		v := make([]int64, len(costs))
		for i, c := range costs {
			v[i] = get(c)
		}
		slices.Sort(v)
		return v[len(v)/2]
	}
	return Cost{
		Bytes:    mid(func(c Cost) int64 { return c.Bytes }),
		Disk:     mid(func(c Cost) int64 { return c.Disk }),
		Requests: int(mid(func(c Cost) int64 { return int64(c.Requests) })),
		Stalls:   int(mid(func(c Cost) int64 { return int64(c.Stalls) })),
		First:    time.Duration(mid(func(c Cost) int64 { return int64(c.First) })),
	}
}
