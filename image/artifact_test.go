package image_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/image"
)

const (
	typeA = "application/vnd.example.a.v1"
	typeB = "application/vnd.example.b.v1+json"
)

// listing adds the API for referrers to a registry.
type listing struct {
	perPage int  // entries; 0 for all
	filter  bool // by artifactType, and say so
	keeps   bool // lets nobody delete anything

	mu   sync.Mutex
	list map[string][]object // by subject
}

func (l *listing) wrap(next http.Handler) http.Handler {
	l.list = map[string][]object{}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		l.mu.Lock()
		defer l.mu.Unlock()
		if _, subject, ok := strings.Cut(r.URL.Path, "/referrers/"); ok && r.Method == http.MethodGet {
			l.serve(w, r, subject)
			return
		}
		if _, digest, ok := strings.Cut(r.URL.Path, "/manifests/"); ok && r.Method == http.MethodDelete {
			if l.keeps {
				w.WriteHeader(http.StatusMethodNotAllowed)
				return
			}
			for subject, all := range l.list {
				l.list[subject] = slices.DeleteFunc(all, func(o object) bool { return o["digest"] == digest })
			}
		}
		if strings.Contains(r.URL.Path, "/manifests/") && r.Method == http.MethodPut {
			p, _ := io.ReadAll(r.Body)
			r.Body = io.NopCloser(strings.NewReader(string(p)))
			var m struct {
				MediaType, ArtifactType string
				Subject                 image.Descriptor
				Annotations             map[string]string
			}
			if json.Unmarshal(p, &m); m.Subject.Digest != "" {
				d := desc("", p)
				list := slices.DeleteFunc(l.list[m.Subject.Digest], func(o object) bool { return o["digest"] == d.Digest })
				l.list[m.Subject.Digest] = append(list, object{"mediaType": m.MediaType, "digest": d.Digest, "size": d.Size, "artifactType": m.ArtifactType, "annotations": m.Annotations})
				w.Header().Set("OCI-Subject", m.Subject.Digest)
			}
		}
		next.ServeHTTP(w, r)
	})
}

func (l *listing) serve(w http.ResponseWriter, r *http.Request, subject string) {
	all := slices.Clone(l.list[subject])
	if want := r.FormValue("artifactType"); want != "" && l.filter {
		all = slices.DeleteFunc(all, func(o object) bool { return o["artifactType"] != want })
		for i := range all {
			all[i] = maps.Clone(all[i])
			delete(all[i], "artifactType")
		}
		w.Header().Set("OCI-Filters-Applied", "artifactType")
	}
	var at int
	fmt.Sscan(r.FormValue("at"), &at)
	all = all[min(at, len(all)):]
	if l.perPage > 0 && len(all) > l.perPage {
		all = all[:l.perPage]
		q := r.URL.Query()
		q.Set("at", fmt.Sprint(at+l.perPage))
		w.Header().Add("Link", `</elsewhere>; rel="first", <?`+q.Encode()+`>; title=x; rel="last next"`)
	}
	w.Header().Set("Content-Type", image.MediaTypeIndex)
	json.NewEncoder(w).Encode(object{"schemaVersion": 2, "mediaType": image.MediaTypeIndex, "manifests": append([]object{}, all...)})
}

// artifactPlaces are the ways in which a repository lists artifacts.
func artifactPlaces() []place {
	api := func(l *listing) func(t *testing.T) string {
		return func(t *testing.T) string { return serve(t, l.wrap) + "/some/app" }
	}
	return append(places(),
		place{"api", api(&listing{})},
		place{"api, pages", api(&listing{perPage: 1})},
		place{"api, pages and filter", api(&listing{perPage: 2, filter: true})},
		// Lists, but says nothing about a subject, and gives the wrong types.
		place{"api of another make", func(t *testing.T) string {
			srv := httptest.NewServer(registry.New(registry.Logger(quiet), registry.WithReferrersSupport(true)))
			t.Cleanup(srv.Close)
			return strings.TrimPrefix(srv.URL, "http://") + "/some/app"
		}})
}

func pushArtifact(t *testing.T, repo *image.Repository, subject image.Descriptor, kind, content string, replaces func(image.Descriptor) bool) string {
	t.Helper()
	l := pushBlob(t, repo, "application/vnd.example.content", []byte(content))
	l.Annotations = map[string]string{"path": "x"}
	digest, err := repo.PushArtifact(t.Context(), subject, kind, []image.Descriptor{l}, map[string]string{"content": content, "b": "c"}, replaces)
	if err != nil {
		t.Fatal(err)
	}
	return digest
}

// referrers returns the sorted digests of what a repository lists.
func referrers(t *testing.T, repo *image.Repository, subject, kind string) []string {
	t.Helper()
	var kinds []string
	if kind != "" {
		kinds = []string{kind}
	}
	list, err := repo.Referrers(t.Context(), subject, kinds...)
	if err != nil {
		t.Error(err)
	}
	return digests(descriptors(list))
}

func descriptors(list []image.Referrer) (out []image.Descriptor) {
	for _, r := range list {
		out = append(out, r.Descriptor)
	}
	return out
}

func digests(list []image.Descriptor) []string {
	s := []string{}
	for _, d := range list {
		s = append(s, d.Digest)
	}
	slices.Sort(s)
	return s
}

func sorted(s ...string) []string {
	slices.Sort(s)
	return s
}

func TestArtifacts(t *testing.T) {
	for _, p := range artifactPlaces() {
		t.Run(p.name, func(t *testing.T) {
			t.Parallel() // most of it is waiting for lists to settle
			repo := open(t, p.ref(t)+":v1", image.Options{})
			if got := referrers(t, repo, someDigest, ""); len(got) != 0 {
				t.Errorf("an empty repository: %v", got)
			}
			subject := pushImage(t, repo, "v1", "amd64")
			other := pushImage(t, repo, "v2", "arm64")
			if got := referrers(t, repo, subject.Digest, ""); len(got) != 0 {
				t.Errorf("before the first: %v", got)
			}
			a1 := pushArtifact(t, repo, subject, typeA, "one", nil)
			a2 := pushArtifact(t, repo, subject, typeA, "two", nil)
			b := pushArtifact(t, repo, subject, typeB, "three", nil)
			o := pushArtifact(t, repo, other, typeA, "four", nil)
			if again := pushArtifact(t, repo, subject, typeA, "one", nil); again != a1 {
				t.Errorf("the same again is %s, was %s", again, a1)
			}
			for _, c := range []struct {
				subject, kind string
				want          []string
			}{
				{subject.Digest, "", sorted(a1, a2, b)}, {subject.Digest, typeA, sorted(a1, a2)}, {subject.Digest, typeB, sorted(b)},
				{subject.Digest, "application/x", nil}, {other.Digest, "", sorted(o)}, {someDigest, typeA, nil},
			} {
				if got := referrers(t, repo, c.subject, c.kind); !slices.Equal(got, c.want) {
					t.Errorf("%s of %s: %v, expected %v", c.kind, c.subject, got, c.want)
				}
			}
			list, err := repo.Referrers(t.Context(), subject.Digest, typeB)
			if err != nil || len(list) != 1 || list[0].MediaType != image.MediaTypeManifest || list[0].Annotations["content"] != "three" {
				t.Fatalf("%+v, %v", list, err)
			}
			a, err := repo.Artifact(t.Context(), list[0].Descriptor, subject.Digest)
			if err != nil {
				t.Fatal(err)
			}
			if a.Type != typeB || a.Digest != b || a.Annotations["b"] != "c" || len(a.Layers) != 1 || a.Layers[0].Annotations["path"] != "x" || desc("", a.ManifestBytes).Digest != b {
				t.Errorf("%+v", a)
			}
			r, err := repo.Blob(t.Context(), a.Layers[0])
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			if p, err := io.ReadAll(r); err != nil || string(p) != "three" {
				t.Errorf("%q, %v", p, err)
			}
			if _, err := repo.Artifact(t.Context(), list[0].Descriptor, other.Digest); !errors.Is(err, image.ErrCorrupt) {
				t.Errorf("an artifact of something else: %v", err)
			}
			// The image is what it was, by tag and without a platform's help.
			if img, err := repo.Resolve(t.Context(), linux("amd64")); err != nil || img.ManifestDigest != subject.Digest {
				t.Errorf("%v", err)
			}
		})
	}
}

// TestArtifactBytes holds the form of a manifest, which may not depend on when
// or where it is made.
func TestArtifactBytes(t *testing.T) {
	repo := open(t, "oci:"+filepath.Join(t.TempDir(), "layout"), image.Options{})
	subject := image.Descriptor{MediaType: image.MediaTypeIndex, Digest: someDigest, Size: 7, Annotations: map[string]string{"of": "its place"}}
	digest, err := repo.PushArtifact(t.Context(), subject, typeA, nil, map[string]string{"b": "2", "a": "1"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	const empty = `{"mediaType":"application/vnd.oci.empty.v1+json","digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2}`
	want := `{"schemaVersion":2,"mediaType":"` + image.MediaTypeManifest + `","artifactType":"` + typeA + `","config":` + empty + `,"layers":[` + empty + `],` +
		`"subject":{"mediaType":"` + image.MediaTypeIndex + `","digest":"` + someDigest + `","size":7},"annotations":{"a":"1","b":"2"}}`
	m, err := repo.Manifest(t.Context(), digest)
	if err != nil || string(m.Bytes) != want {
		t.Errorf("%v\n%s\nexpected\n%s", err, m.Bytes, want)
	}
	for name, f := range map[string]func() error{
		"subject": func() error { return second(repo.PushArtifact(t.Context(), desc("x/y", nil), typeA, nil, nil, nil)) },
		"type":    func() error { return second(repo.PushArtifact(t.Context(), subject, "a", nil, nil, nil)) },
		"layer digest": func() error {
			return second(repo.PushArtifact(t.Context(), subject, typeA, []image.Descriptor{{MediaType: "a/b", Digest: "sha256:x"}}, nil, nil))
		},
		"layer type": func() error {
			return second(repo.PushArtifact(t.Context(), subject, typeA, []image.Descriptor{desc("", nil)}, nil, nil))
		},
		"size": func() error {
			return second(repo.PushArtifact(t.Context(), subject, typeA, nil, map[string]string{"x": strings.Repeat("x", 5<<20)}, nil))
		},
		"of what":  func() error { return second(repo.Referrers(t.Context(), "latest", "")) },
		"artifact": func() error { return second(repo.Artifact(t.Context(), desc(typeA, nil), "v1")) },
	} {
		if err := f(); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func second[T any](_ T, err error) error { return err }

// TestReplace: a new version takes the place of the old one in the list, where
// the list is ours; entries and fields of others stay.
func TestReplace(t *testing.T) {
	everywhere(t, func(t *testing.T, ref string) {
		repo := open(t, ref, image.Options{})
		subject := pushImage(t, repo, "v1", "amd64")
		tag := strings.Replace(subject.Digest, ":", "-", 1)
		pushManifest(t, repo, image.MediaTypeIndex, tag, object{"schemaVersion": 2, "mediaType": image.MediaTypeIndex, "annotations": object{"x": "y"}, "manifests": []object{}})
		old := pushArtifact(t, repo, subject, typeA, "old", nil)
		kept := pushArtifact(t, repo, subject, typeA, "kept", nil)
		b := pushArtifact(t, repo, subject, typeB, "old", nil)
		ours := func(d image.Descriptor) bool { return d.Annotations["content"] == "old" }
		for range 2 {
			a := pushArtifact(t, repo, subject, typeA, "new", ours)
			if got := referrers(t, repo, subject.Digest, ""); !slices.Equal(got, sorted(a, b, kept)) {
				t.Errorf("%v, expected all but %s", got, old)
			}
		}
		m, err := repo.Manifest(t.Context(), tag)
		if err != nil || !strings.Contains(string(m.Bytes), `"annotations":{"x":"y"}`) {
			t.Errorf("%s, %v", m.Bytes, err)
		}
		if _, err := repo.Manifest(t.Context(), old); err != nil {
			t.Errorf("its manifest is gone: %v", err)
		}
	})
}

// TestReplaceListed: where the registry makes the list, what is replaced is deleted,
// if the registry lets us.
func TestReplaceListed(t *testing.T) {
	for _, l := range []*listing{{}, {perPage: 1, filter: true}, {keeps: true}} {
		repo := open(t, serve(t, l.wrap)+"/app", image.Options{})
		subject := pushImage(t, repo, "v1", "amd64")
		old := pushArtifact(t, repo, subject, typeA, "old", nil)
		kept := pushArtifact(t, repo, subject, typeA, "kept", nil)
		b := pushArtifact(t, repo, subject, typeB, "old", nil)
		ours := func(d image.Descriptor) bool { return d.Annotations["content"] == "old" }
		for range 2 {
			a := pushArtifact(t, repo, subject, typeA, "new", ours)
			want := sorted(a, b, kept)
			if l.keeps {
				want = sorted(a, b, kept, old)
			}
			if got := referrers(t, repo, subject.Digest, ""); !slices.Equal(got, want) {
				t.Errorf("%+v: %v, want %v", l, got, want)
			}
		}
		if _, err := repo.Manifest(t.Context(), old); l.keeps != (err == nil) {
			t.Errorf("its manifest: %v", err)
		}
	}
}

func TestArtifactScopes(t *testing.T) {
	ts, host := newTokens(t, 1000)
	repo := open(t, host+"/app", image.Options{})
	subject := pushImage(t, repo, "v1", "amd64")
	a := pushArtifact(t, repo, subject, typeA, "x", nil)
	for tok, scope := range ts.scope {
		if !strings.HasPrefix(scope, "repository:app:pull") {
			t.Errorf("%s for %q", tok, scope)
		}
	}
	before := len(ts.scope)
	if got := referrers(t, open(t, host+"/app", image.Options{}), subject.Digest, typeA); !slices.Equal(got, []string{a}) {
		t.Error(got)
	}
	for tok, scope := range ts.scope {
		if tok == fmt.Sprintf("token-%d", before+1) && scope != "repository:app:pull" {
			t.Errorf("to read a list, %q", scope)
		}
	}
	ts.mu.Lock()
	ts.user, ts.left = "a:b", map[string]int64{}
	ts.mu.Unlock()
	if _, err := open(t, host+"/app", image.Options{}).Referrers(t.Context(), subject.Digest, ""); !errors.Is(err, blob.ErrUnauthorized) {
		t.Errorf("%v", err)
	}
}
