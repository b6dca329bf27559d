package mount

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/mount/fanotify"
)

// TestWatchGroups: mounts have groups of their own, but for segments that others have had
// marked before; a group ends with the last mount that has one marked in it.
func TestWatchGroups(t *testing.T) {
	needRoot(t)
	s := watchSet{live: map[*watched]bool{}, files: map[fanotify.File]*watchedFile{}}
	dir := t.TempDir()
	for _, name := range []string{"a", "b", "c", "d", "e"} {
		if err := os.WriteFile(filepath.Join(dir, name), make([]byte, 4096), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	begin := func(names ...string) *watched {
		t.Helper()
		im := Image{Content: &nothing{}}
		for _, name := range names {
			path := filepath.Join(dir, name)
			im.Segments, im.Flat = append(im.Segments, path), append(im.Flat, 0)
		}
		w := newWatched(&nothing{}, Options{})
		if err := s.begin(w, im, Options{}); err != nil {
			t.Skip(err)
		}
		t.Cleanup(func() { s.drop(w) })
		return w
	}
	reads := func(when string, want error, names ...string) {
		t.Helper()
		for _, name := range names {
			if _, err := os.ReadFile(filepath.Join(dir, name)); !errors.Is(err, want) {
				t.Errorf("%s: %s: %v, want %v", when, name, err, want)
			}
		}
	}
	first := begin("a", "b")
	second := begin("b", "c")
	third := begin("d")
	if len(s.groups) != 3 || !slices.Equal(first.in, []int{0, 0}) || !slices.Equal(second.in, []int{0, 1}) || second.groups[0] != first.own || third.own == first.own {
		t.Errorf("%d groups, %v, %v, %v", len(s.groups), first.in, second.in, third.in)
	}
	reads("all", unix.EIO, "a", "b", "c", "d")
	s.drop(first)
	reads("without the first", nil, "a")
	reads("without the first", unix.EIO, "b", "c", "d")
	s.drop(second)
	reads("without the second", nil, "a", "b", "c")
	if reads("without the second", unix.EIO, "d"); len(s.groups) != 1 {
		t.Errorf("%d groups are left, want 1", len(s.groups))
	}
	for len(s.groups) < maxGroups {
		s.groups = append(s.groups, third.own)
	}
	if fourth := begin("e"); fourth.own != third.own {
		t.Error("another group beyond the limit")
	}
	s.drop(third)
	reads("the fourth", unix.EIO, "e")
}

// TestServedUntilReleased: a mount that ends counts as one that needs this process for as
// long as something is still brought for it; nobody may end the process on its account.
func TestServedUntilReleased(t *testing.T) {
	s := watchSet{live: map[*watched]bool{}, files: map[fanotify.File]*watchedFile{}}
	w := newWatched(&nothing{}, Options{})
	if err := s.begin(w, Image{}, Options{}); err != nil {
		t.Fatal(err)
	}
	m := &Mounted{watched: w, done: w.done}
	w.brings.Add(1)
	gone := make(chan struct{})
	go s.wait(w, gone)
	close(gone)
	<-w.ctx.Done()
	for live := true; live; time.Sleep(time.Millisecond) {
		s.mu.RLock()
		live = s.live[w]
		s.mu.RUnlock()
	}
	if !m.Served() {
		t.Error("it needs nobody, and something is still brought")
	}
	w.brings.Done()
	wait(t, "the end of the mount", m.Done())
}
