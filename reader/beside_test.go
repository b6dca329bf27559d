package reader

import (
	"context"
	"errors"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/image"
)

// spoiled is a registry of which some answers are somebody else's.
func spoiled(t *testing.T) (host string, spoil *atomic.Pointer[func(w http.ResponseWriter, r *http.Request) bool]) {
	t.Helper()
	spoil = &atomic.Pointer[func(w http.ResponseWriter, r *http.Request) bool]{}
	reg := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if f := spoil.Load(); f == nil || !(*f)(w, r) {
			reg.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(srv.Close)
	return strings.TrimPrefix(srv.URL, "http://"), spoil
}

// What can be wrong with an answer.
var wrongs = map[string]http.HandlerFunc{
	"401":   func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(401) },
	"403":   func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(403) },
	"404":   func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(404) },
	"429":   func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(429) },
	"500":   func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) },
	"hangs": func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
	"stalls": func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "{")
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	},
}

// impatient makes what lies beside an image be waited for less long.
func impatient(t *testing.T) {
	list, stall := listTime, stallTime
	listTime, stallTime = 1500*time.Millisecond, 1500*time.Millisecond
	t.Cleanup(func() { listTime, stallTime = list, stall })
}

// TestBesideFails: whatever of what lies beside an image cannot be had, the image can
// do without: by its tables of contents, or else ErrNoIndex says that it is to be read
// as a whole.
func TestBesideFails(t *testing.T) {
	impatient(t)
	for what, parts := range map[string]func(s *stored) []string{
		"lists":     func(s *stored) []string { return []string{"/referrers/", "/manifests/sha256-"} },
		"artifacts": func(s *stored) []string { return []string{"/manifests/" + s.push(t)} },
		"indexes":   func(s *stored) []string { return []string{s.layer[0].Digest} },
	} {
		host, spoil := spoiled(t)
		s := store(t, host+"/app:app", false)
		s.push(t)
		bad := parts(s)
		toc := pushTOC(t, openRepository(t, host+"/toc:toc", image.Options{}), goldenLayer(t, "plain.gz"))
		for how, answer := range wrongs {
			f := func(w http.ResponseWriter, r *http.Request) bool {
				for _, part := range bad {
					if r.Method == http.MethodGet && strings.Contains(r.URL.Path, part) {
						answer(w, r)
						return true
					}
				}
				return false
			}
			spoil.Store(&f)
			t.Run(what+" "+how, func(t *testing.T) {
				repo := openRepository(t, host+"/app:app", image.Options{})
				raw, err := Fetch(t.Context(), repo, s.img, Options{TempDir: t.TempDir()})
				if !errors.Is(err, ErrNoIndex) {
					t.Fatalf("%+v, %v, want ErrNoIndex", raw, err)
				}
				if absent := what == "lists" && how == "404"; absent == useless(err) {
					t.Errorf("it does not say why: %v", err)
				}
				if what != "lists" {
					return
				}
				repo = openRepository(t, host+"/toc:toc", image.Options{})
				if raw, err = Fetch(t.Context(), repo, toc, Options{TempDir: t.TempDir()}); err != nil || raw.Kind != TOC {
					t.Fatalf("the tables of contents: %v", err)
				}
				raw.Close()
			})
		}
		spoil.Store(nil)
		if got, _, err := s.fetch(t, Repository, nil); got != Repository {
			t.Errorf("%s: when all is well again: %q, %v", what, got, err)
		}
	}
}

// TestBesideCancelled: who does not want the image any more is not told that it has no
// index.
func TestBesideCancelled(t *testing.T) {
	host, spoil := spoiled(t)
	s := store(t, host+"/app:app", false)
	ctx, cancel := context.WithCancel(t.Context())
	f := func(_ http.ResponseWriter, r *http.Request) bool {
		cancel()
		<-r.Context().Done()
		return true
	}
	spoil.Store(&f)
	if _, err := Fetch(ctx, s.repo, s.img, Options{TempDir: t.TempDir()}); !errors.Is(err, context.Canceled) || errors.Is(err, ErrNoIndex) {
		t.Error(err)
	}
}

// TestOneIsHad: of two indexes that which can be had.
func TestOneIsHad(t *testing.T) {
	impatient(t)
	for how, answer := range wrongs {
		t.Run(how, func(t *testing.T) {
			host, spoil := spoiled(t)
			s := store(t, host+"/app:app", false)
			lost := s.attach(t, s.layer, map[string]string{"n": "1"})
			s.attach(t, s.layer, map[string]string{"n": "2"})
			f := func(w http.ResponseWriter, r *http.Request) bool {
				if strings.HasSuffix(r.URL.Path, lost) {
					answer(w, r)
					return true
				}
				return false
			}
			spoil.Store(&f)
			if got, _, err := s.fetch(t, Repository, nil); got != Repository {
				t.Errorf("%q, %v", got, err)
			}
		})
	}
}

// TestSOCIFails is TestBesideFails for a SOCI index, whose tables may be missing too.
func TestSOCIFails(t *testing.T) {
	impatient(t)
	dir := sociLayout(t)
	src, img := sociImage(t, dir, "v1")
	list, err := src.Referrers(t.Context(), img.ManifestDigest, SOCIType1)
	if err != nil || len(list) != 1 {
		t.Fatalf("%v, %v", list, err)
	}
	a, err := src.Artifact(t.Context(), list[0].Descriptor, img.ManifestDigest)
	if err != nil {
		t.Fatal(err)
	}
	host, spoil := spoiled(t)
	repo := openRepository(t, host+"/app:app", image.Options{})
	for _, d := range append(append([]image.Descriptor{img.ConfigBlob}, img.Layers...), a.Layers...) {
		if err := repo.PushBlob(t.Context(), d, func() (io.ReadCloser, error) { return src.Blob(t.Context(), d) }); err != nil {
			t.Fatal(err)
		}
	}
	subject, err := repo.PushManifest(t.Context(), img.MediaType, img.ManifestBytes, "app")
	if err != nil {
		t.Fatal(err)
	}
	artifact, err := repo.PushArtifact(t.Context(), subject, SOCIType1, a.Layers, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := Fetch(t.Context(), repo, img, Options{TempDir: t.TempDir()})
	if err != nil || raw.Kind != SOCI {
		t.Fatalf("%+v, %v", raw, err)
	}
	raw.Close()
	for how, answer := range wrongs {
		for _, part := range []string{artifact, a.Layers[0].Digest} {
			f := func(w http.ResponseWriter, r *http.Request) bool {
				if strings.HasSuffix(r.URL.Path, part) {
					answer(w, r)
					return true
				}
				return false
			}
			spoil.Store(&f)
			repo := openRepository(t, host+"/app:app", image.Options{})
			if raw, err := Fetch(t.Context(), repo, img, Options{TempDir: t.TempDir()}); !errors.Is(err, ErrNoIndex) || !useless(err) {
				t.Errorf("%s of %s: %+v, %v", how, part, raw, err)
			}
		}
	}
	if !errors.Is(unknown{blob.ErrUnavailable}, blob.ErrUnavailable) {
		t.Error("the cause is lost")
	}
}
