package image_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/image"
)

// answering answers the API for referrers with f, all else with a registry.
func answering(f http.HandlerFunc) func(http.Handler) http.Handler {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if strings.Contains(r.URL.Path, "/referrers/") {
				f(w, r)
				return
			}
			next.ServeHTTP(w, r)
		})
	}
}

func entries(n int) []object {
	list := []object{}
	for i := range n {
		list = append(list, object{"mediaType": image.MediaTypeManifest, "digest": fmt.Sprintf("sha256:%064x", i), "size": 10, "artifactType": typeA})
	}
	return list
}

func index(manifests any) string {
	p, _ := json.Marshal(object{"schemaVersion": 2, "mediaType": image.MediaTypeIndex, "manifests": manifests})
	return string(p)
}

// TestNoAPI: whatever a registry without the API answers, the tag counts.
func TestNoAPI(t *testing.T) {
	for _, c := range []struct {
		status     int
		kind, body string
	}{
		{404, "application/json", `{"errors":[]}`}, {404, "", ""}, {400, "text/plain", "?"}, {405, "", ""}, {406, "", ""}, {501, "", ""}, {410, "", ""},
		{200, "text/html; charset=utf-8", "<html>" + strings.Repeat("<p>", 3<<20)}, {200, "application/json", `{"error":"no"}`},
		{200, "application/json; charset=utf-8", "[]"}, {200, "", ""}, {200, "application/json", `{"schemaVersion":2}`},
		{200, "application/json", `{"schemaVersion":2,"mediaType":"` + image.MediaTypeManifest + `","config":{}}`}, {204, "", ""},
	} {
		ref := serve(t, answering(func(w http.ResponseWriter, _ *http.Request) {
			w.Header()["Content-Type"] = []string{c.kind}
			w.WriteHeader(c.status)
			io.WriteString(w, c.body)
		})) + "/app"
		repo := open(t, ref, image.Options{})
		pushBlob(t, repo, "", []byte("x")) // so that the repository is there
		if got := referrers(t, repo, someDigest, typeA); len(got) != 0 {
			t.Errorf("%v: %v", c, got)
		}
		d := pushImage(t, repo, "", "amd64")
		tag := strings.Replace(someDigest, ":", "-", 1)
		pushManifest(t, repo, image.MediaTypeIndex, tag, json.RawMessage(index([]image.Descriptor{d})))
		if got := referrers(t, repo, someDigest, image.MediaTypeConfig); len(got) != 1 {
			t.Errorf("%d %s %.40s: %v, expected what the tag lists", c.status, c.kind, c.body, got)
		}
	}
}

// TestBadAPI: where the API is not for us, fails or says nothing, what the tag lists
// counts, and a pusher who is let to adds to it.
func TestBadAPI(t *testing.T) {
	for name, api := range map[string]http.HandlerFunc{
		"401":   func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(401) },
		"403":   func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(403) },
		"500":   func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) },
		"hangs": func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
		"garbage": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", image.MediaTypeIndex)
			io.WriteString(w, "{")
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			good := atomic.Bool{} // it answers as if there was no API
			good.Store(true)
			repo := open(t, serve(t, answering(func(w http.ResponseWriter, r *http.Request) {
				if good.Load() {
					http.NotFound(w, r)
					return
				}
				api(w, r)
			}))+"/app", image.Options{})
			subject := pushImage(t, repo, "v1", "amd64")
			a := pushArtifact(t, repo, subject, typeA, "x", nil)
			good.Store(false)
			repo = open(t, repo.Ref().String(), image.Options{})
			for range 2 {
				if got := referrers(t, repo, subject.Digest, typeA); !slices.Equal(got, []string{a}) {
					t.Errorf("%v, expected what the tag lists", got)
				}
			}
			if status, _ := strconv.Atoi(name); status == 401 || status == 403 {
				b := pushArtifact(t, repo, subject, typeA, "y", func(image.Descriptor) bool { return true })
				if got := referrers(t, repo, subject.Digest, typeA); !slices.Equal(got, []string{b}) {
					t.Errorf("%v, expected %s in place of %s", got, b, a)
				}
			}
		})
	}
}

// TestAPIEnds: an API that was there and is bad now.
func TestAPIEnds(t *testing.T) {
	var api listing
	var bad atomic.Bool
	repo := open(t, serve(t, func(next http.Handler) http.Handler {
		good := api.wrap(next)
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if bad.Load() && strings.Contains(r.URL.Path, "/referrers/") {
				w.WriteHeader(403)
				return
			}
			good.ServeHTTP(w, r)
		})
	})+"/app", image.Options{})
	subject := pushImage(t, repo, "v1", "amd64")
	a := pushArtifact(t, repo, subject, typeA, "x", nil)
	if got := referrers(t, repo, subject.Digest, typeA); !slices.Equal(got, []string{a}) {
		t.Fatalf("%v", got)
	}
	bad.Store(true)
	if _, err := repo.Referrers(t.Context(), subject.Digest, typeA); !errors.Is(err, blob.ErrUnauthorized) {
		t.Errorf("nothing lists: %v", err)
	}
	d := pushImage(t, repo, "", "arm64")
	pushManifest(t, repo, image.MediaTypeIndex, strings.Replace(subject.Digest, ":", "-", 1),
		json.RawMessage(index([]object{{"mediaType": d.MediaType, "digest": d.Digest, "size": d.Size, "artifactType": typeA}})))
	if got := referrers(t, repo, subject.Digest, typeA); !slices.Equal(got, []string{d.Digest}) {
		t.Errorf("%v, expected what the tag lists", got)
	}
}

func TestReferrersErrors(t *testing.T) {
	link := func(s string) http.Header { return http.Header{"Link": {s}} }
	for name, c := range map[string]struct {
		status int
		kind   string
		body   string
		header http.Header
		err    error
		saying string
	}{
		"unauthorized":  {401, "", "", nil, blob.ErrUnauthorized, "401"},
		"forbidden":     {403, "", "", nil, blob.ErrUnauthorized, "403"},
		"busy":          {429, "", "", http.Header{"Retry-After": {"3600"}}, blob.ErrUnavailable, "429"},
		"broken":        {500, "", "", nil, blob.ErrUnavailable, "500"},
		"garbage":       {200, image.MediaTypeIndex, "{", nil, image.ErrCorrupt, "index"},
		"old schema":    {200, image.MediaTypeIndex, `{"schemaVersion":1}`, nil, image.ErrCorrupt, "schemaVersion"},
		"a manifest":    {200, image.MediaTypeIndex, `{"schemaVersion":2,"mediaType":"` + image.MediaTypeManifest + `"}`, nil, image.ErrUnsupported, "manifest"},
		"both":          {200, image.MediaTypeIndex, `{"schemaVersion":2,"manifests":[],"layers":[]}`, nil, image.ErrCorrupt, "layers"},
		"no list":       {200, image.MediaTypeIndex, `{"schemaVersion":2,"manifests":{}}`, nil, image.ErrCorrupt, "list"},
		"bad digest":    {200, image.MediaTypeIndex, `{"schemaVersion":2,"manifests":[{"digest":"sha256:../../x"}]}`, nil, image.ErrCorrupt, "../../x"},
		"negative size": {200, image.MediaTypeIndex, `{"schemaVersion":2,"manifests":[{"digest":"` + someDigest + `","size":-1}]}`, nil, image.ErrCorrupt, "size -1"},
		"too many":      {200, image.MediaTypeIndex, index(entries(1001)), nil, image.ErrLimit, "1000"},
		"a lot":         {200, image.MediaTypeIndex, `{"schemaVersion":2,"manifests":[` + strings.Repeat("{},", 1<<20) + `{}]}`, nil, image.ErrCorrupt, "digest"},
		"huge":          {200, image.MediaTypeIndex, strings.Repeat(" ", 5<<20), nil, image.ErrLimit, "4194304"},
		"huge JSON":     {200, "application/json", strings.Repeat(" ", 5<<20), nil, image.ErrLimit, "4194304"},
		"endless":       {200, image.MediaTypeIndex, index(entries(0)), link(`<?n=1>; rel="next"`), image.ErrLimit, "100 pages"},
		"long":          {200, image.MediaTypeIndex, index(entries(400)), link(`<?n=1>; rel=next`), image.ErrLimit, "1000"},
		"another host":  {200, image.MediaTypeIndex, index(entries(1)), link(`<http://example.com/x>; rel="next"`), image.ErrCorrupt, "example.com"},
		"another page":  {200, image.MediaTypeIndex, index(entries(1)), link(`</v2/other>; rel=NEXT`), image.ErrCorrupt, "page 2"},
		"its own types": {200, image.MediaTypeIndex, index([]object{{"digest": someDigest, "size": 1, "artifactType": 5}}), nil, image.ErrCorrupt, "artifactType"},
		"types unknown": {200, image.MediaTypeIndex, strings.ReplaceAll(index(entries(1)), typeA, ""), nil, image.ErrCorrupt, "digest"},
	} {
		var asked atomic.Int64
		repo := open(t, serve(t, func(next http.Handler) http.Handler {
			api := answering(func(w http.ResponseWriter, _ *http.Request) {
				asked.Add(1)
				for k, v := range c.header {
					w.Header()[k] = v
				}
				w.Header().Set("Content-Type", c.kind)
				w.WriteHeader(c.status)
				io.WriteString(w, c.body)
			})(next)
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if strings.HasPrefix(r.URL.Path, "/v2/app/manifests/sha256:") {
					io.WriteString(w, "{}")
					return
				}
				api.ServeHTTP(w, r)
			})
		})+"/app", image.Options{})
		list, err := repo.Referrers(t.Context(), someDigest, typeA)
		if !errors.Is(err, c.err) || !strings.Contains(err.Error(), c.saying) || list != nil || len(err.Error()) > 1000 {
			t.Errorf("%s: %v, expected %v with %q", name, err, c.err, c.saying)
		}
		if n := asked.Load(); n > 110 {
			t.Errorf("%s: %d requests", name, n)
		}
	}
}

// TestLookups: where a list does not tell types the manifests are asked, but
// not any number of them.
func TestLookups(t *testing.T) {
	contents, list := map[string]string{}, []object{}
	host := serve(t, func(http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if _, digest, ok := strings.Cut(r.URL.Path, "/manifests/"); ok {
				io.WriteString(w, contents[digest])
				return
			}
			w.Header().Set("Content-Type", image.MediaTypeIndex)
			io.WriteString(w, index(list))
		})
	})
	repo := open(t, host+"/app", image.Options{})
	for i := range 65 {
		kind := []string{typeA, typeB}[i%2]
		p := fmt.Sprintf(`{"config":{"mediaType":%q},"n":%d}`, kind, i)
		d := desc(image.MediaTypeManifest, []byte(p))
		contents[d.Digest] = p
		list = append(list, object{"mediaType": d.MediaType, "digest": d.Digest, "size": d.Size})
		if i == 63 {
			if got := referrers(t, repo, someDigest, typeA); len(got) != 32 {
				t.Errorf("%d, expected 32", len(got))
			}
		}
	}
	if _, err := repo.Referrers(t.Context(), someDigest, typeA); !errors.Is(err, image.ErrLimit) {
		t.Error(err)
	}
}

// TestReferrersOdd: what is odd, but no reason to fail.
func TestReferrersOdd(t *testing.T) {
	var body, kind string
	repo := open(t, serve(t, answering(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", kind)
		io.WriteString(w, body)
	}))+"/app", image.Options{})
	a := object{"mediaType": image.MediaTypeManifest, "digest": someDigest, "size": 1}
	long := object{"mediaType": image.MediaTypeManifest, "digest": "sha512:" + strings.Repeat("0", 128), "size": 1, "artifactType": typeA}
	for _, c := range []struct {
		kind, body string
		artifact   string
		want       int
	}{
		{image.MediaTypeIndex, index(nil), "", 0},
		{image.MediaTypeIndex, `{"schemaVersion":2}`, "", 0},
		{image.MediaTypeIndex + "; charset=utf-8", index([]object{a, a, long}), "", 1}, // twice; a digest of another kind
		{"application/json", index([]object{a}), "", 1},
		{image.MediaTypeIndex, index([]object{a}), typeA, 0}, // of unknown type, and gone
		{image.MediaTypeIndex, index(entries(1000)), typeA, 1000},
	} {
		kind, body = c.kind, c.body
		if got := referrers(t, repo, someDigest, c.artifact); len(got) != c.want {
			t.Errorf("%s %.100s: %v", c.kind, c.body, got)
		}
	}
}

// TestHostileArtifacts: what a list leads to is checked.
func TestHostileArtifacts(t *testing.T) {
	everywhere(t, func(t *testing.T, ref string) {
		repo := open(t, ref, image.Options{})
		config := pushBlob(t, repo, "application/vnd.example.config", []byte("{}"))
		layer := pushBlob(t, repo, "a/b", []byte("x"))
		make := func(change func(object)) image.Descriptor {
			m := object{"schemaVersion": 2, "mediaType": image.MediaTypeManifest, "config": config, "layers": []any{layer}, "subject": desc(image.MediaTypeManifest, []byte("subject"))}
			change(m)
			return pushManifest(t, repo, m["mediaType"].(string), "", m)
		}
		subject := desc("", []byte("subject")).Digest
		good := make(func(object) {})
		a, err := repo.Artifact(t.Context(), good, subject)
		if err != nil || a.Type != config.MediaType {
			t.Errorf("the type of the configuration: %+v, %v", a, err)
		}
		grown, big := good, good
		grown.Size++
		big.Size = 5 << 20
		gone := desc(image.MediaTypeManifest, []byte("gone"))
		retyped := good
		retyped.MediaType = image.MediaTypeIndex
		for name, c := range map[string]struct {
			d   image.Descriptor
			err error
		}{
			"size":          {grown, image.ErrCorrupt},
			"limit":         {big, image.ErrLimit},
			"missing":       {gone, blob.ErrNotFound},
			"type":          {retyped, image.ErrCorrupt},
			"no subject":    {make(func(m object) { delete(m, "subject") }), image.ErrCorrupt},
			"other subject": {make(func(m object) { m["subject"] = gone }), image.ErrCorrupt},
			"an index": {make(func(m object) {
				delete(m, "config")
				delete(m, "layers")
				m["mediaType"], m["manifests"] = image.MediaTypeIndex, []object{}
			}), image.ErrUnsupported},
		} {
			if _, err := repo.Artifact(t.Context(), c.d, subject); !errors.Is(err, c.err) {
				t.Errorf("%s: %v, expected %v", name, err, c.err)
			}
		}
	})
}

func TestReferrersMirrors(t *testing.T) {
	var api listing
	empty, bad := serve(t, nil), serve(t, answering(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) }))
	origin := serve(t, api.wrap)
	repo := open(t, origin+"/app", image.Options{})
	subject := pushImage(t, repo, "v1", "amd64")
	a := pushArtifact(t, repo, subject, typeA, "x", nil)
	// One that lists others, but none of this type.
	stale := serve(t, nil)
	other := open(t, stale+"/app", image.Options{})
	pushArtifact(t, other, subject, typeB, "y", nil)
	pushImage(t, open(t, bad+"/app", image.Options{}), "v1", "amd64")

	rec := newRecorder(t)
	repo = open(t, origin+"/app:v1", image.Options{Transport: rec, Mirrors: []string{empty, bad, stale}})
	list, err := repo.Referrers(t.Context(), subject.Digest, typeA)
	if err != nil || !slices.Equal(digests(descriptors(list)), []string{a}) {
		t.Fatalf("%v, %v", list, err)
	}
	if got, err := repo.Artifact(t.Context(), list[0].Descriptor, subject.Digest); err != nil || got.Digest != a {
		t.Error(err)
	}
	if got := referrers(t, repo, subject.Digest, typeB); len(got) != 1 {
		t.Errorf("those that only a mirror has: %v", got)
	}
	if got := referrers(t, repo, someDigest, ""); len(got) != 0 {
		t.Errorf("%v", got)
	}
	// A mirror that is bad at this is still asked for images.
	rec.take()
	if _, err := repo.Resolve(t.Context(), linux("amd64")); err != nil {
		t.Error(err)
	}
	if n := len(rec.take()); n != 4 { // empty, bad: manifest, configuration
		t.Errorf("%d requests for an image that the second mirror has", n)
	}
	pushArtifact(t, repo, subject, typeA, "z", nil)
	for _, r := range rec.reqs {
		if r.Method != http.MethodGet && r.URL.Host != origin {
			t.Errorf("%s %s", r.Method, r.URL)
		}
	}
}

// TestIdempotent: nothing is written twice.
func TestIdempotent(t *testing.T) {
	for _, c := range []struct {
		name, host string
		want       int
	}{{"api", serve(t, new(listing).wrap), 0}, {"tag", debianRegistry(t, ""), 1}} {
		rec := newRecorder(t)
		repo := open(t, c.host+"/app", image.Options{Transport: rec})
		subject := pushImage(t, repo, "v1", "amd64")
		for i := range 2 {
			rec.take()
			pushArtifact(t, repo, subject, typeA, "x", nil)
			writes := 0
			for _, s := range rec.take() {
				if strings.HasPrefix(s, "PUT") && strings.Contains(s, "/manifests/sha256-") {
					writes++
				}
			}
			if want := c.want * (1 - i); writes != want {
				t.Errorf("%s, time %d: the list was written %d times, expected %d", c.name, i+1, writes, want)
			}
		}
	}
}

// pushers attaches n artifacts at once and expects all of them in the list.
func pushers(t *testing.T, ref string, n int, replaces func(image.Descriptor) bool) {
	t.Helper()
	subject := pushImage(t, open(t, ref, image.Options{}), "v1", "amd64")
	all := make([]string, n)
	var wg sync.WaitGroup
	for i := range n {
		repo := open(t, ref, image.Options{})
		l := pushBlob(t, repo, "a/b", fmt.Append(nil, i))
		wg.Go(func() {
			digest, err := repo.PushArtifact(t.Context(), subject, typeA, []image.Descriptor{l}, nil, replaces)
			if err != nil {
				t.Error(err)
			}
			all[i] = digest
		})
	}
	wg.Wait()
	if got := referrers(t, open(t, ref, image.Options{}), subject.Digest, typeA); !slices.Equal(got, sorted(all...)) {
		t.Errorf("%d of %d are listed", len(got), n)
	}
}

func TestRaces(t *testing.T) {
	t.Run("layout", func(t *testing.T) { pushers(t, "oci:"+t.TempDir(), 8, nil) })
	t.Run("docker-registry", func(t *testing.T) {
		to := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: debianRegistry(t, "")})
		pushers(t, serve(t, func(http.Handler) http.Handler { return losing(to) })+"/app", 2, nil)
	})
	t.Run("if-match", func(t *testing.T) { pushers(t, serve(t, ifMatch)+"/app", 4, nil) })
	t.Run("lost", func(t *testing.T) { pushers(t, serve(t, losing)+"/app", 2, nil) })
	t.Run("slow", func(t *testing.T) { pushers(t, serve(t, slow)+"/app", 2, nil) })
	t.Run("each other", func(t *testing.T) { // neither was there before the other
		pushers(t, serve(t, losing)+"/app", 2, func(image.Descriptor) bool { return true })
	})
}

// ifMatch makes a registry heed entity tags of manifests, also at the creation.
func ifMatch(next http.Handler) http.Handler {
	var mu sync.Mutex
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		if strings.Contains(r.URL.Path, "/manifests/sha256-") {
			head := httptest.NewRecorder()
			next.ServeHTTP(head, httptest.NewRequest(http.MethodHead, r.URL.Path, nil))
			etag := `"` + head.Header().Get("Docker-Content-Digest") + `"`
			if want := r.Header.Get("If-Match"); want != "" && want != etag {
				w.WriteHeader(http.StatusPreconditionFailed)
				return
			}
			w.Header().Set("ETag", etag)
		}
		next.ServeHTTP(w, r)
	})
}

// slow takes a while for each request of the list, and lets the second pusher read it
// when the first is about to write: it writes later than lists settle elsewhere.
func slow(next http.Handler) http.Handler {
	const while = 500 * time.Millisecond
	about := make(chan struct{})
	var read, written atomic.Int64
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch list := strings.Contains(r.URL.Path, "/manifests/sha256-"); {
		case list && r.Method == http.MethodGet:
			if read.Add(1) == 2 {
				<-about
			}
			answer := httptest.NewRecorder()
			next.ServeHTTP(answer, r)
			time.Sleep(while)
			maps.Copy(w.Header(), answer.Header())
			w.WriteHeader(answer.Code)
			w.Write(answer.Body.Bytes())
			return
		case list && r.Method == http.MethodPut:
			if written.Add(1) == 1 {
				close(about)
			}
			time.Sleep(while)
		}
		next.ServeHTTP(w, r)
	})
}

// losing makes the first two changes of the list meet: both pushers have read
// it before either writes, and the one who wrote first learns of it last.
func losing(next http.Handler) http.Handler {
	var reads, writes sync.WaitGroup
	reads.Add(2)
	writes.Add(2)
	var read, written atomic.Int64
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		list := strings.Contains(r.URL.Path, "/manifests/sha256-")
		if list && r.Method == http.MethodGet && read.Add(1) <= 2 {
			reads.Done()
			reads.Wait()
		}
		next.ServeHTTP(w, r)
		if list && r.Method == http.MethodPut && written.Add(1) <= 2 {
			writes.Done()
			writes.Wait()
		}
	})
}
