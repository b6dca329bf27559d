package script

import (
	"math/rand/v2"
	"time"
)

// Random makes a script of n faults, of the network and of the disk, each of another
// kind, that begin in the first second, if not at once, and end within three, if they do; a disk that hangs does not
// do so for ever, as whoever reads would. What one seed makes is always the same.
func Random(seed uint64, n int) *Script {
	r := rand.New(rand.NewPCG(seed, 0))
	s := &Script{}
	for _, i := range r.Perm(len(chances))[:min(n, len(chances))] {
		c := chances[i]
		f := Fault{Kind: c.kind}
		for k, a := range kinds[c.kind].args {
			f.Args[k] = a.value
			if c.args[k] != nil {
				f.Args[k] = c.args[k][r.IntN(len(c.args[k]))]
			}
		}
		lasts := kinds[c.kind].lasts || kinds[c.kind].disk
		span := func(tenths int) Span {
			if r.IntN(2) == 0 && !lasts {
				return Span{Requests: 1 + r.IntN(20)}
			}
			return Span{Time: time.Duration(1+r.IntN(tenths)) * 100 * time.Millisecond}
		}
		if c.kind != "quota" { // the node has it from the beginning
			if r.IntN(2) == 0 {
				f.After = span(10)
			}
			if r.IntN(4) > 0 || c.kind == "disk hangs" {
				f.For = span(30)
			}
		}
		if !lasts {
			if r.IntN(3) == 0 {
				f.Every = 2 + r.IntN(4)
			}
			f.On = []string{"", "", "all", "manifests"}[r.IntN(4)]
		}
		s.Faults = append(s.Faults, f)
	}
	return s
}

// chances are what a script by chance is made of, and with which arguments.
var chances = []struct {
	kind string
	args [2][]int64
}{
	{"status", [2][]int64{{400, 401, 403, 404, 408, 416, 429, 500, 502, 503, 504}, {0, 0, int64(time.Second), int64(2 * time.Second)}}},
	{"late", [2][]int64{{int64(50 * time.Millisecond), int64(700 * time.Millisecond), int64(4 * time.Second)}}},
	{kind: "hang headers"},
	{kind: "drop"},
	{kind: "refuse"},
	{kind: "page"},
	{"slow", [2][]int64{{1e3, 10e3, 200e3}}},
	{"hang body", [2][]int64{{0, 1, 1e3, 100e3}}},
	{"cut", [2][]int64{{0, 1, 1e3, 100e3}}},
	{"reset", [2][]int64{{0, 1, 1e3, 100e3}}},
	{"short", [2][]int64{{1, 1e3, 100e3}}},
	{"long", [2][]int64{{1, 1e3, 1e6}}},
	{"flip", [2][]int64{{1e3, 64e3, 1e6}}},
	{kind: "zeros"},
	{kind: "other bytes"},
	{kind: "wrong range"},
	{kind: "no range"},
	{kind: "ignore range"},
	{kind: "encoded"},
	{"tokens", [2][]int64{{int64(100 * time.Millisecond), int64(time.Second)}, {401, 403}}},
	{"signed", [2][]int64{{int64(100 * time.Millisecond), int64(time.Second)}, {400, 403, 404}}},
	{kind: "disk full"},
	{kind: "disk read errors"},
	{kind: "disk write errors"},
	{kind: "disk hangs"},
	{kind: "disk read-only"},
	{"quota", [2][]int64{{1e6, 4e6, 10e6, 100e6}}},
}
