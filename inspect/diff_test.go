package inspect

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

func random(n int) []byte {
	p := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(n)}).Read(p)
	return p
}

func diff(t *testing.T, a, b *Image) string {
	t.Helper()
	d, err := Diff(t.Context(), a, b)
	if err != nil {
		t.Fatal(err)
	}
	var s []string
	for _, c := range d.Changes {
		s = append(s, fmt.Sprintf("%s %s %s", c.Kind, c.Path, strings.Join(c.What, ",")))
	}
	return strings.Join(s, "; ")
}

// TestSameContent compares the same and almost the same content, cut and
// digested in different ways, with zeros as chunks and as holes.
func TestSameContent(t *testing.T) {
	content := append(append(random(70000), make([]byte, 200000)...), random(50001)...)
	zero := func(step int) func(int) bool {
		return func(off int) bool {
			return bytes.Equal(content[off:min(off+step, len(content))], make([]byte, min(step, len(content)-off)))
		}
	}
	type form struct {
		alg   chunk.Algorithm
		step  int
		holes bool
	}
	build := func(f form, p []byte) *Image {
		b := newBuilder(f.alg, f.step)
		var hole func(int) bool
		if f.holes {
			hole = zero(f.step)
		}
		b.add("f", b.file(p, hole))
		return b.image()
	}
	forms := []form{{chunk.BLAKE3, 65536, false}, {chunk.BLAKE3, 65536, true}, {chunk.SHA256, 65536, true}, {chunk.SHA256, 4096, true},
		{chunk.BLAKE3, 4096, false}, {chunk.BLAKE3, 1 << 20, false}}
	for _, f := range forms {
		for _, g := range forms {
			if got := diff(t, build(f, content), build(g, content)); got != "" {
				t.Errorf("%+v and %+v: %s", f, g, got)
			}
			for _, at := range []int{0, 65536, 69999, len(content) - 1} {
				other := bytes.Clone(content)
				other[at] ^= 1
				if got := diff(t, build(f, content), build(g, other)); got != "changed /f content" {
					t.Errorf("%+v and %+v with byte %d changed: %q", f, g, at, got)
				}
			}
			// Zeros at the end, as far as sizes allow: another size is another content.
			if got := diff(t, build(f, content), build(g, content[:len(content)-1])); got != "changed /f content" {
				t.Errorf("%+v and %+v, a byte shorter: %q", f, g, got)
			}
		}
	}
}

// TestHoleBecomesData is what comparing by extents alone could get wrong.
func TestHoleBecomesData(t *testing.T) {
	zeros := make([]byte, 3*4096)
	data := bytes.Clone(zeros)
	data[2*4096+5] = 1
	for _, step := range []int{4096, 8192} {
		a, b := newBuilder(chunk.BLAKE3, 4096), newBuilder(chunk.BLAKE3, step)
		a.add("f", a.file(zeros, func(int) bool { return true }))
		b.add("f", b.file(data, func(off int) bool { return off == 0 }))
		if got := diff(t, a.image(), b.image()); got != "changed /f content" {
			t.Errorf("step %d: %q", step, got)
		}
	}
}

func TestDiffStat(t *testing.T) {
	a, b := newBuilder(chunk.BLAKE3, 4096), newBuilder(chunk.BLAKE3, 4096)
	p := random(5 * 4096)
	a.add("x", a.file(p[:3*4096], nil))
	a.add("y", a.file(p[:4096], nil)) // shared within the image
	b.add("x", b.file(p[:3*4096], nil))
	b.add("z", b.file(p[2*4096:], nil))
	d, err := Diff(t.Context(), a.image(), b.image())
	if err != nil {
		t.Fatal(err)
	}
	want := Stat{Added: 1, Removed: 1, FromBytes: 3 * 4096, ToBytes: 5 * 4096, SharedBytes: 3 * 4096, ToStored: 5 * 4096, SharedStored: 3 * 4096}
	if d.Stat != want {
		t.Errorf("%+v, want %+v", d.Stat, want)
	}
}

func TestDiffLinksAndXattrs(t *testing.T) {
	a, b := newBuilder(chunk.BLAKE3, 4096), newBuilder(chunk.BLAKE3, 4096)
	f := a.add("a", a.file([]byte("x"), nil))
	a.add("b", f)
	a.add("c", a.file([]byte("x"), nil))
	f.Xattrs = []index.Xattr{{Name: "user.a", Value: "1"}, {Name: "user.b", Value: "2"}}
	g := b.add("a", b.file([]byte("x"), nil))
	b.add("b", g)
	b.add("c", g)
	g.Xattrs = []index.Xattr{{Name: "user.b", Value: "2"}, {Name: "user.a", Value: "1"}}
	if got, want := diff(t, a.image(), b.image()), "changed /c xattrs,links"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestDiffEnds(t *testing.T) {
	b := newBuilder(chunk.BLAKE3, 4096)
	b.add("f", b.file([]byte("x"), nil))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Diff(ctx, b.image(), b.image()); err == nil {
		t.Error("no error of a context that has ended")
	}
}
