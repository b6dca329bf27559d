package index

import (
	"errors"
	"slices"
	"testing"
)

func TestWalk(t *testing.T) {
	tree := NewTree()
	if err := tree.Apply(parseLayers("file b/z\nfile b.c\nfile b/a\nlink a b/z\ndir \xff\nfile B")[0]); err != nil {
		t.Fatal(err)
	}
	want := []string{"", "B", "a", "b", "b/a", "b/z", "b.c", "\xff"}
	for stop := range len(want) + 1 {
		var got []string
		enough := errors.New("enough")
		err := tree.Walk(func(path string, ino *Inode) error {
			if len(got) == stop {
				return enough
			}
			got = append(got, path)
			return nil
		})
		if (err == enough) != (stop < len(want)) {
			t.Errorf("stopped at %d: %v", stop, err)
		}
		if !slices.Equal(got, want[:stop]) {
			t.Errorf("stopped at %d: got %q, want %q", stop, got, want[:stop])
		}
	}
}
