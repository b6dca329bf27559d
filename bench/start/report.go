package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"text/tabwriter"

	"github.com/shale-image/shale/bench/debian"
	"github.com/shale-image/shale/bench/start/cold"
	"github.com/shale-image/shale/replace"
)

// report is all that was measured.
type report struct {
	DelaySeconds float64            `json:"delay_seconds"` // of each request
	Bandwidth    float64            `json:"bandwidth"`     // bits a second
	Compression  debian.Compression `json:"compression"`
	Runs         int                `json:"runs"`
	Starts       []start            `json:"starts"`
}

// start is one workload in one mode.
type start struct {
	Workload string      `json:"workload"`
	Image    string      `json:"image"`
	Mode     string      `json:"mode"`
	First    []cold.Cost `json:"first,omitempty"` // on new nodes, a run each
	Again    []cold.Cost `json:"again,omitempty"` // the second start on the same nodes
	Error    string      `json:"error,omitempty"` // why there are fewer than there should be
	Absent   bool        `json:"absent,omitempty"`
}

// print writes the table of medians.
func (r *report) print(out io.Writer) {
	fmt.Fprintf(out, "\n%.0f Mbit/s, %.0f ms a request, layers in %s; medians of %d cold starts\n\n",
		r.Bandwidth/1e6, r.DelaySeconds*1e3, r.Compression, r.Runs)
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintf(w, "workload\timage\tmode\t%8s\t%11s\t%8s\t%8s\t%6s\t%12s\t%11s\n",
		"seconds", "from - to", "MB", "requests", "stalls", "2nd: seconds", "bytes")
	for _, s := range r.Starts {
		fmt.Fprintf(w, "%s\t%s\t%s\t", s.Workload, s.Image, s.Mode)
		switch {
		case s.Absent:
			fmt.Fprintf(w, "not available: %s\n", s.Error)
			continue
		case s.Error != "" || len(s.First) == 0:
			fmt.Fprintf(w, "failed\n")
			continue
		}
		m := cold.Median(s.First)
		bySeconds := func(a, b cold.Cost) int { return cmp.Compare(a.First, b.First) }
		fmt.Fprintf(w, "%8.2f\t%5.2f %5.2f\t%8.2f\t%8d\t%6d\t", m.First.Seconds(),
			slices.MinFunc(s.First, bySeconds).First.Seconds(), slices.MaxFunc(s.First, bySeconds).First.Seconds(),
			float64(m.Bytes)/1e6, m.Requests, m.Stalls)
		if len(s.Again) > 0 {
			m := cold.Median(s.Again)
			fmt.Fprintf(w, "%12.2f\t%11d\n", m.First.Seconds(), m.Bytes)
		} else {
			fmt.Fprintf(w, "\t\n")
		}
	}
	w.Flush()
}

// write writes the report to a file as JSON.
func (r *report) write(name string) error {
	p, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return replace.File(name, append(p, '\n'), 0o644)
}
