package reader

import (
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/shale-image/shale/image"
)

// TestEarly: an index is asked for without waiting for its manifest, by who believes it.
func TestEarly(t *testing.T) {
	impatient(t)
	host, spoil := spoiled(t)
	s := store(t, host+"/app:app", false)
	manifest := s.push(t)
	asked := make(chan struct{})
	var once sync.Once
	f := func(_ http.ResponseWriter, r *http.Request) bool {
		switch {
		case r.Method != http.MethodGet:
		case strings.Contains(r.URL.Path, s.layer[0].Digest):
			once.Do(func() { close(asked) })
		case strings.HasSuffix(r.URL.Path, manifest):
			select {
			case <-asked:
			case <-r.Context().Done():
			}
		}
		return false
	}
	spoil.Store(&f)
	if got, _, err := s.fetch(t, Repository, nil); got != Repository {
		t.Errorf("%q, %v", got, err)
	}
}

// TestEarlyUnbelieved: what its trust does not let through is not asked for, unless it is bound.
func TestEarlyUnbelieved(t *testing.T) {
	for _, bind := range []bool{false, true} {
		s := store(t, "oci:"+t.TempDir()+"/layout:app", bind)
		d := s.layer[0]
		list := []image.Referrer{{Descriptor: image.Descriptor{Annotations: map[string]string{indexDigest: d.Digest, indexSize: fmt.Sprint(d.Size)}}}}
		for _, at := range []Trust{Bound, Signed, Repository} {
			e := fetchEarly(t.Context(), s.repo, s.img, list, Options{TempDir: t.TempDir(), Trust: at})
			if want := bind || at == Repository; want != (e != nil) {
				t.Errorf("bound: %v, trust %s: asked for: %v", bind, at, !want)
			}
			e.close()
		}
	}
}

// TestEarlyLies: whatever the list says, it is the manifest's index that is used.
func TestEarlyLies(t *testing.T) {
	for name, says := range map[string]func(s *stored, other image.Descriptor) (digest, size string){
		"another":  func(_ *stored, o image.Descriptor) (string, string) { return o.Digest, fmt.Sprint(o.Size) },
		"none":     func(*stored, image.Descriptor) (string, string) { return "sha256:" + strings.Repeat("0", 64), "100" },
		"nonsense": func(*stored, image.Descriptor) (string, string) { return "../" + strings.Repeat("0", 64), "100" },
		"short":    func(s *stored, _ image.Descriptor) (string, string) { return s.layer[0].Digest, "100" },
		"long":     func(s *stored, _ image.Descriptor) (string, string) { return s.layer[0].Digest, fmt.Sprint(maxIndex) },
		"too long": func(s *stored, _ image.Descriptor) (string, string) {
			return s.layer[0].Digest, fmt.Sprint(maxIndex + 1)
		},
		"negative": func(s *stored, _ image.Descriptor) (string, string) { return s.layer[0].Digest, "-1" },
	} {
		t.Run(name, func(t *testing.T) {
			s := store(t, "oci:"+t.TempDir()+"/layout:app", false)
			digest, size := says(s, s.blob(t, IndexMediaType, []byte("another index")))
			s.attach(t, s.layer, map[string]string{indexDigest: digest, indexSize: size})
			if got, _, err := s.fetch(t, Repository, nil); got != Repository {
				t.Errorf("%q, %v", got, err)
			}
		})
	}
}
