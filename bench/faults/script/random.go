package script

import (
	"math/rand/v2"
	"time"
)

// Random makes a script of n faults of the network, each of another kind, that begin
// and end at any moment of the first seconds. What one seed makes is always the same.
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
		span := func(requests int) Span {
			if r.IntN(2) == 0 && !kinds[c.kind].lasts {
				return Span{Requests: 1 + r.IntN(requests)}
			}
			return Span{Time: time.Duration(1+r.IntN(30)) * 100 * time.Millisecond}
		}
		if r.IntN(2) == 0 {
			f.After = span(20)
		}
		if r.IntN(4) > 0 {
			f.For = span(20)
		}
		if !kinds[c.kind].lasts {
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
}
