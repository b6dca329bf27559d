package link

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/pool"
)

// list returns the directories in dir.
func list(dir string) func() ([]string, error) {
	return func() (dirs []string, err error) {
		des, err := os.ReadDir(dir)
		for _, de := range des {
			dirs = append(dirs, filepath.Join(dir, de.Name()))
		}
		return dirs, err
	}
}

// some makes an image of chunks with the seeds [from, to).
func some(from, to int) *world {
	w := newWorld(1)
	for i := from; i < to; i++ {
		w.file(fmt.Sprint(i), w.chunk(0, uint64(i), 1000+i*700))
	}
	return w
}

// missing counts the chunks of an image that are not here, and fails if one is
// here and wrong.
func (w *world) missing(t testing.TB, p *pool.Pool, im *Image) (n int) {
	t.Helper()
	for i := range im.Chunks() {
		c := im.Chunk(i)
		s, off := find(t, p, im, c)
		b := make([]byte, c.Size)
		if !s.Present(off, int64(c.Size)) {
			n++
		} else if err := s.ReadAt(b, off); err != nil || c.Digest.Verify(b) != nil {
			t.Errorf("chunk %s is wrong: %v", c.Digest, err)
		}
	}
	return n
}

func TestCollect(t *testing.T) {
	p, dir := openPool(t), t.TempDir()
	a, b, c := some(0, 60), some(40, 100), some(200, 220)
	x, y, z := a.link(t, p, filepath.Join(dir, "x")), b.link(t, p, filepath.Join(dir, "y")), c.link(t, p, filepath.Join(dir, "z"))
	a.fill(t, p, x)
	b.fill(t, p, y)
	c.fill(t, p, z)
	if freed, err := Collect(p, list(dir)); err != nil || freed != (pool.Freed{}) {
		t.Errorf("with all images in use: %+v, %v", freed, err)
	}
	remove := func(name string) pool.Freed {
		t.Helper()
		before := p.Usage().Disk
		if err := os.RemoveAll(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
		freed, err := Collect(p, list(dir))
		if err != nil {
			t.Fatal(err)
		}
		if got := before - p.Usage().Disk; got != freed.Disk || got == 0 {
			t.Errorf("%s: %d bytes of disk came free, Collect says %+v", name, got, freed)
		}
		return freed
	}
	if freed := remove("z"); freed.Segments != 1 { // nobody else's
		t.Errorf("%+v", freed)
	}
	if freed := remove("x"); freed.Segments != 0 { // a third of it is y's, too
		t.Errorf("%+v", freed)
	}
	if n := b.missing(t, p, y); n != 0 {
		t.Errorf("%d chunks of the image that remains are gone", n)
	}
	// x again: it needs what was freed, and has what was not.
	x = a.link(t, p, filepath.Join(dir, "x"))
	if n := a.missing(t, p, x); n != 40 {
		t.Errorf("%d chunks are missing, want 40", n)
	}
	a.fill(t, p, x)
	remove("y")
	if n := a.missing(t, p, x); n != 0 {
		t.Errorf("%d chunks are gone", n)
	}
	if freed := remove("x"); freed.Segments != 2-1 && p.Usage().Segments != 0 {
		t.Errorf("%+v, %d segments are left", freed, p.Usage().Segments)
	}
	if u := p.Usage(); u != (pool.Usage{}) {
		t.Errorf("without images the pool has %+v", u)
	}
}

// Unknown means in use: one image that cannot be read, and nothing is freed.
func TestCollectUnknown(t *testing.T) {
	for _, name := range []string{"info", "map", "meta", ""} {
		for _, how := range []string{"cut", "gone"} {
			p, dir := openPool(t), t.TempDir()
			w := some(0, 20)
			im := w.link(t, p, filepath.Join(dir, "a"))
			w.fill(t, p, im)
			w.link(t, p, filepath.Join(dir, "b"))
			path := filepath.Join(dir, "b", name)
			var err error
			if how == "cut" && name != "" {
				err = os.Truncate(path, 1)
			} else {
				err = os.RemoveAll(path)
			}
			if err != nil {
				t.Fatal(err)
			}
			for what, images := range map[string]func() ([]string, error){
				"damaged": func() ([]string, error) { return []string{filepath.Join(dir, "b")}, nil },
				"no list": func() ([]string, error) { return nil, errors.New("cannot list") },
			} {
				if freed, err := Collect(p, images); err == nil || freed != (pool.Freed{}) {
					t.Errorf("%s %s, %s: %+v, %v", name, how, what, freed, err)
				}
			}
			if w.missing(t, p, im) != 0 {
				t.Errorf("%s %s: chunks are gone", name, how)
			}
		}
	}
}

// Images come and go while others are linked: what an image that is there
// refers to is there, or can be stored.
func TestCollectWhileLinking(t *testing.T) {
	p, dir := openPool(t), t.TempDir()
	var wg sync.WaitGroup
	for g := range 3 {
		wg.Go(func() {
			for k := range 6 {
				w := some(k*5, k*5+10) // the same for all
				name := filepath.Join(dir, fmt.Sprint(g, ".", k))
				if err := Link(t.Context(), w.tree, p, name); err != nil {
					t.Error(err)
					return
				}
				im, err := Open(name)
				if err != nil {
					t.Error(err)
					return
				}
				for i := range im.Chunks() {
					c := im.Chunk(i)
					s, off := find(t, p, im, c)
					if err := s.Store(off, w.content[c.Digest]); err != nil {
						t.Error(err)
					}
				}
				if n := w.missing(t, p, im); n != 0 {
					t.Errorf("%d chunks are gone", n)
				}
				im.Close()
				// Taken out of the list at once, deleted later, as a node does.
				if err := os.Rename(name, filepath.Join(t.TempDir(), "x")); err != nil {
					t.Error(err)
				}
				if _, err := Collect(p, list(dir)); err != nil && !errors.Is(err, os.ErrNotExist) {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if _, err := Collect(p, list(dir)); err != nil || p.Usage().Segments != 0 {
		t.Errorf("%d segments are left: %v", p.Usage().Segments, err)
	}
}

func TestReferences(t *testing.T) {
	p, dir := openPool(t), t.TempDir()
	w := some(0, 5)
	w.link(t, p, filepath.Join(dir, "a"))
	if _, err := References(filepath.Join(dir, "a"), filepath.Join(dir, "a")); err != nil {
		t.Error(err)
	}
	if _, err := References(filepath.Join(dir, "a"), filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	if err := os.Truncate(filepath.Join(dir, "a", "map"), 5); err != nil {
		t.Fatal(err)
	}
	if _, err := References(filepath.Join(dir, "a")); !errors.Is(err, chunk.ErrCorrupt) {
		t.Error(err)
	}
}
