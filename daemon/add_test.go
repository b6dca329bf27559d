package daemon

import (
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/reader"
)

// TestMadeAnew: an image that is pulled with less trust than it was linked with stays
// what it is until it is had otherwise: pinned, complete, and without a network.
func TestMadeAnew(t *testing.T) {
	p := newPacks(t, strings.TrimSuffix(windowed(t), "shale")+"plain", false)
	spoil := func(f func(r *http.Request) bool) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.spoil = func(w http.ResponseWriter, r *http.Request) bool {
			bad := f(r)
			if bad {
				http.NotFound(w, r)
			}
			return bad
		}
	}
	c := service(t)
	dir, _ := attachAs(t, c, p.ref, Place{})
	wholly(t, dir) // which leaves a trace
	must(t, unix.Unmount(dir, 0))
	_, err := c.Pin(background, p.ref, true)
	must(t, err)
	images := filepath.Join(c.Root, "images")
	home := filepath.Join(images, strings.TrimPrefix(p.img.ManifestDigest, "sha256:"))
	there := func() []string {
		t.Helper()
		var names []string
		for _, d := range []string{images, home} {
			all, err := os.ReadDir(d)
			must(t, err)
			for _, de := range all {
				names = append(names, de.Name())
			}
		}
		return names
	}
	eventually(t, "the trace is kept", func() bool { return contains(there(), "trace") })
	// It is compared with its layers, once it is complete: then it is this node's own.
	// An index from elsewhere has a record that says so.
	eventually(t, "the index is compared", func() bool {
		rec, err := (&store{dir: images}).loadRecord(p.img.ManifestDigest)
		return err == nil && rec.Index == reader.Local
	})
	end(t, c)
	s := &store{dir: images}
	rec, err := s.loadRecord(p.img.ManifestDigest)
	must(t, err)
	rec.Index = reader.Repository
	must(t, s.saveRecord(rec))
	must(t, s.removeIndex(home))
	before := there()

	pull := func(trust reader.Trust) error {
		_, err := c.Pull(background, Source{Ref: p.ref, Platform: "linux/amd64", IndexTrust: string(trust)}, false, nil)
		return err
	}
	for _, path := range []string{p.img.ConfigBlob.Digest, p.img.Layers[0].Digest} {
		spoil(func(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, path) })
		if err := pull(reader.Local); !errors.Is(err, blob.ErrNotFound) {
			t.Errorf("without %s: %v", path, err)
		}
		if after := there(); !slices.Equal(after, before) {
			t.Errorf("there was %v, and is %v", before, after)
		}
	}
	spoil(func(*http.Request) bool { return true })
	dir, _ = attachAs(t, c, p.ref, Place{Unrecorded: true})
	wholly(t, dir)
	must(t, unix.Unmount(dir, 0))

	// When it can be had, it is made anew, and what people and runs have said stays.
	spoil(func(r *http.Request) bool { return strings.Contains(r.URL.Path, "/referrers/") })
	eventually(t, "nobody uses it", func() bool { return !errors.Is(pull(reader.Local), ErrBusy) })
	must(t, pull(reader.Local))
	if rec, err = s.loadRecord(p.img.ManifestDigest); err != nil || rec.Index != reader.Local {
		t.Errorf("%+v, %v", rec, err)
	}
	if after := there(); !contains(after, pinnedFile) || !contains(after, "trace") || !contains(after, indexFile) || contains(after, foreignFile) || contains(after, madeSuffix) {
		t.Errorf("there is %v", after)
	}
	spoil(func(*http.Request) bool { return true })
	dir, _ = attachAs(t, c, p.ref, Place{})
	wholly(t, dir)
}

// TestFirstFails: of an image that could not be had nothing stays.
func TestFirstFails(t *testing.T) {
	p := newPacks(t, strings.TrimSuffix(windowed(t), "shale")+"plain", false)
	p.mu.Lock()
	p.spoil = func(w http.ResponseWriter, r *http.Request) bool {
		bad := strings.HasSuffix(r.URL.Path, p.img.ConfigBlob.Digest)
		if bad {
			http.NotFound(w, r)
		}
		return bad
	}
	p.mu.Unlock()
	c := service(t)
	if _, err := c.Pull(background, Source{Ref: p.ref, Platform: "linux/amd64"}, false, nil); !errors.Is(err, blob.ErrNotFound) {
		t.Errorf("%v", err)
	}
	if left, err := os.ReadDir(filepath.Join(c.Root, "images")); err != nil || len(left) > 0 {
		t.Errorf("there is %v, %v", left, err)
	}
}
