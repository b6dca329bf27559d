package reader

import (
	"errors"
	"fmt"
	"os"
	"testing"

	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
)

// garbage attaches an index that is none.
func (s *stored) garbage(t *testing.T, n int) {
	t.Helper()
	s.attach(t, []image.Descriptor{s.blob(t, IndexMediaType, fmt.Appendf(nil, "no index %d", n))}, nil)
}

func readIt(raw *Raw) error {
	_, err := raw.Tree()
	return err
}

// TestUse: what is wrong with an index beside an image hides neither another one nor
// the tables of contents of its layers.
func TestUse(t *testing.T) {
	for name, c := range map[string]struct {
		before, after int // of what there is that is wrong
		good, toc     bool
		want          Kind
	}{
		"tables":          {before: 1, toc: true, want: TOC},
		"tables, of many": {before: maxRefuted + 1, toc: true, want: TOC},
		"good":            {before: 1, after: 1, good: true, want: Index},
		"good, tables":    {before: 1, good: true, toc: true, want: Index},
		"nothing":         {before: 1},
		"nothing of many": {before: maxRefuted + 1},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s := store(t, "oci:"+dir+"/layout:app", false)
			if c.toc {
				s.repo = openRepository(t, "oci:"+dir+"/layout:toc", image.Options{})
				s.img = pushTOC(t, s.repo, goldenLayer(t, "plain.gz"))
				s.make(t)
			}
			for n := range c.before {
				s.garbage(t, n)
			}
			if c.good {
				layers := []image.Descriptor{s.blob(t, IndexMediaType, s.made.Encoded)}
				if s.made.Side.Size > 0 {
					side, err := s.made.OpenSide()
					if err != nil {
						t.Fatal(err)
					}
					defer side.Close()
					p := make([]byte, s.made.Side.Size)
					if _, err := side.Read(p); err != nil {
						t.Fatal(err)
					}
					layers = append(layers, s.blob(t, SideMediaType, p))
				}
				s.attach(t, layers, nil)
			}
			for n := range c.after {
				s.garbage(t, 100+n)
			}
			tries := 0
			raw, err := Use(t.Context(), s.repo, s.img, Options{TempDir: t.TempDir()}, func(raw *Raw) error {
				tries++
				return readIt(raw)
			})
			switch {
			case c.want == "":
				if !errors.Is(err, ErrNoIndex) || !errors.Is(err, index.ErrCorrupt) {
					t.Errorf("%+v, %v", raw, err)
				}
			case err != nil:
				t.Fatal(err)
			default:
				defer raw.Close()
				if raw.Kind != c.want {
					t.Errorf("it is %s, want %s", raw.Kind, c.want)
				}
			}
			if tries > maxRefuted {
				t.Errorf("%d tries", tries)
			}
		})
	}
}

// TestUseFails: what is wrong with the node is not the index's fault.
func TestUseFails(t *testing.T) {
	s := store(t, "oci:"+t.TempDir()+"/layout:app", false)
	s.push(t)
	var file *os.File
	tries := 0
	_, err := Use(t.Context(), s.repo, s.img, Options{TempDir: t.TempDir()}, func(raw *Raw) error {
		tries++
		file = raw.File
		return os.ErrPermission
	})
	if !errors.Is(err, os.ErrPermission) || errors.Is(err, ErrNoIndex) || tries != 1 {
		t.Errorf("%d tries: %v", tries, err)
	}
	if err := file.Close(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("its file is left open: %v", err)
	}
}
