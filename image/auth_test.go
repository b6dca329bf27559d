package image_test

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/image"
)

// TestRoundTrips holds the number of requests a start costs.
func TestRoundTrips(t *testing.T) {
	host := serve(t, nil)
	rec := newRecorder(t)
	repo := open(t, host+"/app:v1", image.Options{Transport: rec})
	pushImage(t, repo, "v1", "amd64")
	rec.take()
	img, err := repo.ResolveManifest(t.Context(), linux("amd64"))
	if err != nil {
		t.Fatal(err)
	}
	if got := rec.take(); !slices.Equal(got, []string{"GET /v2/app/manifests/v1"}) {
		t.Errorf("a manifest costs %v", got)
	}
	if err := repo.LoadConfig(t.Context(), img); err != nil {
		t.Fatal(err)
	}
	if got := rec.take(); !slices.Equal(got, []string{"GET /v2/app/blobs/" + img.ConfigBlob.Digest}) {
		t.Errorf("a configuration costs %v", got)
	}
}

func TestBasic(t *testing.T) {
	dir := t.TempDir()
	// The password is "swordfish".
	if err := os.WriteFile(filepath.Join(dir, "htpasswd"), []byte("user:$2y$05$abcdefghijklmnopqrstuupWDwJQeCHYIBQy8WvkVB6ImhZ476YYy\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	ref := debianRegistry(t, "auth:\n  htpasswd: {realm: test, path: "+filepath.Join(dir, "htpasswd")+"}\n") + "/app:v1"
	rec := newRecorder(t)
	repo := open(t, ref, image.Options{Transport: rec, Credentials: image.Credentials{Username: "user", Password: "swordfish"}})
	pushImage(t, repo, "v1", "amd64")
	rec.take()
	if _, err := repo.Resolve(t.Context(), linux("amd64")); err != nil {
		t.Fatal(err)
	}
	if got := rec.take(); len(got) != 2 {
		t.Errorf("once the registry has asked, no request is made in vain: %v", got)
	}
	for _, c := range []image.Credentials{{}, {Username: "user", Password: "wrong"}} {
		_, err := open(t, ref, image.Options{Credentials: c}).Resolve(t.Context(), linux("amd64"))
		if !errors.Is(err, blob.ErrUnauthorized) || strings.Contains(err.Error(), "wrong") {
			t.Errorf("%v: %v", c, err)
		}
	}
}

// tokens is a token server with the registry that demands its tokens. Each is
// good for uses requests.
type tokens struct {
	uses          int64
	forbids       atomic.Bool // says 403 of a token that is used up
	fetched       atomic.Int64
	mu            sync.Mutex
	left          map[string]int64
	scope         map[string]string
	user, refresh string
	realm         string
}

func newTokens(t *testing.T, uses int64) (*tokens, string) {
	ts := &tokens{uses: uses, left: map[string]int64{}, scope: map[string]string{}}
	auth := httptest.NewServer(http.HandlerFunc(ts.token))
	t.Cleanup(auth.Close)
	ts.realm = auth.URL + "/token?x=1"
	return ts, serve(t, ts.guard)
}

func (ts *tokens) token(w http.ResponseWriter, r *http.Request) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	r.ParseForm()
	user, password, _ := r.BasicAuth()
	if ts.user != "" && user+":"+password != ts.user || r.Form.Get("refresh_token") != ts.refresh || r.Form.Get("service") != "the registry" {
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	tok := fmt.Sprintf("token-%d", ts.fetched.Add(1))
	ts.left[tok], ts.scope[tok] = ts.uses, strings.Join(r.Form["scope"], " ")
	key := "token"
	if r.Method == http.MethodPost {
		key = "access_token"
	}
	fmt.Fprintf(w, `{%q:%q,"expires_in":3600}`, key, tok)
}

func (ts *tokens) guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ts.mu.Lock()
		tok := strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
		need := "pull"
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			need = "push"
		}
		ok := ts.left[tok] > 0 && strings.Contains(ts.scope[tok], need)
		_, known := ts.left[tok]
		ts.left[tok]--
		ts.mu.Unlock()
		if !ok && known && ts.forbids.Load() {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		if !ok {
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm=%q,service="the registry",scope="repository:app:%s"`, ts.realm, need))
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		next.ServeHTTP(w, r)
	})
}

func TestBearer(t *testing.T) {
	ts, host := newTokens(t, 1<<40)
	rec := newRecorder(t)
	repo := open(t, host+"/app:v1", image.Options{Transport: rec})
	pushImage(t, repo, "v1", "amd64")
	rec.take()
	if _, err := repo.Resolve(t.Context(), linux("amd64")); err != nil {
		t.Fatal(err)
	}
	if got := rec.take(); len(got) != 3 { // the challenge is known: token, manifest, configuration
		t.Errorf("%v", got)
	}
	if n := ts.fetched.Load(); n != 2 {
		t.Errorf("%d tokens, expected one to push and one to pull", n)
	}
	// A cold start: refused, token, manifest, configuration.
	rec = newRecorder(t)
	if _, err := open(t, host+"/app:v1", image.Options{Transport: rec}).Resolve(t.Context(), linux("amd64")); err != nil {
		t.Fatal(err)
	}
	if got := rec.take(); len(got) != 4 {
		t.Errorf("%v", got)
	}
}

func TestBearerExpires(t *testing.T) {
	ts, host := newTokens(t, 2) // every token dies at its third use
	repo := open(t, host+"/app:v1", image.Options{})
	pushImage(t, repo, "v1", "amd64")
	img, err := repo.Resolve(t.Context(), linux("amd64"))
	if err != nil {
		t.Fatal(err)
	}
	for i := range int64(20) {
		p, err := blob.ReadAll(t.Context(), repo.Blobs(), img.Layers[1].Ref(), i, 10)
		if err != nil || string(p) != string(layers[1][i:i+10]) {
			t.Fatalf("range %d: %q, %v", i, p, err)
		}
	}
	if n := ts.fetched.Load(); n < 10 {
		t.Errorf("%d tokens", n)
	}
	ts.forbids.Store(true)
	for i := range int64(20) {
		p, err := blob.ReadAll(t.Context(), repo.Blobs(), img.Layers[1].Ref(), i, 10)
		if err != nil || string(p) != string(layers[1][i:i+10]) {
			t.Fatalf("range %d, of a token that is forbidden when it has expired: %q, %v", i, p, err)
		}
	}
	ts.mu.Lock()
	ts.uses = 0 // new ones are never any good: that is a no
	ts.mu.Unlock()
	before := ts.fetched.Load()
	for range 4 {
		if _, err = blob.ReadAll(t.Context(), repo.Blobs(), img.Layers[1].Ref(), 0, 10); err != nil {
			break
		}
	}
	if n := ts.fetched.Load() - before; !errors.Is(err, blob.ErrUnauthorized) || n > 2 {
		t.Errorf("%v after %d tokens", err, n)
	}
}

func TestBearerConcurrent(t *testing.T) {
	ts, host := newTokens(t, 1<<40)
	pushImage(t, open(t, host+"/app:v1", image.Options{}), "v1", "amd64")
	repo := open(t, host+"/app:v1", image.Options{})
	before := ts.fetched.Load()
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() {
			d := desc(tarGzip, layers[1])
			if _, err := blob.ReadAll(t.Context(), repo.Blobs(), d.Ref(), 7, 7); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := ts.fetched.Load() - before; n != 1 {
		t.Errorf("32 requests at once fetched %d tokens", n)
	}
}

func TestBearerCredentials(t *testing.T) {
	for _, c := range []struct {
		user, refresh string
		cred          image.Credentials
		ok            bool
	}{
		{"u:p", "", image.Credentials{Username: "u", Password: "p"}, true},
		{"u:p", "", image.Credentials{Username: "u", Password: "hunter2"}, false},
		{"u:p", "", image.Credentials{}, false},
		{"", "refresh", image.Credentials{IdentityToken: "refresh"}, true},
		{"", "refresh", image.Credentials{IdentityToken: "hunter2"}, false},
		{"", "", image.Credentials{RegistryToken: "hunter2"}, false},
		{"", "", image.Credentials{RegistryToken: "fixed"}, true},
	} {
		ts, host := newTokens(t, 1<<40)
		ts.user, ts.refresh = c.user, c.refresh
		ts.left["fixed"], ts.scope["fixed"] = 1<<40, "pull,push"
		repo := open(t, host+"/app:v1", image.Options{Credentials: c.cred})
		d := desc(tarGzip, []byte("x"))
		err := repo.PushBlob(t.Context(), d, opener([]byte("x")))
		if (err == nil) != c.ok || !c.ok && !errors.Is(err, blob.ErrUnauthorized) {
			t.Errorf("%#v: %v", c.cred, err)
		}
		if err != nil && strings.Contains(err.Error(), "hunter2") {
			t.Errorf("a secret in %v", err)
		}
	}
}

func TestHostileRealm(t *testing.T) {
	asked := false
	trap := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked = true }))
	defer trap.Close()
	srv := httptest.NewTLSServer(nil)
	defer srv.Close()
	for _, realm := range []string{
		trap.URL, "http://example.com/token", "https://169.254.169.254/latest", "https://[fe80::1]/", "file:///etc/passwd", "", "/token", "https://u:p@example.com/",
	} {
		srv.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm=%q`, realm))
			w.WriteHeader(http.StatusUnauthorized)
		})
		// The registry is on TLS: the transport only makes it reachable under that name.
		client := srv.Client().Transport.(*http.Transport).Clone()
		client.TLSClientConfig.ServerName = "example.com"
		client.DialContext = dialTo(srv.Listener.Addr().String())
		_, err := open(t, "registry.example/app:v1", image.Options{
			Transport: client, Credentials: image.Credentials{Username: "u", Password: "hunter2"},
		}).Resolve(t.Context(), linux("amd64"))
		client.CloseIdleConnections()
		if !errors.Is(err, blob.ErrUnauthorized) || asked || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: %v, asked: %v", realm, err, asked)
		}
	}
}

// TestCredentialsStay: neither blobs nor uploads nor mirrors on other hosts see
// any credentials.
func TestCredentialsStay(t *testing.T) {
	var leaked atomic.Value
	storage := serve(t, func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Authorization") != "" {
				leaked.Store(r.Method + " " + r.URL.String())
			}
			next.ServeHTTP(w, r)
		})
	})
	pushImage(t, open(t, storage+"/app", image.Options{}), "v1", "amd64")
	front := serve(t, func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if _, p, ok := r.BasicAuth(); !ok || p != "secret" {
				w.Header().Set("WWW-Authenticate", `Basic realm="r"`)
				w.WriteHeader(http.StatusUnauthorized)
				return
			}
			http.Redirect(w, r, "http://"+storage+r.URL.RequestURI(), http.StatusTemporaryRedirect)
		})
	})
	cred := image.Credentials{Username: "u", Password: "secret"}
	repo := open(t, front+"/app:v1", image.Options{Credentials: cred})
	img, err := repo.Resolve(t.Context(), linux("amd64"))
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if _, err := blob.ReadAll(t.Context(), repo.Blobs(), img.Layers[0].Ref(), 0, 5); err != nil {
			t.Fatal(err)
		}
	}
	pushBlob(t, repo, tarGzip, []byte("through a redirect"))
	pushManifest(t, repo, image.MediaTypeManifest, "v2", object{"schemaVersion": 2, "config": img.ConfigBlob, "layers": img.Layers})
	if _, err := open(t, front+"/app:v1", image.Options{Credentials: cred, Mirrors: []string{storage}}).Resolve(t.Context(), linux("amd64")); err != nil {
		t.Fatal(err)
	}
	if at := leaked.Load(); at != nil {
		t.Errorf("credentials reached another host: %v", at)
	}
}

// TestForbiddenLate: a token that has expired is answered with 403 after another request
// has had it replaced, and by one that has expired as well.
func TestForbiddenLate(t *testing.T) {
	var (
		mu      sync.Mutex
		tokens  int
		good    = "Bearer 1" // what is let in
		release = make(chan struct{})
	)
	var host string
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/token" {
			mu.Lock()
			defer mu.Unlock()
			tokens++
			good = fmt.Sprint("Bearer ", tokens)
			fmt.Fprintf(w, `{"token": "%d", "expires_in": 3600}`, tokens)
			return
		}
		auth := r.Header.Get("Authorization")
		if auth == "" {
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token"`, host))
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		if auth == "Bearer 1" && r.Header.Get("Range") == "bytes=1-1" {
			<-release
		}
		mu.Lock()
		ok := auth == good
		mu.Unlock()
		if !ok {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		http.ServeContent(w, r, "", time.Time{}, strings.NewReader("0123456789"))
	}))
	defer srv.Close()
	host = strings.TrimPrefix(srv.URL, "http://")
	repo := open(t, host+"/app:v1", image.Options{})
	ref := blob.Ref{Digest: "sha256:" + strings.Repeat("0", 64), Size: 10}
	read := func(off int64) error {
		_, err := blob.ReadAll(t.Context(), repo.Blobs(), ref, off, 1)
		return err
	}
	if err := read(0); err != nil { // with token 1
		t.Fatal(err)
	}
	late := make(chan error)
	go func() { late <- read(1) }()
	mu.Lock()
	good = "none"
	mu.Unlock()
	if err := read(2); err != nil { // with token 2
		t.Fatal(err)
	}
	mu.Lock()
	good = "none" // nor that one
	mu.Unlock()
	close(release)
	if err := <-late; err != nil { // with token 3
		t.Error(err)
	}
	if tokens != 3 {
		t.Errorf("%d tokens", tokens)
	}
}

// TestPage: what answers instead of a mirror is no manifest.
func TestPage(t *testing.T) {
	page := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		fmt.Fprint(w, "<p>Please log in.")
	}))
	defer page.Close()
	host := serve(t, func(h http.Handler) http.Handler { return h })
	pushImage(t, open(t, host+"/app:v1", image.Options{}), "v1", "amd64")
	mirror := strings.TrimPrefix(page.URL, "http://")
	if _, err := open(t, host+"/app:v1", image.Options{Mirrors: []string{mirror}}).Resolve(t.Context(), linux("amd64")); err != nil {
		t.Error(err)
	}
	if _, err := open(t, mirror+"/app:v1", image.Options{}).Manifest(t.Context(), ""); !errors.Is(err, image.ErrCorrupt) {
		t.Errorf("%v, want ErrCorrupt", err)
	}
}
