package fill

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/choose"
	"github.com/shale-image/shale/blob/memblob"
	"github.com/shale-image/shale/blob/retry"
	"github.com/shale-image/shale/chunk"
)

// liar is a source of what n has, and flips a bit of each answer.
func (n *node) liar() *memblob.Source {
	m := memblob.New(nil)
	for _, b := range n.blobs {
		m.Put(b)
	}
	m.Fault = func(context.Context, blob.Ref, int64, int64) *memblob.Fault { return &memblob.Fault{Flip: 1} }
	return m
}

// Where one place gives wrong bytes, another one is asked, and from then on first.
func TestWrongBytesElsewhere(t *testing.T) {
	for name, codec := range map[string]chunk.Codec{"plain": chunk.None, "compressed": chunk.Zstd} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, Options{Timeout: 10 * time.Second})
			b := newBuilder(codec)
			b.blob()
			for range 4 {
				b.files(50*kib, 10*kib)
				b.gap(200 * kib) // another request
			}
			dir := n.link(b)
			dead := memblob.New(nil)
			dead.Fault = func(context.Context, blob.Ref, int64, int64) *memblob.Fault {
				return &memblob.Fault{After: -1, Err: blob.ErrUnavailable}
			}
			source := choose.New(choose.Place{Name: "liar", Source: n.liar()}, choose.Place{Name: "dead", Source: dead},
				choose.Place{Name: "good", Source: n.source})
			x := n.open(dir, retry.New(source, retry.Policy{}))
			asked := 0
			rescued := errors.New("asked to rescue")
			x.OnWrongIndex(func(context.Context) error { asked++; return rescued })
			x.all(t)
			if st := x.Stats(); st.Errors != 0 || asked != 0 {
				t.Errorf("%d errors, %d rescues", st.Errors, asked)
			}
			if st := x.Stats(); st.Requests != 6 {
				t.Errorf("%d requests, want one to the liar, one to the dead, and one for each gap", st.Requests)
			}
		})
	}
}

// If all are wrong, so is the index.
func TestWrongBytesEverywhere(t *testing.T) {
	n := newNode(t, Options{})
	dir := n.link(small())
	x := n.open(dir, choose.New(choose.Place{Name: "one", Source: n.liar()}, choose.Place{Name: "two", Source: n.liar()}))
	asked := 0
	x.OnWrongIndex(func(context.Context) error { asked++; return errors.New("cannot") })
	if err := x.chunk(t, 0); !errors.Is(err, chunk.ErrCorrupt) || asked != 1 {
		t.Errorf("%v after %d rescues", err, asked)
	}
	if st := x.Stats(); st.Requests != 2 {
		t.Errorf("%d requests", st.Requests)
	}
	must(t, x.chunk(t, 1)) // the bit is in the first one
}
