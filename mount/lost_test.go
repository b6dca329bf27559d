package mount

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/mount/fanotify"
)

// nothing is a Filler of an image of which nothing is here, nor comes.
type nothing struct{ memContent }

func (*nothing) Here(off, n int64) bool { return false }

func (*nothing) Bring(context.Context, int64, int64) error { return errors.New("nothing comes") }

// TestResumeFanotifyFails: a mount that cannot be resumed is not let go of, or its readers
// would see zeros: when it is lost they get EIO, also in files that nobody knows any more.
func TestResumeFanotifyFails(t *testing.T) {
	needRoot(t)
	g, err := fanotify.New((&Options{}).logger())
	if err != nil {
		t.Skip(err)
	}
	dir := t.TempDir()
	file := func(name string) string {
		path := filepath.Join(dir, name)
		f, err := os.Create(path)
		if err == nil {
			err = errors.Join(f.Truncate(1<<20), f.Close())
		}
		if err != nil {
			t.Fatal(err)
		}
		if f, err = os.Open(path); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		if err := g.Mark(f); err != nil {
			t.Skip(err)
		}
		return path
	}
	first, second, unknown := file("first"), file("second"), file("unknown")
	if err := os.Rename(second, second+".away"); err != nil {
		t.Fatal(err)
	}
	end := filepath.Join(dir, "end")
	ends, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	wd := -1
	if err = os.Mkdir(end, 0o700); err == nil {
		wd, err = unix.InotifyAddWatch(ends, end, unix.IN_DELETE_SELF)
	}
	if err != nil {
		t.Fatal(err)
	}
	from := Watching{Ends: os.NewFile(uintptr(ends), "inotify"), ID: int32(wd)}
	group, journal := g.Files()
	from.Groups = []Held{{group, journal}}

	im := Image{Segments: []string{first, second}, Flat: []int64{0, 1 << 20}, Content: &nothing{}}
	if _, err := ResumeFanotify(from, im, Options{}); err == nil {
		t.Fatal("a mount was resumed whose second segment cannot be opened")
	}
	im.Content = nil
	m, err := ResumeFanotify(from, im, Options{})
	if err != nil {
		t.Fatal(err)
	}
	ServeFanotify()
	for _, path := range []string{first, second + ".away", unknown} {
		if p, err := os.ReadFile(path); !errors.Is(err, unix.EIO) {
			t.Errorf("%s: %d bytes, %v", path, len(p), err)
		}
	}
	if err := os.Remove(end); err != nil {
		t.Fatal(err)
	}
	wait(t, "the end of the mount", m.Done())
	if p, err := os.ReadFile(first); len(p) != 1<<20 || err != nil {
		t.Errorf("%d bytes of what is no mount's, %v", len(p), err)
	}
}
