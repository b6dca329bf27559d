package fill

import (
	"slices"
	"testing"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/link"
)

// TestPrefetch: what lies first comes by one request a blob, and nothing else does.
func TestPrefetch(t *testing.T) {
	b := newBuilder(chunk.None)
	b.blob()
	b.files(cut, 3*cut, cut, 5*cut)
	b.blob()
	b.files(cut, cut)
	b.blob()
	b.files(200*cut, cut)
	n := newNode(t, Options{})
	n.store(b)
	b.tree.Blobs[0].First = 5 * cut
	b.tree.Blobs[2].First = 200 * cut // more than is taken of one
	dir := t.TempDir() + "/linked"
	must(t, link.Link(t.Context(), &b.tree, n.pool, dir))
	x := n.open(dir, n.source)
	x.Prefetch()
	x.settle()
	got := n.asked()
	slices.SortFunc(got, func(a, b asked) int { return int(a.n - b.n) })
	want := []asked{{b.tree.Blobs[0].Digest, 0, 5 * cut}, {b.tree.Blobs[2].Digest, 0, maxPrefetch}}
	if !slices.Equal(got, want) {
		t.Errorf("asked for %+v, want %+v", got, want)
	}
	if p := x.present(); len(p) != 5+maxPrefetch/cut {
		t.Errorf("chunks %v are here", p)
	}
	must(t, x.chunk(t, 0))
	if got := n.asked(); len(got) > 0 {
		t.Errorf("asked again for %+v", got)
	}
	x.Prefetch() // of the one that has more
	x.settle()
	if got := n.asked(); len(got) != 1 || got[0].off != maxPrefetch {
		t.Errorf("asked for %+v", got)
	}
}
