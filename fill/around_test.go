package fill

import (
	"testing"
	"time"

	"github.com/shale-image/shale/chunk"
)

// What is around a byte is what its file has, and only what is here.
func TestAround(t *testing.T) {
	n := newNode(t, Options{})
	b := newBuilder(chunk.Zstd)
	b.blob()
	b.files(3*cut+100, 50, 2*cut, 1)
	x := n.image(b)
	var at []int64 // where files begin, and where the last ends
	for i := range x.linked.Chunks() {
		if c := x.linked.Chunk(i); !c.Next {
			at = append(at, c.Flat)
		}
	}
	if len(at) != 4 {
		t.Fatalf("%d files, want 4", len(at))
	}
	end := x.linked.FlatSize
	for _, test := range []struct{ off, from, to, wantFrom, wantTo int64 }{
		{100, 0, end, 0, x.linked.MetaSize},
		{at[0], 0, end, at[0], at[1]},
		{at[0] + 2*cut + 5, 0, end, at[0], at[1]},
		{at[0] + 2*cut, at[0] + cut + 7, at[0] + 3*cut, at[0] + cut + 7, at[0] + 3*cut},
		{at[1] + 49, at[0], end, at[1], at[2]},
		{at[2], at[1], end, at[2], at[3]},
		{at[3], 0, end, at[3], end},
	} {
		if from, to := x.Extent(test.off, test.from, test.to); from != test.wantFrom || to != test.wantTo {
			t.Errorf("Extent(%d, %d, %d) = %d, %d; want %d, %d", test.off, test.from, test.to, from, to, test.wantFrom, test.wantTo)
		}
	}
	p := make([]byte, chunk.Block)
	if x.Peek(p, at[2]+cut) {
		t.Error("Peek of what is not here")
	}
	must(t, x.read(t.Context(), t, at[2], 1))
	before := x.Stats()
	seen, _ := x.Touched()
	for deadline := time.Now().Add(20 * time.Second); !x.Peek(p, at[2]+cut); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) { // it comes along, but somewhat later
			t.Fatal("no Peek of what came along")
		}
	}
	if got := x.Stats(); got.ReadBytes != before.ReadBytes || got.Requests != before.Requests {
		t.Errorf("Peek counts as a read: %+v, before %+v", got, before)
	}
	if now, _ := x.Touched(); len(now) != len(seen)+1 || now[len(seen)].Flat != at[2]+cut {
		t.Errorf("what was given is not recorded: %v, before %v", now, seen)
	}
}
