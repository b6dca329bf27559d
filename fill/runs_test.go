package fill

import (
	"fmt"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/shale-image/shale/index"
)

// edge is a span of the first blob as a request would have kept it at its end, or at its
// beginning.
func (x *img) edge(b *builder, number int, first bool) *edge {
	s, _ := x.linked.Span(number)
	e := &edge{number: number, span: s, at: new(atomic.Int64), done: make(chan struct{})}
	e.stored = slices.Clone(b.blobs[0][s.Offset:][:s.Length])
	e.at.Store(s.Offset)
	if e.windowed = s.Window.Length > 0 && (first || !s.Inflated()); e.windowed {
		e.window = b.blobs[1][s.Window.Offset:][:s.Window.Length]
	}
	return e
}

// kept has spans be kept, as requests that began or ended with them have.
func (x *img) kept(b *builder, first bool, numbers ...int) {
	for _, i := range numbers {
		e := x.edge(b, i, first)
		e.here = true
		close(e.done)
		x.edges.put(e)
	}
}

// bytesOf is what was asked for of a blob.
func bytesOf(log []asked, blob string) (list []asked) {
	for _, a := range log {
		if a.blob == blob {
			list = append(list, asked{off: a.off, n: a.n})
		}
	}
	return list
}

// TestEdgeRuns: whichever spans are kept, a request asks for what is between those at its
// two ends, and for what decoding that needs besides; for nothing if they are all.
func TestEdgeRuns(t *testing.T) {
	const first, spans = 3, 5
	for name, b := range layers(t, 3<<19) {
		for set := range 1 << spans {
			for _, asFirst := range []bool{true, false} {
				if !asFirst && (name != "gzip" || set&1 == 0) {
					continue // it makes no difference
				}
				n := newNode(t, Options{})
				x := n.image(b)
				var numbers []int
				for i := range spans {
					if set>>i&1 == 1 {
						numbers = append(numbers, first+i)
					}
				}
				x.kept(b, asFirst, numbers...)
				wants := x.across(first, first+spans-1)
				x.begin(wants...)
				x.settle()

				lo, hi := first, first+spans // what has to come
				for lo < hi && slices.Contains(numbers, lo) {
					lo++
				}
				for lo < hi && slices.Contains(numbers, hi-1) {
					hi--
				}
				var stored, beside []asked
				if lo < hi {
					off, end := b.spans[0].Spans[lo].Offset, b.spans[0].Spans[hi-1].Offset+b.spans[0].Spans[hi-1].Length
					if lo > first { // two spans of gzip may share a byte
						before := &b.spans[0].Spans[lo-1]
						off = before.Offset + before.Length
					}
					if hi < first+spans {
						end = b.spans[0].Spans[hi].Offset
					}
					stored = []asked{{off: off, n: end - off}}
				}
				if name == "gzip" {
					if lo, hi = first, first; len(numbers) == 0 || numbers[0] > first || !asFirst {
						hi++
					}
				}
				if lo < hi {
					_, off, length := index.Beside(b.spans[0].Spans[lo:hi])
					beside = []asked{{off: off, n: length}}
				}
				log := n.asked()
				if got := bytesOf(log, b.tree.Blobs[0].Digest); !slices.Equal(got, stored) {
					t.Errorf("%s, %d kept: asked for %v, want %v", name, numbers, got, stored)
				}
				if got := bytesOf(log, b.tree.Blobs[1].Digest); !slices.Equal(got, beside) {
					t.Errorf("%s, %d kept: asked for %v of what is beside, want %v", name, numbers, got, beside)
				}
				for _, i := range wants {
					must(t, x.chunk(t, i))
				}
				if len(n.asked()) > 0 || len(x.edges.coming) > 0 {
					t.Errorf("%s, %d kept: not all came at once", name, numbers)
				}
			}
		}
	}
}

// across returns the chunks that lie in the spans from one to another, and in no others.
func (x *img) across(from, to int) (chunks []int) {
	for i := range x.linked.Chunks() {
		if s := x.linked.Stored(x.linked.Chunk(i)); s.First >= from && s.Last <= to {
			chunks = append(chunks, i)
		}
	}
	first, last := x.linked.Stored(x.linked.Chunk(chunks[0])), x.linked.Stored(x.linked.Chunk(chunks[len(chunks)-1]))
	if first.First != from || last.Last != to {
		panic("no chunks begin and end there")
	}
	return chunks
}

// TestEdgeRunFails: that one of a run does not come, or is wrong, costs a request, and nothing
// else.
func TestEdgeRunFails(t *testing.T) {
	const first, spans = 3, 5
	for name, b := range layers(t, 3<<19) {
		for _, run := range [][2]int{{0, 3}, {2, 5}, {0, 5}} { // at the head, the tail, all
			for bad := run[0]; bad < run[1]; bad++ {
				for _, wrong := range []bool{false, true} {
					t.Run(fmt.Sprint(name, run, bad, wrong), func(t *testing.T) {
						synctest.Test(t, func(t *testing.T) {
							n := newNode(t, Options{})
							x := n.image(b)
							for i := run[0]; i < run[1]; i++ {
								x.kept(b, i == 0, first+i)
							}
							k := x.edges.known[first+bad]
							if wrong {
								e := k.Value.(*edge)
								for i := range e.stored {
									e.stored[i] ^= 0x55
								}
							} else { // it hangs
								x.edges.remove(k)
								x.edges.coming = map[int]*edge{first + bad: x.edge(b, first+bad, bad == 0)}
							}
							wants := x.across(first, first+spans-1)
							x.begin(wants...)
							x.settle()
							// The first request has nothing to ask for if all are kept.
							if got, want := len(bytesOf(n.asked(), b.tree.Blobs[0].Digest)), 2-(run[1]-run[0])/spans; got != want {
								t.Errorf("%d requests, want %d", got, want)
							}
							for _, i := range wants {
								must(t, x.chunk(t, i))
							}
							if k := x.edges.known[first+bad]; wrong && k != nil && k.Value.(*edge).stored[0] != b.blobs[0][b.spans[0].Spans[first+bad].Offset] {
								t.Error("what is wrong is kept")
							}
							if st := x.Stats(); st.Errors > 0 || len(n.asked()) > 0 {
								t.Errorf("%d errors", st.Errors)
							}
						})
					})
				}
			}
		}
	}
}

// TestEdgesApart: what lies between two spans, and is of none, comes.
func TestEdgesApart(t *testing.T) {
	const size = 100
	var spans []index.Span
	for i := range int64(5) {
		spans = append(spans, index.Span{Start: i * size, Size: size, Offset: i * (size + 10), Length: size, Codec: 1})
	}
	var e edges
	defer e.clear()
	for i := range spans {
		e.put(&edge{number: i, span: spans[i], stored: make([]byte, size)})
	}
	n := &ends{edges: &e, spans: spans}
	e.find(n, 0, 5*size, false, 0)
	off, length := n.missing()
	if len(n.head) != 1 || len(n.tail) != 1 || off != size || length != 4*(size+10)-size {
		t.Errorf("%d and %d are used, %d bytes at %d are missing", len(n.head), len(n.tail), length, off)
	}
}

// TestEdgesNear: a span that another request brings is used if that has no more to bring before
// it than this one, and near.
func TestEdgesNear(t *testing.T) {
	const size, near = 100, 30
	var spans []index.Span
	for i := range int64(5) {
		spans = append(spans, index.Span{Start: i * size, Size: size, Offset: i * size, Length: size, Codec: 1})
	}
	for _, c := range []struct {
		kept, coming int // the first spans, and one
		ahead        int64
	}{{0, 0, near}, {2, 2, near}, {0, 4, near + 4*size}, {2, 4, near + 2*size}} {
		for more := range int64(2) {
			var e edges
			for i := range c.kept {
				e.put(&edge{number: i, span: spans[i], stored: make([]byte, size)})
			}
			x := &edge{number: c.coming, span: spans[c.coming], at: new(atomic.Int64)}
			x.at.Store(x.span.Offset - c.ahead - more)
			e.coming = map[int]*edge{c.coming: x}
			n := &ends{edges: &e, spans: spans}
			e.find(n, 0, 5*size, false, near)
			if used := slices.Contains(n.others(), x); used != (more == 0) {
				t.Errorf("%+v, and %d more: %v", c, more, used)
			}
			e.clear()
		}
	}
}

// TestPlanOverKept: a plan passes over spans that are kept as it does over gaps, and else ends
// with them.
func TestPlanOverKept(t *testing.T) {
	ends := map[bool]int{} // and those that go on
	for name, b := range layers(t, 3<<19) {
		n := newNode(t, Options{})
		x := n.image(b)
		const i = 1
		count := x.linked.Chunks()
		for a := x.linked.Stored(x.linked.Chunk(i)).Last + 1; a < x.linked.Spans()-5; a++ {
			for length := range 4 {
				x.edges.clear()
				var numbers []int
				run := int64(0)
				for k := a; k < a+length; k++ {
					s, _ := x.linked.Span(k)
					if run += s.Length; name == "zstd" {
						run += int64(s.Window.Length)
					}
					numbers = append(numbers, k)
				}
				x.kept(b, true, numbers...)
				for hi, gap := range map[int]int64{i + 1: spareGap, count: maxGap} {
					x.engine.mu.Lock()
					wants := x.collect(i, hi, 1<<40, 1<<40)
					x.engine.mu.Unlock()
					last := wants[len(wants)-1].index
					ends[run > gap]++
					if run <= gap && last == count-1 {
						continue
					}
					if run <= gap || last == count-1 || x.linked.Stored(x.linked.Chunk(last)).Last >= a+length || x.linked.Stored(x.linked.Chunk(last+1)).Last < a+length {
						t.Errorf("%s: %d bytes are kept from span %d to %d: the plan has chunks up to %d", name, run, a, a+length-1, last)
					}
				}
			}
		}
	}
	if ends[true] == 0 || ends[false] == 0 {
		t.Errorf("plans that end, and do not: %v", ends)
	}
}

// TestNothingToFetch: who waits for what is kept waits for no request, whatever may come along.
func TestNothingToFetch(t *testing.T) {
	for name, b := range layers(t, 3<<19) {
		n := newNode(t, Options{})
		x := n.image(b)
		const i = 9
		s := x.linked.Stored(x.linked.Chunk(i))
		for k := s.First; k <= s.Last; k++ {
			x.kept(b, true, k)
		}
		must(t, x.chunk(t, i))
		x.settle()
		if got := n.asked(); len(got) > 0 {
			t.Errorf("%s: asked for %v", name, got)
		}
	}
}
