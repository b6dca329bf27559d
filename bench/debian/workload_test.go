package debian

import (
	"slices"
	"testing"
)

func TestEveryImageHasAWorkload(t *testing.T) {
	seen := map[string]bool{}
	var images []string
	for _, w := range Workloads {
		if w.Name == "" || len(w.Command) == 0 || w.Line == "" {
			t.Errorf("%+v is not complete", w)
		}
		if seen[w.Name] {
			t.Errorf("there are two workloads %s", w.Name)
		}
		seen[w.Name] = true
		images = append(images, w.Image.Name)
	}
	var want []string
	for _, r := range Images {
		want = append(want, r.Name)
	}
	if got := slices.Compact(images); !slices.Equal(got, want) {
		t.Errorf("workloads are of the images %q, want them of %q", got, want)
	}
}
