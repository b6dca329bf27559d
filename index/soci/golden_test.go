package soci

import (
	"testing"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// What the real tool says of layers of tar, tar+gzip and several members of gzip
// is what is in them.
func TestGolden(t *testing.T) {
	for _, version := range []string{"v1", "v2"} {
		all := ztocs(t, version)
		if len(all) != 3 {
			t.Errorf("%d ztocs of %s, want 3", len(all), version)
		}
		bits, windows := 0, 0
		for _, z := range all {
			l, err := Read(z.stored, z.Subject, index.Limits{})
			if err != nil {
				t.Errorf("%s: %v", z.Layer, err)
				continue
			}
			compare(t, &z, l)
			for _, s := range l.Spans {
				if s.Bits > 0 {
					bits++
				}
				if s.Window.Length > 0 {
					windows++
				}
			}
			if len(l.Spans) < 2 {
				t.Errorf("%d spans of layer %s", len(l.Spans), z.Layer)
			}
		}
		if bits < 2 || windows < 3 {
			t.Errorf("%s: %d spans begin within a byte, %d have a window: too few to tell anything", version, bits, windows)
		}
	}
}

// Every byte of a layer can be had alone, from the span that it is in.
func TestRandomAccess(t *testing.T) {
	for _, z := range ztocs(t, "v2") {
		l, err := Read(z.stored, z.Subject, index.Limits{})
		if err != nil {
			t.Fatal(err)
		}
		b := index.Blob{Spans: l.Spans}
		all, err := z.content(l, &index.Chunk{Size: uint32(b.StreamSize())})
		if err != nil {
			t.Fatal(err)
		}
		for at := int64(0); at < b.StreamSize(); at += 4096 {
			n := min(4096, b.StreamSize()-at)
			p, err := z.content(l, &index.Chunk{Offset: at, Size: uint32(n)})
			if err != nil || string(p) != string(all[at:at+n]) {
				t.Errorf("%d bytes at %d of %s: %v", n, at, z.kind, err)
			}
		}
	}
}

// An origin is that of one piece of one layer as one ztoc has it.
func TestOrigin(t *testing.T) {
	a := Subject{Layer: "l", Ztoc: "z", Size: 1}
	seen := map[chunk.Digest]bool{}
	for _, d := range []chunk.Digest{
		a.origin(0, 10), a.origin(1, 10), a.origin(0, 11), a.origin(1<<32, 10),
		(&Subject{Layer: "m", Ztoc: "z"}).origin(0, 10), (&Subject{Layer: "l", Ztoc: "y"}).origin(0, 10), (&Subject{Layer: "lz", Ztoc: ""}).origin(0, 10),
	} {
		if seen[d] || d.Algorithm != chunk.Origin {
			t.Errorf("%s twice", d)
		}
		seen[d] = true
	}
	if b := (&Subject{Layer: "l", Ztoc: "z", Size: 2}); b.origin(0, 10) != a.origin(0, 10) {
		t.Error("the same is another")
	}
}
