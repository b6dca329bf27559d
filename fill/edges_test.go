package fill

import (
	"bytes"
	"compress/gzip"
	"context"
	"io"
	"math/rand/v2"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/memblob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/layer"
)

// layered makes a builder of a layer that is compressed as a whole, with a span for each of
// its blocks; its chunks begin anywhere in them. What lies beside is the blob behind.
func layered(t *testing.T, plain, stored []byte) *builder {
	t.Helper()
	b := newBuilder(chunk.None)
	b.blob()
	b.last(stored)
	var side []byte
	e, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
	must(t, err)
	defer e.Close()
	m := &layer.Marks{Every: 32 << 10, Blocks: 128 << 10, Window: func(p []byte) (index.Window, error) {
		w := index.Window{Blob: 1, Offset: int64(len(side))}
		side = e.EncodeAll(p, side)
		w.Length = uint32(int64(len(side)) - w.Offset)
		return w, nil
	}}
	r, _, err := layer.DecompressMarked(bytes.NewReader(stored), index.Limits{}, m)
	must(t, err)
	got, err := io.ReadAll(r)
	must(t, err)
	must(t, r.Close())
	if !bytes.Equal(got, plain) || len(m.Spans) < 10 {
		t.Fatalf("%d bytes in %d spans", len(got), len(m.Spans))
	}
	b.spans[0].Spans = m.Spans
	b.blob()
	b.last(side)
	ino := &index.Inode{Mode: syscall.S_IFREG | 0o644}
	for off := 1000; off+cut <= len(plain); off += cut {
		piece := plain[off : off+cut]
		d := chunk.Sum(chunk.BLAKE3, piece)
		b.data[d] = piece
		ino.Extents = append(ino.Extents, index.Extent{Off: ino.Size, Chunk: uint32(len(b.tree.Chunks))})
		ino.Size += cut
		b.tree.Chunks = append(b.tree.Chunks, index.Chunk{Digest: d, Size: cut, Offset: int64(off)})
	}
	b.tree.Root.Children["f"] = ino
	return b
}

// layers are the kinds whose blocks do not end where chunks do.
func layers(t *testing.T, size int) map[string]*builder {
	plain := make([]byte, 0, size)
	for i := uint64(0); len(plain) < size; i++ { // blocks copy from those before
		plain = append(plain, content(i-i%4/3*5, 10_000+int(i%5)*3000)...)
	}
	var gz, z bytes.Buffer
	w := gzip.NewWriter(&gz)
	_, err := w.Write(plain)
	must(t, err)
	must(t, w.Close())
	e, err := zstd.NewWriter(&z, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(1<<20))
	must(t, err)
	_, err = e.Write(plain)
	must(t, err)
	must(t, e.Close())
	return map[string]*builder{"gzip": layered(t, plain, gz.Bytes()), "zstd": layered(t, plain, z.Bytes())}
}

// TestEdges: whoever reads chunk by chunk, in whatever order, has each block fetched once, and
// with it what lies beside it, as long as what is kept is not too much or too old.
func TestEdges(t *testing.T) {
	for name, b := range layers(t, 3<<20) {
		for order, next := range map[string]func(n int) []int{
			"forwards":  func(n int) []int { return rising(n) },
			"backwards": func(n int) []int { p := rising(n); reverse(p); return p },
			"random":    func(n int) []int { return rand.New(rand.NewPCG(1, 2)).Perm(n) },
			"forgetful": func(n int) []int { return rising(n) },
		} {
			t.Run(name+" "+order, func(t *testing.T) {
				n := newNode(t, Options{Window: 1, Neighbours: 1, Ahead: 1, Growth: 1})
				x := n.image(b)
				fetched := map[string]int64{}
				for _, i := range next(x.linked.Chunks()) {
					must(t, x.chunk(t, i))
					x.requests.Wait()
					if order == "forgetful" {
						x.edges.clear()
					}
				}
				for _, a := range n.asked() {
					fetched[a.blob] += a.n
				}
				got, all := fetched[b.tree.Blobs[0].Digest], b.tree.Blobs[0].Size
				if again := got > all+all/20; again != (order == "forgetful") {
					t.Errorf("%d bytes came of %d", got, all)
				}
				if x.edges.size > edgesMemory {
					t.Errorf("%d bytes are kept", x.edges.size)
				}
				if name == "zstd" && order != "forgetful" && fetched[b.tree.Blobs[1].Digest] > b.tree.Blobs[1].Size {
					t.Errorf("%d bytes came from beside, of %d", fetched[b.tree.Blobs[1].Digest], b.tree.Blobs[1].Size)
				}
				x.edges.clear()
				if x.edges.size != 0 || len(x.edges.known) != 0 {
					t.Errorf("%d bytes are kept", x.edges.size)
				}
			})
		}
	}
}

func rising(n int) (p []int) {
	for i := range n {
		p = append(p, i)
	}
	return p
}

func reverse(p []int) {
	for i, k := 0, len(p)-1; i < k; i, k = i+1, k-1 {
		p[i], p[k] = p[k], p[i]
	}
}

// TestEdgesBounded: what is kept is bounded, those that were used last.
func TestEdgesBounded(t *testing.T) {
	var e edges
	defer e.clear()
	for i := range 100 {
		e.put(&edge{number: i, stored: make([]byte, edgeSize-100), window: make([]byte, 100)})
		e.get(0, 0)
	}
	if e.size > edgesMemory || e.size < edgesMemory-edgeSize || e.get(0, 0) == nil || e.get(1, 0) != nil || e.get(99, 0) == nil {
		t.Errorf("%d bytes are kept, in %d spans", e.size, len(e.known))
	}
	e.put(&edge{stored: make([]byte, 10)})
	if e.size > edgesMemory || len(e.get(0, 0).stored) != 10 {
		t.Errorf("%d bytes are kept", e.size)
	}
}

// TestEdgesExpire: what is kept is for so long after the last of it has come, however much it
// is used.
func TestEdgesExpire(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var e edges
		kept := func(number int) bool {
			e.mu.Lock()
			defer e.mu.Unlock()
			return e.get(number, 0) != nil
		}
		for i := range 2 {
			e.put(&edge{number: i, stored: make([]byte, 10)})
			time.Sleep(edgesTime - time.Nanosecond)
			if !kept(0) || !kept(i) {
				t.Error("something is gone too early")
			}
		}
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		if kept(0) || kept(1) || e.size != 0 || e.order.Len() != 0 {
			t.Errorf("%d bytes are kept", e.size)
		}
	})
}

// TestWrongEdge: bytes that were wrong when they came, where nobody looked, do no harm.
func TestWrongEdge(t *testing.T) {
	for name, b := range layers(t, 3<<20) {
		for _, beside := range []bool{false, true} {
			t.Run(name, func(t *testing.T) {
				n := newNode(t, Options{Window: 1, Neighbours: 1, Ahead: 1, Growth: 1})
				x := n.image(b)
				asked := 0
				x.OnWrongIndex(func(context.Context) error { asked++; return io.ErrNoProgress })
				const first = 5
				must(t, x.chunk(t, first))
				x.requests.Wait()
				wrong := 0
				for _, k := range x.edges.known {
					k := k.Value.(*edge)
					if p := k.stored; beside && k.window == nil {
						continue
					} else if beside {
						k.window = bytes.Repeat([]byte{3}, len(k.window))
					} else {
						for i := range p {
							p[i] ^= 0x55
						}
					}
					wrong++
				}
				if wrong == 0 && !(beside && name == "gzip") {
					t.Fatal("nothing is kept")
				}
				must(t, x.chunk(t, first+1))
				must(t, x.chunk(t, first-1))
				if st := x.Stats(); st.Errors != 0 || asked != 0 {
					t.Errorf("%d errors, %d rescues", st.Errors, asked)
				}
			})
		}
	}
}

// TestEdgeOfWrongBytes: where a source gives wrong bytes the request fails as it does
// without what is kept, and other sources are asked.
func TestEdgeOfWrongBytes(t *testing.T) {
	for name, b := range layers(t, 3<<20) {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, Options{Window: 1, Neighbours: 1, Ahead: 1, Growth: 1})
			x := n.image(b)
			const first = 5
			must(t, x.chunk(t, first))
			x.requests.Wait()
			var requests atomic.Int64
			n.setFault(func(context.Context, blob.Ref, int64, int64) *memblob.Fault {
				requests.Add(1)
				return &memblob.Fault{Flip: 1, After: 3000}
			})
			if err := x.chunk(t, first+2); err == nil {
				t.Error("wrong bytes were believed")
			}
			n.setFault(nil)
			if requests.Load() < 2 {
				t.Errorf("%d requests: what was kept was not tried without", requests.Load())
			}
			if i := x.linked.Chunks() - 1; x.chunk(t, i) != nil {
				t.Error("others fail as well")
			}
		})
	}
}

// TestSecondStateFails: where the state of a chunk's second span cannot be had, all of the
// image is asked for, as where that of its first cannot.
func TestSecondStateFails(t *testing.T) {
	b := layers(t, 3<<20)["zstd"]
	// A chunk that begins in the first span, which needs no state, and ends in the second.
	end := b.spans[0].Spans[0].End()
	across := -1
	for i, c := range b.tree.Chunks {
		if c.Offset < end && c.End() > end {
			across = i
		}
	}
	if across < 0 || b.spans[0].Spans[1].Window.Length == 0 {
		t.Fatal("no chunk lies across the first two spans")
	}
	for what, err := range map[string]error{"refused": blob.ErrUnauthorized, "gone": blob.ErrNotFound} {
		t.Run(what, func(t *testing.T) {
			n := newNode(t, Options{Window: 1, Neighbours: 1, Ahead: 1, Growth: 1})
			x := n.image(b)
			asked := 0
			x.OnWrongIndex(func(context.Context) error {
				asked++
				var all []chunk.Digest
				for i := range x.linked.Chunks() {
					all = append(all, x.linked.Chunk(i).Digest)
				}
				return n.bring(t, all...)
			})
			n.setFault(func(_ context.Context, ref blob.Ref, _, _ int64) *memblob.Fault {
				if ref.Digest != b.tree.Blobs[1].Digest {
					return nil
				}
				return &memblob.Fault{After: -1, Err: err}
			})
			if err := x.chunk(t, across); err != nil || asked != 1 {
				t.Errorf("%v, and %d times was all of the image asked for", err, asked)
			}
			if st := x.Stats(); st.Errors != 0 {
				t.Errorf("%d errors", st.Errors)
			}
		})
	}
}

// begin asks for chunks by one request.
func (x *img) begin(chunks ...int) {
	x.engine.mu.Lock()
	defer x.engine.mu.Unlock()
	var wants []want
	for _, i := range chunks {
		c := x.linked.Chunk(i)
		s, at := x.address(c)
		wants = append(wants, want{index: i, chunk: c, segment: s, at: at})
	}
	x.engine.claim(x.Image, wants, 0, 0)
	x.Image.start(wants)
}

// twice returns how many bytes were asked for more than once.
func (n *node) twice() (sum int) {
	seen := map[asked]int{}
	for _, a := range n.asked() {
		for off := a.off; off < a.off+a.n; off++ {
			if seen[asked{a.blob, off, 1}]++; seen[asked{a.blob, off, 1}] > 1 {
				sum++
			}
		}
	}
	return sum
}

// TestEdgesInFlight: what one request brings, another one does not ask for: if it fails, hangs or lies
// that costs bytes, and nothing else.
func TestEdgesInFlight(t *testing.T) {
	const first = 8
	for name, b := range layers(t, 3<<19) {
		within := -1 // a chunk that lies in the span that the next one begins in
		for i := first; i+1 < len(b.tree.Chunks) && within < 0; i++ {
			this, next := b.tree.Chunks[i], b.tree.Chunks[i+1]
			if s := b.spans[0].Spans[b.spans[0].Find(next.Offset)]; s.Start < this.Offset && s.End() < next.End() {
				within = i
			}
		}
		if (within < 0) != (name == "gzip") {
			t.Fatalf("%s: chunk %d lies in one span", name, within)
		}
		for what, chunks := range map[string]struct {
			one [][]int // by requests that begin before
			two []int
		}{
			"the block before":   {[][]int{{first}}, []int{first - 1}},
			"the block behind":   {[][]int{{first}}, []int{first + 1}},
			"both":               {[][]int{{first}, {first + 2}}, []int{first + 1}},
			"no more than these": {[][]int{{within + 1, within + 2}}, []int{within}},
			"far behind":         {[][]int{rising(first)}, []int{first}},
		} {
			if chunks.two[0] < 0 {
				continue
			}
			for fate, fault := range map[string]*memblob.Fault{
				"comes":      nil,
				"hangs":      nil,
				"fails":      {After: -1, Err: blob.ErrNotFound},
				"breaks off": {After: 3000, Err: io.ErrUnexpectedEOF},
				"lies":       {Flip: 0x55},
			} {
				t.Run(name+" "+what+" "+fate, func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						n := newNode(t, Options{})
						x := n.image(b)
						hold, goOn := true, make(chan struct{})
						n.setFault(func(_ context.Context, ref blob.Ref, _, _ int64) *memblob.Fault {
							if !hold || ref.Digest != b.tree.Blobs[0].Digest {
								return nil
							}
							<-goOn
							return fault
						})
						for _, one := range chunks.one {
							x.begin(one...)
						}
						synctest.Wait()
						hold = false
						began := time.Now()
						x.begin(chunks.two...)
						synctest.Wait()
						if fate != "hangs" {
							close(goOn)
						}
						must(t, x.chunk(t, chunks.two[0]))
						waited := time.Since(began)
						if fate == "hangs" {
							close(goOn)
						}
						x.settle()
						far := what == "far behind"
						if most := edgesPatience; waited > most || waited > 0 && (fate != "hangs" || far) {
							t.Errorf("it waited for %v", waited)
						}
						if got := n.twice(); got > 0 && fate == "comes" && !far || got == 0 && (fate == "hangs" || far) {
							t.Errorf("%d bytes came twice", got)
						}
						if len(x.edges.coming) != 0 {
							t.Errorf("%d are coming", len(x.edges.coming))
						}
						time.Sleep(edgesTime / 2) // what failed is asked for again
						x.all(t)                  // nothing that is kept is wrong
					})
				})
			}
		}
	}
}

// TestEdgesAtOnce: of two requests that begin at once one sees the other.
func TestEdgesAtOnce(t *testing.T) {
	for name, b := range layers(t, 3<<19) {
		for i := range 16 {
			n := newNode(t, Options{})
			x := n.image(b)
			x.begin(i)
			x.begin(i + 1)
			x.settle()
			if got := n.twice(); got > 0 {
				t.Errorf("%s: %d bytes came twice of chunks %d and %d", name, got, i, i+1)
			}
		}
	}
}
