package mount

import (
	"context"
	"errors"
	"strings"
	"testing"
)

func TestChoose(t *testing.T) {
	why := map[string]error{
		"FileBackedEROFS": errors.New("no erofs"), "DetachedFUSE": errors.New("no fuse"), "Fusermount": errors.New("no helper"),
	}
	all := Capabilities{FileBackedEROFS: true, Loop: true, DetachedFUSE: true, Fusermount: true}
	loop := Capabilities{Loop: true, DetachedFUSE: true, Fusermount: true, Why: why}
	fuse := Capabilities{DetachedFUSE: true, Fusermount: true, Why: why}
	none := Capabilities{Why: why}
	for _, test := range []struct {
		name           string
		c              Capabilities
		complete, root bool
		want, because  string
	}{
		{"new kernel", all, false, true, "device", "EROFS mounts files;"},
		{"new kernel, complete", all, true, true, "direct", "nothing of ours"},
		{"before 6.12", loop, false, true, "device", "loop devices"},
		{"before 6.12, complete", loop, true, true, "direct", "loop devices"},
		{"no EROFS", fuse, false, true, "fuse", "no erofs"},
		{"no EROFS, complete", fuse, true, true, "fuse", "no erofs"},
		{"a container without rights", none, true, true, "", "no fuse"},
		{"user", all, false, false, "fuse", "fusermount3"},
		{"user, complete", all, true, false, "fuse", "fusermount3"},
		{"user without helper", none, false, false, "", "no helper"},
	} {
		face, because := Choose(test.c, test.complete, test.root)
		got := ""
		if face != nil {
			got = face.Name()
		}
		if got != test.want || !strings.Contains(because, test.because) {
			t.Errorf("%s: %q, %q; want %q, and %q in the reason", test.name, got, because, test.want, test.because)
		}
	}
}

func TestFaceNamed(t *testing.T) {
	for _, f := range Faces() {
		if g, err := FaceNamed(f.Name()); err != nil || g.Name() != f.Name() {
			t.Errorf("%s: %v, %v", f.Name(), g, err)
		}
	}
	if _, err := FaceNamed("block"); err == nil || !strings.Contains(err.Error(), "auto, direct, device, fanotify, fuse") {
		t.Error(err)
	}
}

func TestDirectNeedsAll(t *testing.T) {
	if _, err := directFace.Mount(context.Background(), Image{}, Options{}); !errors.Is(err, ErrIncomplete) {
		t.Errorf("%v, want ErrIncomplete", err)
	}
}

// Two mounts of one image, watched at once, end one by one; afterwards nothing
// watches.
func TestWatchDirect(t *testing.T) {
	needRoot(t)
	tree := t.TempDir()
	makeTree(t, tree)
	img := makeImage(t, tree)
	var mounts []*Mounted
	for range 3 {
		m, err := Direct(img, nil, Options{})
		if err != nil {
			t.Fatal(err)
		}
		mounts = append(mounts, m)
	}
	for i, m := range mounts {
		m.Close()
		wait(t, "Done after Close", m.Done())
		for _, other := range mounts[i+1:] {
			select {
			case <-other.Done():
				t.Error("the end of one mount is taken for another's")
			default:
			}
		}
	}
	supers.mu.Lock()
	defer supers.mu.Unlock()
	if supers.file != nil || len(supers.gone) > 0 {
		t.Error("inotify is still open")
	}
}
