package trace

import (
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestByCommand(t *testing.T) {
	all := []*Trace{read(1, "ld/0", "sh/0"), read(2, "ld/0", "py/0", "py/1"), read(3, "ld/0", "py/0", "sh/0"), read(4, "py/0", "once/0")}
	for i, c := range [][]string{{"sh"}, {"python", "a.py"}, nil, {"python", "a.py"}} {
		all[i].Runs[0].Command = c
	}
	got := merge(t, all...).ByCommand()
	want := [][]string{{"ld/0:1", "py/0:1,2", "once/0:2", "py/1:1"}, {"ld/0:1", "py/0:1", "sh/0:1"}, {"ld/0:1", "sh/0:1"}}
	ids := [][]string{{"run002", "run004"}, {"run003"}, {"run001"}}
	if len(got) != len(want) {
		t.Fatalf("%d commands", len(got))
	}
	for i, tr := range got {
		var runs []string
		for k := range tr.Runs {
			runs = append(runs, tr.Runs[k].ID)
			tr.Runs[k].ID = string(rune('1' + k)) // show tells them so
		}
		sorted := show(tr)
		slices.Sort(sorted)
		slices.Sort(want[i])
		if d := cmp.Diff(want[i], sorted) + cmp.Diff(ids[i], runs); d != "" {
			t.Errorf("%q: %s", tr.Runs[0].Command, d)
		}
		recode(t, tr)
	}
	if got := (&Trace{Manifest: manifest}).ByCommand(); len(got) != 0 {
		t.Errorf("%v of no run", got)
	}
	// What is known of runs that are forgotten is no command's.
	old := merge(t, all...)
	old.Blocks = append(old.Blocks, Block{Chunk: digest("old"), Size: 1, Path: "old"})
	for _, tr := range old.ByCommand() {
		if slices.Contains(names(tr), "old") {
			t.Error("a block of no run that is known")
		}
	}
}

func TestStart(t *testing.T) {
	tr := merge(t, read(1, "ld/0", "a/0"), read(2, "ld/0", "b/0"), read(3, "ld/0", "b/0"), read(4, "ld/0", "b/0", "c/0"))
	for _, c := range []struct {
		share  float64
		before time.Duration
		want   []string
	}{
		{0, 0, []string{"ld", "a", "b", "c"}},
		{0.25, 0, []string{"ld", "a", "b", "c"}},
		{0.26, 0, []string{"ld", "b"}},
		{0.75, 0, []string{"ld", "b"}},
		{1, 0, []string{"ld"}},
		{0, 2 * time.Millisecond, []string{"ld", "a", "b"}},
		{0, time.Millisecond, []string{"ld"}},
	} {
		if got := names(tr.Start(c.share, c.before)); !slices.Equal(got, c.want) {
			t.Errorf("share %g, before %v: %q, want %q", c.share, c.before, got, c.want)
		}
	}
}
