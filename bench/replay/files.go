package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/link"
)

// use is what was read of a file, and what was fetched of it, in bytes.
type use struct {
	path                string
	size                int64
	read                int64 // in pages of 4 KiB
	asked, came         int64 // chunks that were read a part of, chunks that are here
	askedStored, stored int64 // the same as they are stored, about
	parts               string
}

func (u use) String() string {
	return fmt.Sprintf("%10d %9d %9d %9d %9d %9d  %s %s", u.size, u.read, u.asked, u.came, u.askedStored, u.stored, u.path, u.parts)
}

// uses says for each file of a linked image what the reads of it were.
func uses(l *link.Image, events []event, here func(link.Chunk) bool) ([]use, error) {
	pages := map[int64]bool{}
	for _, e := range events {
		if e.kind == "hit" || e.kind == "read" {
			for p := e.off / 4096; p*4096 < e.off+e.n; p++ {
				pages[p] = true
			}
		}
	}
	tree, err := l.Tree()
	if err != nil {
		return nil, err
	}
	var list []use
	done := map[uint32]bool{}
	err = tree.Walk(func(path string, ino *index.Inode) error {
		u := use{path: path, size: ino.Size}
		var parts strings.Builder
		for _, x := range ino.Extents {
			if done[x.Chunk] {
				continue
			}
			done[x.Chunk] = true
			c := l.Chunk(int(x.Chunk))
			n := 0
			for p := c.Flat / 4096; p*4096 < c.Flat+int64(c.Size); p++ {
				if pages[p] {
					n++
				}
			}
			u.read += int64(n) * 4096
			mark := "."
			if here(c) {
				u.came += int64(c.Size)
				u.stored += l.StoredShare(c)
				mark = "-"
			}
			if n > 0 {
				u.asked += int64(c.Size)
				u.askedStored += l.StoredShare(c)
				mark = fmt.Sprint(min(9, n*10/32))
			}
			parts.WriteString(mark)
		}
		if u.came > 0 {
			u.parts = parts.String()
			list = append(list, u)
		}
		return nil
	})
	slices.SortFunc(list, func(a, b use) int { return int(b.stored - a.stored) })
	sum := use{path: "sum"}
	for _, u := range list {
		sum.size += u.size
		sum.read += u.read
		sum.asked += u.asked
		sum.came += u.came
		sum.askedStored += u.askedStored
		sum.stored += u.stored
	}
	return append(list, sum), err
}
